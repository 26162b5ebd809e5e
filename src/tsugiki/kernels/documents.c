// Causal attention of documents laid end to end, forward and backward, in bfloat16 with sums in float32: attention.py has the
// plain twin and says what is computed. One task is a document and a head of its keys; its scores never leave the cache.
// Matrix products run on AMX tiles, or on AVX512-BF16 where there are none. Compiled by native.py, for the machine at hand.
#include "tiles.h"
#define ROWS 32                                        // queries of one block; every size is filled up to a multiple of it
#define UP(n) (((n) + ROWS - 1) / ROWS * ROWS)

typedef struct { const bf16 *at; long token, head; } Input;    // strides in numbers; a head's own numbers are contiguous
typedef struct { bf16 *at; long token, head; } Output;

// 1 if the kernel allows AMX tiles to this process, or none are used.
int documents_init(void) {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
    return 1;
#endif
}

// `count` rows of d numbers as (filled, wide), with zeros beyond.
static void copy(Input from, long first, int head, int count, int filled, int d, int wide, bf16 *to) {
    for (int i = 0; i < filled; i++) {
        int given = i < count ? d : 0;
        if (given) memcpy(to + (long)i * wide, from.at + (first + i) * from.token + head * from.head, 2 * given);
        memset(to + (long)i * wide + given, 0, 2 * (wide - given));
    }
}

// The first `seen` of a row of scores become softmax(scale * scores), the rest up to n zeros.
static void softmax(float *s, int seen, int n, float scale) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    for (int j = 0; j < seen; j += 16) most = _mm512_mask_max_ps(most, until(seen - j), most, _mm512_loadu_ps(s + j));
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most) * scale);
    for (int j = 0; j < n; j += 16) {
        __m512 e = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), by, top));
        e = _mm512_maskz_mov_ps(until(seen - j), e);
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(s + j, e);
    }
    __m512 one = _mm512_set1_ps(seen ? 1.f / _mm512_reduce_add_ps(sum) : 0.f);
    for (int j = 0; j < n; j += 16) _mm512_storeu_ps(s + j, _mm512_mul_ps(_mm512_loadu_ps(s + j), one));
}

static int seen_by(int row, int length) { return row < length ? row + 1 : 0; }

static void *room(char **free_, long bytes) {
    void *found = *free_;
    *free_ += (bytes + 63) / 64 * 64;
    return found;
}

static void forward_task(Input q, Input k, Input v, Output out, long first, int length, int kv, int group, int d, float scale,
                         char *memory) {
    int filled = UP(length), wide = UP(d);
    bf16 *rows = room(&memory, 2L * filled * wide), *query = room(&memory, 2L * ROWS * wide);
    uint32_t *keys = room(&memory, 2L * filled * wide), *values = room(&memory, 2L * filled * wide);
    float *scores = room(&memory, 4L * ROWS * filled), *made = room(&memory, 4L * ROWS * wide);
    bf16 *weights = room(&memory, 2L * ROWS * filled);
    copy(k, first, kv, length, filled, d, wide, rows);
    turn(filled, wide / 2, rows, wide / 2, keys, filled);
    copy(v, first, kv, length, filled, d, wide, rows);
    pairs(filled, wide, rows, wide, values, wide);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int r = 0; r < length; r += ROWS) {
            int n = r + ROWS, here = length - r < ROWS ? length - r : ROWS;
            copy(q, first + r, head, here, ROWS, d, wide, query);
            product(ROWS, n, wide, query, wide, keys, filled, scores, filled, 0);
            for (int i = 0; i < ROWS; i++) {
                float *s = scores + (long)i * filled;
                softmax(s, seen_by(r + i, length), n, scale);
                for (int j = 0; j < n; j += 16)
                    _mm256_storeu_si256((void *)(weights + (long)i * filled + j), rounded(_mm512_loadu_ps(s + j)));
            }
            product(ROWS, wide, n, weights, filled, values, wide, made, wide, 0);
            for (int i = 0; i < here; i++) {
                bf16 *to = out.at + (first + r + i) * out.token + head * out.head;
                for (int j = 0; j < d; j += 16)
                    _mm256_mask_storeu_epi16(to + j, until(d - j), rounded(_mm512_loadu_ps(made + (long)i * wide + j)));
            }
        }
}

