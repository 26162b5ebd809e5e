// What documents.c and passes.c share: sixteen numbers at a time, in float32 between a load and a store.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))

INLINE __mmask16 until(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

INLINE __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// e^x for x <= 0, to float32's rounding, and never less than e^least: of smaller ones quotients would not be normal numbers, and
// processors are slow with those. Not a number stays none.
INLINE __m512 power(__m512 x, float least) {
    x = _mm512_max_ps(_mm512_set1_ps(least), x);       // the second operand where there is no order
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), n = _mm512_roundscale_ps(t, 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    const float c[] = {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f};
    p = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), f, p);
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
}

// As a share of a sum over a vocabulary.
INLINE __m512 exponential(__m512 x) { return power(x, -70.f); }
