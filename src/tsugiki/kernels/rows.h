// Decoding, one new token a row: products with a weight that was laid out beforehand, attention to what was before, each row's own
// low-rank change. All wait for memory, so each number is read once, in order, and fetched before it is needed.
#pragma once
#include "tiles.h"
#include <omp.h>

#define AHEAD 4096                                     // bytes of the weight fetched before they are needed

#ifdef __AMX_BF16__
typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } Tiles;

// Tiles for `count` rows, at most 32: 4 and 5 hold them, 0 to 3 what is summed, 6 and 7 the weight.
static void tiles_for(long count) {
    uint8_t upper = count < 16 ? count : 16, lower = count > 16 ? count - 16 : 16;
    Tiles t = {.palette = 1, .rows = {upper, upper, lower, lower, upper, lower, 16, 16}};
    for (int i = 0; i < 8; i++) t.bytes[i] = 64;
    _tile_loadconfig(&t);
}

// 32 rows of the weight times `count` rows of x: c[half][row][16].
static void block(const bf16 *x, long count, const uint32_t *w, long k, float c[2][32][16]) {
    int below = count > 16;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long l = 0; l < k; l += 32, w += 512) {
        for (int p = 0; p < 2048; p += 64) _mm_prefetch((const char *)w + AHEAD + p, _MM_HINT_T0);
        _tile_loadd(6, w, 64); _tile_loadd(7, w + 256, 64); _tile_loadd(4, x + l, k * 2);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        if (below) { _tile_loadd(5, x + 16 * k + l, k * 2); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
    }
    _tile_stored(0, c[0], 64); _tile_stored(1, c[1], 64);
    if (below) { _tile_stored(2, c[0][16], 64); _tile_stored(3, c[1][16], 64); }
}
#else
static void tiles_for(long count) {}

static void block(const bf16 *x, long count, const uint32_t *w, long k, float c[2][32][16]) {
    for (long i = 0; i < count; i += 8) {
        __m512 sum[8][2];
        for (long r = 0; r < 8; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (long l = 0; l < k; l += 2) {
            const uint32_t *at = w + l / 32 * 512 + l % 32 * 8;
            if (!i) _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0), _mm_prefetch((const char *)(at + 256) + AHEAD, _MM_HINT_T0);
            __m512bh b0 = (__m512bh)_mm512_loadu_si512(at), b1 = (__m512bh)_mm512_loadu_si512(at + 256);
#pragma GCC unroll 8
            for (long r = 0; r < 8; r++) {
                int pair;
                memcpy(&pair, x + (i + r < count ? i + r : i) * k + l, 4);
                __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, b0), sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, b1);
            }
        }
        for (long r = 0; r < 8 && i + r < count; r++)
            for (int half = 0; half < 2; half++) _mm512_storeu_ps(c[half][i + r], sum[r][half]);
    }
}
#endif

// Columns of y (m, n), whose rows are `to` apart, = x (m, k) w^T + bias: those of thread `own`. w laid out as above; bias (n,) or null.
static void product_part(const bf16 *x, const uint32_t *w, const bf16 *bias, bf16 *y, long to, long m, long n, long k, long own, long threads) {
    long blocks = (n + 31) / 32, set = 0;
    float c[2][32][16];
    for (long b = blocks * own / threads; b < blocks * (own + 1) / threads; b++)
        for (long i = 0; i < m; i += 32) {
            long count = m - i < 32 ? m - i : 32;
            if (count != set) tiles_for(set = count);
            block(x + i * k, count, w + b * k * 16, k, c);
            for (int half = 0; half < 2; half++) {
                long j = b * 32 + half * 16;
                __mmask16 there = until(n - j);
                __m512 more = bias ? widened(_mm256_maskz_loadu_epi16(there, bias + j)) : _mm512_setzero_ps();
                for (long r = 0; r < count; r++)
                    _mm256_mask_storeu_epi16(y + (i + r) * to + j, there, rounded(_mm512_add_ps(_mm512_loadu_ps(c[half][r]), more)));
            }
        }
    tiles_off();
}


#define NEXT 16                                        // tokens whose keys and values are fetched before they are needed

// The sums of sixteen vectors.
INLINE __m512 sums(__m512 v[16]) {
    for (int i = 0; i < 8; i++) v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int n = 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return v[0];
}

// Scores of `count` queries, with a stride, and the keys of one head: s[i * room + t], beyond length those of its last key. d: a
// multiple of 32.
static void scores(const bf16 *q, long q_head, long count, const bf16 *key, long k_token, long length, long d, float scale, float *s,
                   long room) {
    __m512 by = _mm512_set1_ps(scale);
    for (long t = 0; t < length; t += 16)
        for (long i = 0; i < count; i++) {
            __m512 sum[16];
#pragma GCC unroll 16
            for (int u = 0; u < 16; u++) {
                const bf16 *at = key + (t + u < length ? t + u : length - 1) * k_token;
                for (long j = 0; !i && j < d; j += 32) _mm_prefetch((const char *)(at + NEXT * k_token + j), _MM_HINT_T0);
                sum[u] = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (long j = 0; j < d; j += 32)
                    sum[u] = _mm512_dpbf16_ps(sum[u], (__m512bh)_mm512_loadu_si512(q + i * q_head + j), (__m512bh)_mm512_loadu_si512(at + j));
            }
            _mm512_storeu_ps(s + i * room + t, _mm512_mul_ps(sums(sum), by));
        }
}