// Scores' gradient by softmax: p (dp - sum(p dp)), over dp; both rows of n.
static void softmax_backward(const float *p, float *dp, int n) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < n; j += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(p + j), _mm512_loadu_ps(dp + j), sum);
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    for (int j = 0; j < n; j += 16)
        _mm512_storeu_ps(dp + j, _mm512_mul_ps(_mm512_loadu_ps(p + j), _mm512_sub_ps(_mm512_loadu_ps(dp + j), mean)));
}

// A block's rows (ROWS, wide) turned: (wide, ROWS). `between`: room for as many.
static void turned_rows(int wide, const bf16 *from, uint32_t *between, bf16 *to) {
    pairs(ROWS, wide, from, wide, between, wide);
    turn(ROWS / 2, wide, between, wide, to, ROWS / 2);
}

// (wide, filled) in float32, times scale, into rows of d numbers.
static void give(Output to, long first, int head, int length, int filled, int d, const float *from, float scale) {
    float part[16 * 16];
    __m512 by = _mm512_set1_ps(scale);
    for (int i = 0; i < length; i += 16)
        for (int j = 0; j < d; j += 16) {
            turn16((const uint32_t *)from + (long)j * filled + i, filled, (uint32_t *)part, 16);
            for (int r = 0; r < 16 && i + r < length; r++)
                _mm256_mask_storeu_epi16(to.at + (first + i + r) * to.token + head * to.head + j, until(d - j),
                                         rounded(_mm512_mul_ps(_mm512_loadu_ps(part + 16 * r), by)));
        }
}

