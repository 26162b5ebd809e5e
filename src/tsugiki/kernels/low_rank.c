// y + s B (A x) and its gradients for a thin A and B, every activation read once: low_rank.py has the plain twin. Activations are
// bfloat16, A (r, in) and B (out, r) float32, rounded to bfloat16 before a product; sums are float32. `in` and `out` are multiples
// of 32. What has the rank as a side is filled up with zeros, to a multiple of 16 where it is computed, of 32 where it is summed over.
#include "tiles.h"

#define TOKENS 64                                      // of one task: their rows stay in the second cache
#define UP(n, k) (((n) + (k) - 1) / (k) * (k))

// A factor's rows (UP(rank, 32), n) in two forms. down: pairs of columns, (n / 2, UP(rank, 32)); up: pairs of rows, (.. / 2, n).
typedef struct { uint32_t *down, *up; } Factor;

static void factor_free(Factor f) { free(f.down), free(f.up); }

// m (rank, n) by its strides. 0 if memory ran out.
static int factor(const float *m, long row, long column, int rank, long n, int down, int up, Factor *f) {
    int filled = UP(rank, 32);
    long bytes = 2L * filled * n;
    bf16 *rows = aligned_alloc(64, bytes);
    *f = (Factor){down ? aligned_alloc(64, bytes) : 0, up ? aligned_alloc(64, bytes) : 0};
    if (!rows || (down && !f->down) || (up && !f->up)) return free(rows), 0;
    memset(rows + rank * n, 0, 2 * (filled - rank) * n);
    for (int r = 0; r < rank; r++)
        for (long j = 0; j < n; j += 16) {
            float part[16];
            for (int i = 0; i < 16; i++) part[i] = m[r * row + (j + i) * column];
            _mm256_storeu_si256((void *)(rows + r * n + j), rounded(_mm512_loadu_ps(part)));
        }
    if (down) turn(filled, n / 2, rows, n / 2, f->down, filled);
    if (up) pairs(filled, n, rows, n, f->up, n);
    free(rows);
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

// low (TOKENS, UP(rank, 32)) = scale x m^T, rounded; zeros beyond the rank, whatever x holds. sum: room for as many floats.
static void down(const bf16 *x, long n, const Factor *m, int rank, float scale, float *sum, bf16 *low) {
    int filled = UP(rank, 32), made = UP(rank, 16);
    product(TOKENS, made, n, x, n, m->down, filled, sum, filled, 0);
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < filled; r += 16)
            _mm256_storeu_si256((void *)(low + t * filled + r), rounded(_mm512_mul_ps(_mm512_set1_ps(scale),
                                _mm512_maskz_loadu_ps(until(rank - r), sum + t * filled + r))));
}

// The first `count` rows of out (TOKENS, n) = y + low m; without y, low m.
static void up(const bf16 *low, int rank, const Factor *m, const bf16 *y, bf16 *out, long count, long n) {
    float made[32 * 32] __attribute__((aligned(64)));
    int filled = UP(rank, 32);
    for (long t = 0; t < count; t += 32)
        for (long j = 0; j < n; j += 32) {
            product(32, 32, filled, low + t * filled, filled, m->up + j, n, made, 32, 0);
            for (long i = 0; i < 32 && t + i < count; i++)
                for (int h = 0; h < 32; h += 16) {
                    long at = (t + i) * n + j + h;
                    __m512 sum = _mm512_load_ps(made + 32 * i + h);
                    if (y) sum = _mm512_add_ps(sum, widened(_mm256_loadu_si256((const void *)(y + at))));
                    _mm256_storeu_si256((void *)(out + at), rounded(sum));
                }
        }
}

// sum (UP(rank, 16), n) += low^T x over a task's tokens. turned: room for a copy of low.
static void outer(const bf16 *low, int rank, const bf16 *x, long n, float *sum, bf16 *turned) {
    uint32_t words[TOKENS / 2 * 64] __attribute__((aligned(64)));
    int filled = UP(rank, 32);
    pairs(TOKENS, filled, low, filled, words, filled);
    turn(TOKENS / 2, filled, words, filled, turned, TOKENS / 2);
    for (long j = 0; j < n; j += 32) {
        pairs(TOKENS, 32, x + j, n, words, 32);
        product(UP(rank, 16), 32, TOKENS, turned, TOKENS, words, 32, sum + j, n, 1);
    }
}

int low_rank_forward(const bf16 *x, const bf16 *y, const float *a, const float *b, bf16 *out, long tokens, long in, long n, long rank,
                     float scale, long threads) {
    Factor first = {0}, second = {0};
    int failed = !factor(a, in, 1, rank, in, 1, 0, &first) || !factor(b, 1, rank, rank, n, 0, 1, &second);
#pragma omp parallel num_threads(threads)
    {
        bf16 *low = aligned_alloc(64, 2L * TOKENS * UP(rank, 32)), *room = aligned_alloc(64, 2L * TOKENS * in);
        float *sum = aligned_alloc(64, 4L * TOKENS * UP(rank, 32));
        if (!low || !room || !sum) failed = 1;
        tiles_on();
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += TOKENS) {
            if (failed) continue;
            down(task_rows(x, t, tokens, in, room), in, &first, rank, scale, sum, low);
            up(low, rank, &second, y + t * n, out + t * n, tokens - t < TOKENS ? tokens - t : TOKENS, n);
        }
        tiles_off();
        free(low), free(room), free(sum);
    }
    factor_free(first), factor_free(second);
    return failed;
}

// With g the gradient by out and d = s g B: dx = d A, or += d A if `onto`; da (threads, UP(rank, 16), in) += d^T x and
// db (threads, UP(rank, 16), out) += low^T g, of which the sums over threads are the gradients. dx may be null.
int low_rank_backward(const bf16 *g, const bf16 *x, const float *a, const float *b, bf16 *dx, float *da, float *db, long onto,
                      long tokens, long in, long n, long rank, float scale, long threads) {
    Factor first = {0}, second = {0};
    long tasks = (tokens + TOKENS - 1) / TOKENS, wide = in > n ? in : n;
    int failed = !factor(a, in, 1, rank, in, 1, 1, &first) || !factor(b, 1, rank, rank, n, 1, 0, &second);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int own = 0; own < threads; own++) {
        bf16 *low = aligned_alloc(64, 2L * TOKENS * UP(rank, 32)), *turned = aligned_alloc(64, 2L * TOKENS * UP(rank, 32));
        bf16 *room = aligned_alloc(64, 4L * TOKENS * wide);
        float *sum = aligned_alloc(64, 4L * TOKENS * UP(rank, 32));
        if (!low || !room || !turned || !sum) failed = 1;
        tiles_on();
        for (long task = tasks * own / threads; task < tasks * (own + 1) / threads && !failed; task++) {
            long t = task * TOKENS, count = tokens - t < TOKENS ? tokens - t : TOKENS;
            const bf16 *grad = task_rows(g, t, tokens, n, room), *given = task_rows(x, t, tokens, in, room + TOKENS * wide);
            down(given, in, &first, rank, scale, sum, low);
            outer(low, rank, grad, n, db + (long)own * UP(rank, 16) * n, turned);
            down(grad, n, &second, rank, scale, sum, low);
            outer(low, rank, given, in, da + (long)own * UP(rank, 16) * in, turned);
            if (dx) up(low, rank, &first, onto ? dx + t * in : 0, dx + t * in, count, in);
        }
        tiles_off();
        free(low), free(room), free(turned), free(sum);
    }
    factor_free(first), factor_free(second);
    return failed;
}
