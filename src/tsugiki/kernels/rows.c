// What rows.py, one_token.py and low_rank.py call for decoding; they say what is computed.
#include "rows.h"

// A weight (n, k) as blocks of 32 of its rows, [n / 32][k / 32][2][16 pairs][16 rows], zeros beyond n. k: a multiple of 32.
void rows_lay_out(const bf16 *w, uint32_t *to, long n, long k, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < n; j += 16)
        for (long l = 0; l < k; l += 32) {
            bf16 part[16 * 32] = {0};
            for (long r = 0; r < 16 && j + r < n; r++) memcpy(part + 32 * r, w + (j + r) * k + l, 64);
            turn16((const uint32_t *)part, 16, to + j / 32 * k * 16 + l * 16 + j % 32 * 16, 16);
        }
}

void rows_product(const bf16 *x, const uint32_t *w, const bf16 *bias, bf16 *y, long m, long n, long k, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (long own = 0; own < threads; own++) product_part(x, w, bias, y, n, m, n, k, own, threads);
}

// q (rows, heads, d), k and v (rows, kv heads, length, d), seen (rows, length) or null, out (rows, heads, d) contiguous. `by`: strides,
// in numbers: q's of row and head; k's and v's of row, head and token; seen's of row. Returns 0, or 1 if memory ran out.
int one_token(const bf16 *q, const bf16 *k, const bf16 *v, const uint8_t *seen, bf16 *out, const long *by, long rows, long kv_heads,
              long group, long length, long d, float scale, long threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *s = aligned_alloc(64, 4 * group * ((length + 15) / 16 * 16 + d));
        if (!s) failed = 1;
#pragma omp for schedule(static)
        for (long task = 0; task < rows * kv_heads; task++)
            if (s) attend(q, k, v, seen, out, by, task, kv_heads, group, length, d, scale, s);
        free(s);
    }
    return failed;
}

void own_low_rank(const bf16 *x, const bf16 *y, const bf16 *a, const bf16 *b, const bf16 *scale, const int64_t *place, bf16 *out,
                  long rows, long in, long n, long rank, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long i = 0; i < rows; i++) {
        long at = place[i] * rank;
        if (place[i] < 0) memcpy(out + i * n, y + i * n, 2 * n);
        else own_row(x + i * in, y + i * n, a + at * in, b + at * n, scale + at, out + i * n, in, n, rank);
    }
}