// Softmax over the tokens that are seen (null: all), zeros elsewhere; up to a multiple of 16.
static void weights_of(float *s, const uint8_t *seen, long length) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long t = 0; t < length; t += 16) {
        __mmask16 m = until(length - t);
        if (seen) m &= _mm_test_epi8_mask(_mm_maskz_loadu_epi8(m, seen + t), _mm_set1_epi8(-1));
        __m512 x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), m, _mm512_loadu_ps(s + t));
        most = _mm512_max_ps(x, most);                 // the second operand where there is no order: sums find what is no number
        _mm512_storeu_ps(s + t, x);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), none = _mm512_set1_ps(-INFINITY);
    for (long t = 0; t < length; t += 16) {
        __m512 x = _mm512_loadu_ps(s + t);
        __m512 e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, none, _CMP_NEQ_UQ), exponential(_mm512_sub_ps(x, top)));
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(s + t, e);
    }
    __m512 by = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum));
    for (long t = 0; t < length; t += 16) _mm512_storeu_ps(s + t, _mm512_mul_ps(_mm512_loadu_ps(s + t), by));
}

#define TOGETHER 8                                     // tokens whose values are added at once
// out (count, d) in float32 = weights (count, room) times values; weights beyond length are zeros. What is not seen is not read.
static void values_of(const float *s, long room, long count, const bf16 *value, long v_token, const uint8_t *seen, long length, long d,
                      float *out) {
    memset(out, 0, 4 * count * d);
    for (long t = 0; t < length; t += TOGETHER, value += TOGETHER * v_token)
        for (long j = 0; j < d; j += 16) {
            __m512 v[TOGETHER];
            if (!(j % 32)) for (long u = 0; u < TOGETHER; u++) _mm_prefetch((const char *)(value + (NEXT + u) * v_token + j), _MM_HINT_T0);
            for (long u = 0; u < TOGETHER; u++)
                v[u] = t + u < length && (!seen || seen[t + u]) ? widened(_mm256_loadu_si256((const void *)(value + u * v_token + j))) : _mm512_setzero_ps();
            for (long i = 0; i < count; i++) {
                __m512 sum = _mm512_loadu_ps(out + i * d + j);
                for (long u = 0; u < TOGETHER; u++) sum = _mm512_fmadd_ps(_mm512_set1_ps(s[i * room + t + u]), v[u], sum);
                _mm512_storeu_ps(out + i * d + j, sum);
            }
        }
}

// A task of attention: a row and one of its key heads. Arrays as in one_token; s: room for group * (room + d) numbers.
static void attend(const bf16 *q, const bf16 *k, const bf16 *v, const uint8_t *seen, bf16 *out, const long *by, long task, long kv_heads,
                   long group, long length, long d, float scale, float *s) {
    long row = task / kv_heads, head = task % kv_heads, room = (length + 15) / 16 * 16;
    seen = seen ? seen + row * by[8] : 0;
    scores(q + row * by[0] + head * group * by[1], by[1], group, k + row * by[2] + head * by[3], by[4], length, d, scale, s, room);
    for (long i = 0; i < group; i++) weights_of(s + i * room, seen, length);
    float *sum = s + group * room;
    values_of(s, room, group, v + row * by[5] + head * by[6], by[7], seen, length, d, sum);
    for (long j = 0; j < group * d; j += 16) _mm256_storeu_si256((void *)(out + task * group * d + j), rounded(_mm512_loadu_ps(sum + j)));
}

// Each row's own low-rank change. a, b: (adapters * rank, in) and (.., out), scale: (adapters * rank,); row i has adapter
// place[i], or none if that is below 0. out = y + sum over its rank of round(s a x) b.
static void own_row(const bf16 *x, const bf16 *y, const bf16 *a, const bf16 *b, const bf16 *scale, bf16 *out, long in, long n, long rank) {
    __m512 low[64];
    for (long r = 0; r < rank; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (long j = 0; j < in; j += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + j), (__m512bh)_mm512_loadu_si512(a + r * in + j));
        __m512 by = widened(_mm256_set1_epi16((short)scale[r]));
        low[r] = widened(rounded(_mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), by)));
    }
    for (long j = 0; j < n; j += 16) {
        __m512 sum = widened(_mm256_loadu_si256((const void *)(y + j)));
        for (long r = 0; r < rank; r++) sum = _mm512_fmadd_ps(low[r], widened(_mm256_loadu_si256((const void *)(b + r * n + j))), sum);
        _mm256_storeu_si256((void *)(out + j), rounded(sum));
    }
}
