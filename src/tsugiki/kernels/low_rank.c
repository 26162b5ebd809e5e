// y + s B (A x) and its gradients for a thin A and B, every activation read once: low_rank.py has the plain twin. Activations are
// bfloat16, A (r, in) and B (out, r) float32, rounded to bfloat16 before a product; sums are float32. `in` and `out` are multiples
// of 32, as is `filled`, which the rank is filled up to with zeros.
#include "tiles.h"

#define TOKENS 64                                      // of one task: their rows stay in the second cache

// Three forms of a factor. rows: m (filled, n); down: pairs of its columns, (n / 2, filled); up: pairs of its rows, (filled / 2, n).
typedef struct { bf16 *rows; uint32_t *down, *up; } Factor;

static void factor_free(Factor f) { free(f.rows), free(f.down), free(f.up); }

// m (rank, n) by its strides. 0 if memory ran out.
static int factor(const float *m, long row, long column, int rank, int filled, long n, Factor *f) {
    long bytes = 2L * filled * n;
    *f = (Factor){aligned_alloc(64, bytes), aligned_alloc(64, bytes), aligned_alloc(64, bytes)};
    if (!f->rows || !f->down || !f->up) return 0;
    memset(f->rows, 0, bytes);
    for (int r = 0; r < rank; r++)
        for (long j = 0; j < n; j += 16) {
            float part[16];
            for (int i = 0; i < 16; i++) part[i] = m[r * row + (j + i) * column];
            _mm256_storeu_si256((void *)(f->rows + r * n + j), rounded(_mm512_loadu_ps(part)));
        }
    turn(filled, n / 2, f->rows, n / 2, f->down, filled);
    pairs(filled, n, f->rows, f->up);
    return 1;
}

// A task's rows of t (tokens, n) from `first` on; where there are fewer than TOKENS, a copy in `room`, zeros below.
static const bf16 *task_rows(const bf16 *t, long first, long tokens, long n, bf16 *room) {
    long count = tokens - first;
    if (count >= TOKENS) return t + first * n;
    memcpy(room, t + first * n, 2 * count * n);
    memset(room + count * n, 0, 2 * (TOKENS - count) * n);
    return room;
}

// low (TOKENS, filled) = scale x m^T, rounded; zeros beyond the rank, whatever x holds. sum: room for as many floats.
static void down(const bf16 *x, long n, const Factor *m, int rank, int filled, float scale, float *sum, bf16 *low) {
    product(TOKENS, filled, n, x, n, m->down, filled, sum, filled, 0);
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < filled; r += 16)
            _mm256_storeu_si256((void *)(low + t * filled + r), rounded(_mm512_maskz_mul_ps(until(rank - r),
                                _mm512_loadu_ps(sum + t * filled + r), _mm512_set1_ps(scale))));
}

// The first `count` rows of out (TOKENS, n) = y + low m; without y, low m.
static void up(const bf16 *low, int filled, const Factor *m, const bf16 *y, bf16 *out, long count, long n) {
    float made[32 * 32] __attribute__((aligned(64)));
    for (long t = 0; t < count; t += 32)
        for (long j = 0; j < n; j += 32) {
            product(32, 32, filled, low + t * filled, filled, m->up + j, n, made, 32, 0);
            for (long i = 0; i < 32 && t + i < count; i++)
                for (int h = 0; h < 32; h += 16) {
                    long at = (t + i) * n + j + h;
                    __m512 sum = _mm512_loadu_ps(made + 32 * i + h);
                    if (y) sum = _mm512_add_ps(sum, widened(_mm256_loadu_si256((const void *)(y + at))));
                    _mm256_storeu_si256((void *)(out + at), rounded(sum));
                }
        }
}

// sum (filled, n) += low^T x over a task's tokens. words: room for TOKENS / 2 times the larger of n and filled.
static void outer(const bf16 *low, int filled, const bf16 *x, long n, float *sum, bf16 *turned, uint32_t *words) {
    pairs(TOKENS, filled, low, words);
    turn(TOKENS / 2, filled, words, filled, turned, TOKENS / 2);
    pairs(TOKENS, n, x, words);
    product(filled, n, TOKENS, turned, TOKENS, words, n, sum, n, 1);
}

int low_rank_forward(const bf16 *x, const bf16 *y, const float *a, const float *b, bf16 *out, long tokens, long in, long n, int rank,
                     int filled, float scale, int threads) {
    Factor first = {0}, second = {0};
    int failed = !factor(a, in, 1, rank, filled, in, &first) || !factor(b, 1, rank, rank, filled, n, &second);
#pragma omp parallel num_threads(threads)
    {
        bf16 *low = aligned_alloc(64, 2L * TOKENS * filled), *room = aligned_alloc(64, 2L * TOKENS * in);
        float *sum = aligned_alloc(64, 4L * TOKENS * filled);
        if (!low || !room || !sum) failed = 1;
        tiles_on();
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += TOKENS) {
            if (failed) continue;
            down(task_rows(x, t, tokens, in, room), in, &first, rank, filled, scale, sum, low);
            up(low, filled, &second, y + t * n, out + t * n, tokens - t < TOKENS ? tokens - t : TOKENS, n);
        }
        tiles_off();
        free(low), free(room), free(sum);
    }
    factor_free(first), factor_free(second);
    return failed;
}

// With g the gradient by out and d = s g B: dx = d A; da (threads, filled, in) += d^T x and db (threads, filled, out) += low^T g, of
// which the sums over threads are the gradients. dx may be null.
int low_rank_backward(const bf16 *g, const bf16 *x, const float *a, const float *b, bf16 *dx, float *da, float *db, long tokens,
                      long in, long n, int rank, int filled, float scale, int threads) {
    Factor first = {0}, second = {0};
    long tasks = (tokens + TOKENS - 1) / TOKENS, wide = in > n ? in : n;
    int failed = !factor(a, in, 1, rank, filled, in, &first) || !factor(b, 1, rank, rank, filled, n, &second);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int own = 0; own < threads; own++) {
        bf16 *low = aligned_alloc(64, 2L * TOKENS * filled), *room = aligned_alloc(64, 4L * TOKENS * wide);
        bf16 *turned = aligned_alloc(64, 2L * TOKENS * filled);
        float *sum = aligned_alloc(64, 4L * TOKENS * filled);
        uint32_t *words = aligned_alloc(64, 2L * TOKENS * (wide > filled ? wide : filled));
        if (!low || !room || !turned || !sum || !words) failed = 1;
        tiles_on();
        for (long task = tasks * own / threads; task < tasks * (own + 1) / threads && !failed; task++) {
            long t = task * TOKENS, count = tokens - t < TOKENS ? tokens - t : TOKENS;
            const bf16 *grad = task_rows(g, t, tokens, n, room), *given = task_rows(x, t, tokens, in, room + TOKENS * wide);
            down(given, in, &first, rank, filled, scale, sum, low);
            outer(low, filled, grad, n, db + (long)own * filled * n, turned, words);
            down(grad, n, &second, rank, filled, scale, sum, low);
            outer(low, filled, given, in, da + (long)own * filled * in, turned, words);
            if (dx) up(low, filled, &first, 0, dx + t * in, count, in);
        }
        tiles_off();
        free(low), free(room), free(turned), free(sum), free(words);
    }
    factor_free(first), factor_free(second);
    return failed;
}
