// The passes over activations, a row at a time. Numbers are bfloat16 or float32 (`wide`), sums and what lies between a load and a
// store float32.
#pragma once
#include "vectors.h"

INLINE __m512 get(const void *at, long i, __mmask16 m, int wide) {
    if (wide) return _mm512_maskz_loadu_ps(m, (const float *)at + i);
    return widened(_mm256_maskz_loadu_epi16(m, (const bf16 *)at + i));
}

INLINE void put(void *at, long i, __mmask16 m, int wide, __m512 x) {
    if (wide) _mm512_mask_storeu_ps((float *)at + i, m, x);
    else _mm256_mask_storeu_epi16((bf16 *)at + i, m, rounded(x));
}

INLINE __m512 as_stored(__m512 x, int wide) { return wide ? x : widened(rounded(x)); }

// RMS norm. y = x / rms(x) (w + offset), x / rms(x) rounded before the product if `inner`. scale: (rows,), 1 / rms.

INLINE void norm_row(const void *x, const void *w, void *y, float *scale, long d, float eps, float offset, int inner, int wide) {
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < d; j += 16) {
        __m512 v = get(x, j, until(d - j), wide);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    *scale = 1.f / sqrtf(_mm512_reduce_add_ps(sum) / d + eps);
    __m512 by = _mm512_set1_ps(*scale), more = _mm512_set1_ps(offset);
    for (long j = 0; j < d; j += 16) {
        __mmask16 m = until(d - j);
        __m512 v = _mm512_mul_ps(get(x, j, m, wide), by);
        if (inner) v = as_stored(v, wide);
        put(y, j, m, wide, _mm512_mul_ps(v, _mm512_add_ps(get(w, j, m, wide), more)));
    }
}

// Gated: act(a) b, act(a) = a / (1 + e^-z). z = a is SiLU; z = 2 sqrt(2 / pi) (a + 0.044715 a^3) is GELU by tanh.

INLINE __m512 sigmoid(__m512 z) {
    __m512 e = power(_mm512_or_ps(z, _mm512_set1_ps(-0.f)), -87.f);                          // e^-|z|
    __m512 top = _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ), _mm512_set1_ps(1.f));
    return _mm512_div_ps(top, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

#define TANH_A 1.5957691216057308f                     // 2 sqrt(2 / pi)
#define TANH_B 0.07135481282553f                       // the same times 0.044715

INLINE __m512 inside(__m512 a, int tanh) {
    if (!tanh) return a;
    return _mm512_mul_ps(a, _mm512_fmadd_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(TANH_B), _mm512_set1_ps(TANH_A)));
}

INLINE void gated_part(const void *a, const void *b, void *y, long from, long to, int tanh, int wide) {
    for (long j = from; j < to; j += 16) {
        __mmask16 m = until(to - j);
        __m512 v = get(a, j, m, wide);
        put(y, j, m, wide, _mm512_mul_ps(_mm512_mul_ps(v, sigmoid(inside(v, tanh))), get(b, j, m, wide)));
    }
}

// Rotary: pairs (x[j], x[j + d / 2]) turned by their position's angle. Backward turns the other way. d / 2: a multiple of 16.
INLINE void turn_head(const void *x, const void *cos, const void *sin, void *y, long half, int back, int wide, int wide_angle,
                      int wide_out) {
    for (long j = 0; j < half; j += 16) {
        __mmask16 m = until(half - j);
        __m512 low = get(x, j, m, wide), high = get(x, half + j, m, wide);
        __m512 c0 = get(cos, j, m, wide_angle), c1 = get(cos, half + j, m, wide_angle);
        __m512 s0 = get(sin, j, m, wide_angle), s1 = get(sin, half + j, m, wide_angle);
        if (back) {
            put(y, j, m, wide_out, _mm512_fmadd_ps(high, s1, _mm512_mul_ps(low, c0)));
            put(y, half + j, m, wide_out, _mm512_fnmadd_ps(low, s0, _mm512_mul_ps(high, c1)));
        } else {
            put(y, j, m, wide_out, _mm512_fnmadd_ps(high, s0, _mm512_mul_ps(low, c0)));
            put(y, half + j, m, wide_out, _mm512_fmadd_ps(low, s1, _mm512_mul_ps(high, c1)));
        }
    }
}
