// Matrix products of bfloat16 with sums in float32, on AMX tiles or, where there are none, AVX512-BF16; what lays numbers out for them.
#pragma once
#include "vectors.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AMX_BF16__
static void tiles_on(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}
static void tiles_off(void) { _tile_release(); }

// C (m, n) = or += A (m, k) B; B holds pairs of its rows as words: (k / 2, n). m and n: multiples of 16, k: of 32.
static void product(int m, int n, int k, const bf16 *a, long lda, const uint32_t *b, long ldb, float *c, long ldc, int add) {
    for (int i = 0; i < m; i += 32)
        for (int j = 0; j < n; j += 32) {
            float *to = c + i * ldc + j;
            int below = m - i > 16, beside = n - j > 16;
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            if (add) {
                _tile_loadd(0, to, ldc * 4);
                if (beside) _tile_loadd(1, to + 16, ldc * 4);
                if (below) _tile_loadd(2, to + 16 * ldc, ldc * 4);
                if (below && beside) _tile_loadd(3, to + 16 * ldc + 16, ldc * 4);
            }
            for (int l = 0; l < k; l += 32) {
                _tile_loadd(4, a + i * lda + l, lda * 2); _tile_loadd(6, b + l / 2 * ldb + j, ldb * 4);
                _tile_dpbf16ps(0, 4, 6);
                if (below) { _tile_loadd(5, a + (i + 16) * lda + l, lda * 2); _tile_dpbf16ps(2, 5, 6); }
                if (beside) { _tile_loadd(7, b + l / 2 * ldb + j + 16, ldb * 4); _tile_dpbf16ps(1, 4, 7); }
                if (below && beside) _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, ldc * 4);
            if (beside) _tile_stored(1, to + 16, ldc * 4);
            if (below) _tile_stored(2, to + 16 * ldc, ldc * 4);
            if (below && beside) _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
        }
}
#else
static void tiles_on(void) {}
static void tiles_off(void) {}

static void product(int m, int n, int k, const bf16 *a, long lda, const uint32_t *b, long ldb, float *c, long ldc, int add) {
    for (int i = 0; i < m; i += 8)
        for (int j = 0; j < n; j += 32) {
            __m512 sum[8][2];
            int halves = n - j > 16 ? 2 : 1, second = 16 * (halves - 1);
            for (int r = 0; r < 8; r++)
                for (int h = 0; h < halves; h++)
                    sum[r][h] = add ? _mm512_loadu_ps(c + (i + r) * ldc + j + 16 * h) : _mm512_setzero_ps();
            for (int l = 0; l < k; l += 2) {
                __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + l / 2 * ldb + j);
                __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + l / 2 * ldb + j + second);
                for (int r = 0; r < 8; r++) {
                    int pair;
                    memcpy(&pair, a + (i + r) * lda + l, 4);
                    __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
                }
            }
            for (int r = 0; r < 8; r++)
                for (int h = 0; h < halves; h++) _mm512_storeu_ps(c + (i + r) * ldc + j + 16 * h, sum[r][h]);
        }
}
#endif

// 16 x 16 words, turned.
static void turn16(const uint32_t *from, long ldf, uint32_t *to, long ldt) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * ldf);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * ldt, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(to + (4 + j) * ldt, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(to + (8 + j) * ldt, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * ldt, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

static void turn(int rows, int words, const void *from, long ldf, void *to, long ldt) {
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < words; j += 16)
            turn16((const uint32_t *)from + i * ldf + j, ldf, (uint32_t *)to + j * ldt + i, ldt);
}

// Two rows of 16 numbers as 16 words, the first row in the lower halves.
static __m512i pair(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Pairs of rows of (rows, wide) as words: (rows / 2, wide).
static void pairs(int rows, int wide, const bf16 *from, long ldf, uint32_t *to, long ldt) {
    for (int i = 0; i < rows; i += 2)
        for (int j = 0; j < wide; j += 16)
            _mm512_storeu_si512(to + i / 2 * ldt + j, pair(_mm256_loadu_si256((const void *)(from + i * ldf + j)),
                                _mm256_loadu_si256((const void *)(from + (i + 1) * ldf + j))));
}
