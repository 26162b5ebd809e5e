// The passes over activations between a layer's products, each read and written once: passes.py has the plain twins and says what
// is computed. Here a whole tensor at a time, in threads, and backward.
#include "passes.h"

void norm_forward(const void *x, const void *w, void *y, float *scale, long rows, long d, float eps, float offset, long inner,
                  long wide, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        long at = i * d * (wide ? 4 : 2);
        if (wide) norm_row((const char *)x + at, w, (char *)y + at, scale + i, d, eps, offset, inner, 1);
        else norm_row((const char *)x + at, w, (char *)y + at, scale + i, d, eps, offset, inner, 0);
    }
}

// dx = s (g' - x^ mean(g' x^)), x^ = s x, g' = g (w + offset); dw, if there is one, += g x^.
INLINE void norm_row_back(const void *g, const void *x, const void *w, void *dx, float *dw, float scale, long d, float offset,
                          int wide) {
    __m512 sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale), more = _mm512_set1_ps(offset);
    for (long j = 0; j < d; j += 16) {
        __mmask16 m = until(d - j);
        __m512 given = get(g, j, m, wide), v = _mm512_mul_ps(get(x, j, m, wide), by);
        if (dw) _mm512_mask_storeu_ps(dw + j, m, _mm512_fmadd_ps(given, v, _mm512_maskz_loadu_ps(m, dw + j)));
        sum = _mm512_fmadd_ps(_mm512_mul_ps(given, _mm512_add_ps(get(w, j, m, wide), more)), v, sum);
    }
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / d);
    for (long j = 0; j < d; j += 16) {
        __mmask16 m = until(d - j);
        __m512 given = _mm512_mul_ps(get(g, j, m, wide), _mm512_add_ps(get(w, j, m, wide), more));
        __m512 v = _mm512_mul_ps(get(x, j, m, wide), by);
        put(dx, j, m, wide, _mm512_mul_ps(by, _mm512_fnmadd_ps(v, mean, given)));
    }
}

// dw: (threads, d) zeros, of which the sum is the gradient; or null.
void norm_backward(const void *g, const void *x, const void *w, const float *scale, void *dx, float *dw, long rows, long d,
                   float offset, long wide, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        for (long i = rows * t / threads; i < rows * (t + 1) / threads; i++) {
            long at = i * d * (wide ? 4 : 2);
            float *own = dw ? dw + t * d : 0;
            if (wide) norm_row_back((const char *)g + at, (const char *)x + at, w, (char *)dx + at, own, scale[i], d, offset, 1);
            else norm_row_back((const char *)g + at, (const char *)x + at, w, (char *)dx + at, own, scale[i], d, offset, 0);
        }
}

// Gated.

INLINE __m512 slope(__m512 a, int tanh) {              // dz / da
    if (!tanh) return _mm512_set1_ps(1.f);
    return _mm512_fmadd_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(3 * TANH_B), _mm512_set1_ps(TANH_A));
}

INLINE void gated_part_back(const void *g, const void *a, const void *b, void *da, void *db, long from, long to, int tanh, int wide) {
    for (long j = from; j < to; j += 16) {
        __mmask16 m = until(to - j);
        __m512 given = get(g, j, m, wide), v = get(a, j, m, wide), s = sigmoid(inside(v, tanh)), one = _mm512_set1_ps(1.f);
        __m512 act = _mm512_mul_ps(v, s);
        __m512 turn = _mm512_fmadd_ps(_mm512_mul_ps(act, _mm512_sub_ps(one, s)), slope(v, tanh), s);     // act'(a)
        put(da, j, m, wide, _mm512_mul_ps(_mm512_mul_ps(given, get(b, j, m, wide)), turn));
        put(db, j, m, wide, _mm512_mul_ps(given, act));
    }
}

#define PART 4096                                      // numbers a task: its reads and writes stay in the first cache
#define EACH(call_wide, call)                                                                                                      \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (long from = 0; from < n; from += PART) {                \
        long to = from + PART < n ? from + PART : n;                                                                               \
        if (wide) call_wide; else call;                                                                                            \
    }

void gated_forward(const void *a, const void *b, void *y, long n, long tanh, long wide, long threads) {
    if (tanh) EACH(gated_part(a, b, y, from, to, 1, 1), gated_part(a, b, y, from, to, 1, 0))
    else EACH(gated_part(a, b, y, from, to, 0, 1), gated_part(a, b, y, from, to, 0, 0))
}

void gated_backward(const void *g, const void *a, const void *b, void *da, void *db, long n, long tanh, long wide, long threads) {
    if (tanh) EACH(gated_part_back(g, a, b, da, db, from, to, 1, 1), gated_part_back(g, a, b, da, db, from, to, 1, 0))
    else EACH(gated_part_back(g, a, b, da, db, from, to, 0, 1), gated_part_back(g, a, b, da, db, from, to, 0, 0))
}

// x, y: (rows, tokens, heads, d) by strides of rows, tokens and heads, in numbers; cos, sin: (rows or 1, tokens, d), contiguous.
void rotary(const void *x, const void *cos, const void *sin, void *y, const long *shape, const long *from, const long *to,
            long angle_row, long back, long wide, long wide_angle, long wide_out, long threads) {
    long rows = shape[0], tokens = shape[1], heads = shape[2], d = shape[3];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows * tokens; i++) {
        long row = i / tokens, token = i % tokens, angle = (row * angle_row + token * d) * (wide_angle ? 4 : 2);
        const char *c = (const char *)cos + angle, *s = (const char *)sin + angle;
        for (long h = 0; h < heads; h++) {
            const char *a = (const char *)x + (row * from[0] + token * from[1] + h * from[2]) * (wide ? 4 : 2);
            char *b = (char *)y + (row * to[0] + token * to[1] + h * to[2]) * (wide_out ? 4 : 2);
            if (!wide && !wide_angle && !wide_out) turn_head(a, c, s, b, d / 2, back, 0, 0, 0);
            else turn_head(a, c, s, b, d / 2, back, wide, wide_angle, wide_out);
        }
    }
}

// Cross-entropy of rows of logits (rows, n): losses in nats; if `back`, each row becomes its gradient, softmax less the target's one.

static float loss_row(bf16 *x, long n, long target, int back) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long j = 0; j < n; j += 16)
        most = _mm512_mask_max_ps(most, until(n - j), most, get(x, j, until(n - j), 0));
    float top = _mm512_reduce_max_ps(most), own = _mm512_cvtss_f32(get(x, target, 1, 0));
    __m512 less = _mm512_set1_ps(top);
    for (long j = 0; j < n; j += 16)
        sum = _mm512_mask_add_ps(sum, until(n - j), sum, exponential(_mm512_sub_ps(get(x, j, until(n - j), 0), less)));
    float all = _mm512_reduce_add_ps(sum);
    if (back) {
        __m512 by = _mm512_set1_ps(1.f / all);
        for (long j = 0; j < n; j += 16)
            put(x, j, until(n - j), 0, _mm512_mul_ps(exponential(_mm512_sub_ps(get(x, j, until(n - j), 0), less)), by));
        put(x, target, 1, 0, _mm512_set1_ps(expf(own - top) / all - 1.f));
    }
    return logf(all) + top - own;
}

void head_losses(bf16 *logits, const int64_t *targets, float *losses, long rows, long n, long back, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) losses[i] = loss_row(logits + i * n, n, targets[i], back);
}