static void backward_task(Input q, Input k, Input v, Input grad, Output dq, Output dk, Output dv, long first, int length, int kv,
                          int group, int d, float scale, char *memory) {
    int filled = UP(length), wide = UP(d);
    bf16 *rows = room(&memory, 2L * filled * wide), *query = room(&memory, 2L * ROWS * wide);
    bf16 *given = room(&memory, 2L * ROWS * wide), *query_t = room(&memory, 2L * ROWS * wide);
    bf16 *given_t = room(&memory, 2L * ROWS * wide), *ds = room(&memory, 2L * ROWS * filled);
    uint32_t *keys = room(&memory, 2L * filled * wide), *values = room(&memory, 2L * filled * wide);
    uint32_t *key_pairs = room(&memory, 2L * filled * wide), *between = room(&memory, 2L * ROWS * wide);
    uint32_t *p_pairs = room(&memory, 2L * ROWS * filled), *ds_pairs = room(&memory, 2L * ROWS * filled);
    float *p = room(&memory, 4L * ROWS * filled), *dp = room(&memory, 4L * ROWS * filled);
    float *made = room(&memory, 4L * ROWS * wide);
    float *dkey = room(&memory, 4L * filled * wide), *dvalue = room(&memory, 4L * filled * wide);
    copy(v, first, kv, length, filled, d, wide, rows);
    turn(filled, wide / 2, rows, wide / 2, values, filled);
    copy(k, first, kv, length, filled, d, wide, rows);
    turn(filled, wide / 2, rows, wide / 2, keys, filled);
    pairs(filled, wide, rows, wide, key_pairs, wide);
    memset(dkey, 0, 4L * filled * wide);
    memset(dvalue, 0, 4L * filled * wide);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int r = 0; r < length; r += ROWS) {
            int n = r + ROWS, here = length - r < ROWS ? length - r : ROWS;
            copy(q, first + r, head, here, ROWS, d, wide, query);
            copy(grad, first + r, head, here, ROWS, d, wide, given);
            product(ROWS, n, wide, query, wide, keys, filled, p, filled, 0);
            product(ROWS, n, wide, given, wide, values, filled, dp, filled, 0);
            for (int i = 0; i < ROWS; i++) {
                softmax(p + (long)i * filled, seen_by(r + i, length), n, scale);
                softmax_backward(p + (long)i * filled, dp + (long)i * filled, n);
            }
            for (int i = 0; i < ROWS; i += 2)
                for (int j = 0; j < n; j += 16) {
                    long at = (long)i * filled + j;
                    __m256i low = rounded(_mm512_loadu_ps(dp + at)), high = rounded(_mm512_loadu_ps(dp + at + filled));
                    _mm256_storeu_si256((void *)(ds + at), low);
                    _mm256_storeu_si256((void *)(ds + at + filled), high);
                    _mm512_storeu_si512(ds_pairs + (long)i / 2 * filled + j, pair(low, high));
                    _mm512_storeu_si512(p_pairs + (long)i / 2 * filled + j,
                                        pair(rounded(_mm512_loadu_ps(p + at)), rounded(_mm512_loadu_ps(p + at + filled))));
                }
            product(ROWS, wide, n, ds, filled, key_pairs, wide, made, wide, 0);
            for (int i = 0; i < here; i++) {
                bf16 *to = dq.at + (first + r + i) * dq.token + head * dq.head;
                for (int j = 0; j < d; j += 16)
                    _mm256_mask_storeu_epi16(to + j, until(d - j), rounded(_mm512_mul_ps(
                        _mm512_loadu_ps(made + (long)i * wide + j), _mm512_set1_ps(scale))));
            }
            turned_rows(wide, query, between, query_t);
            turned_rows(wide, given, between, given_t);
            product(wide, n, ROWS, query_t, ROWS, ds_pairs, filled, dkey, filled, 1);
            product(wide, n, ROWS, given_t, ROWS, p_pairs, filled, dvalue, filled, 1);
        }
    give(dk, first, kv, length, filled, d, dkey, scale);
    give(dv, first, kv, length, filled, d, dvalue, 1.f);
}

// Bytes that a task on a document of so many tokens needs at most.
static long task_room(int length, int d) {
    long filled = UP(length), wide = UP(d);
    return 18 * filled * wide + 18 * ROWS * filled + 18 * ROWS * wide + 64 * 20;
}

// Tensors: pointer, token stride, head stride, in the order q, k, v, out, or q, k, v, grad, dq, dk, dv. starts: (documents + 1,).
// Returns 0, or 1 if memory ran out.
int documents_run(int backward, void **at, const long *strides, const long *starts, int documents, int kv_heads, int group, int d,
                  float scale, int threads) {
    int failed = 0, longest = 0, tasks = documents * kv_heads;
    for (int i = 0; i < documents; i++)
        if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
#define IN(n) ((Input){at[n], strides[2 * (n)], strides[2 * (n) + 1]})
#define OUT(n) ((Output){at[n], strides[2 * (n)], strides[2 * (n) + 1]})
#pragma omp parallel num_threads(threads)
    {
        char *memory = aligned_alloc(64, (task_room(longest, d) + 63) / 64 * 64);
        if (!memory) failed = 1;
        tiles_on();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < tasks; task++) {
            int i = task / kv_heads, kv = task % kv_heads, length = starts[i + 1] - starts[i];
            if (!length || !memory) continue;
            if (backward)
                backward_task(IN(0), IN(1), IN(2), IN(3), OUT(4), OUT(5), OUT(6), starts[i], length, kv, group, d, scale, memory);
            else
                forward_task(IN(0), IN(1), IN(2), OUT(3), starts[i], length, kv, group, d, scale, memory);
        }
        tiles_off();
        free(memory);
    }
    return failed;
}
