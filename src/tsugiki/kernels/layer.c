// A decoder layer for one new token a row, in one call: layer.py says what is computed and where it stands in for the layer's own
// modules. Every intermediate is rounded to bfloat16 where the modules would.
#include "rows.h"
#include "passes.h"

typedef struct { const bf16 *w; double eps, offset; long inner; } Norm;                     // w null: there is none
// A weight (n, k) as rows.h lays it out, its bias or null, and each row's own low-rank change, as own_low_rank takes it, if rank > 0.
typedef struct { const uint32_t *w; const bf16 *bias; long n, k; const bf16 *a, *b, *scale; const int64_t *place; long rank; } Linear;
typedef struct { Norm first, second, query, key; Linear q, k, v, o, gate, up, down; long heads, kv_heads, d, tanh; double scale; } Layer;

static void normed(const Norm *norm, const bf16 *x, bf16 *y, long d) {
    float scale;
    norm_row(x, norm->w, y, &scale, d, norm->eps, norm->offset, norm->inner, 0);
}

static void times(const Linear *l, const bf16 *x, bf16 *y, long to, long m, long own, long threads) {
    product_part(x, l->w, l->bias, y, to, m, l->n, l->k, own, threads);
}

static void change(const Linear *l, const bf16 *x, bf16 *y, long row) {
    if (!l->rank || l->place[row] < 0) return;
    long at = l->place[row] * l->rank;
    own_row(x + row * l->k, y, l->a + at * l->k, l->b + at * l->n, l->scale + at, y, l->k, l->n, l->rank);
}

static void add(const bf16 *x, const bf16 *y, bf16 *to, long d) {
    for (long j = 0; j < d; j += 16) put(to, j, until(d - j), 0, _mm512_add_ps(get(x, j, until(d - j), 0), get(y, j, until(d - j), 0)));
}

static void heads_of(const Norm *norm, bf16 *x, bf16 *to, long step, long heads, const bf16 *cos, const bf16 *sin, long d) {
    for (long h = 0; h < heads; h++, x += d, to += step) {
        if (norm->w) normed(norm, x, x, d);
        turn_head(x, cos, sin, to, d / 2, 0, 0, 0, 0);
    }
}

// out = the layer's output for x (m, hidden). cos, sin (m or 1, d). k, v: the cache's columns up to the new one, which is written here;
// seen, by: as one_token takes them. room: for what
// lies between, as layer.py counts it. Returns 0, or 1 if memory ran out.
int layer_step(const Layer *l, const bf16 *x, bf16 *out, const bf16 *cos, const bf16 *sin, long angle_row, bf16 *k, bf16 *v,
               const uint8_t *seen, const long *by, long m, long length, char *room, long threads) {
    long hidden = l->q.k, d = l->d, group = l->heads / l->kv_heads, qn = l->q.n, kn = l->k.n, vn = l->v.n, wide = l->gate.n;
    int failed = 0;
    bf16 *at = (bf16 *)(((long)room + 63) / 64 * 64);
    bf16 *normal = at, *mid = normal + m * hidden, *made = mid + m * hidden, *q = made + m * hidden, *keys = q + m * qn;
    bf16 *values = keys + m * kn, *seen_by = values + m * vn, *gate = seen_by + m * l->o.k, *up = gate + m * wide;
    long last = length - 1, own_by[9] = {qn, d, by[2], by[3], by[4], by[5], by[6], by[7], by[8]};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long own = omp_get_thread_num(), all = omp_get_num_threads();
        float *s = aligned_alloc(64, 4 * group * ((length + 15) / 16 * 16 + d));
        if (!s) failed = 1;
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) normed(&l->first, x + i * hidden, normal + i * hidden, hidden);
        times(&l->q, normal, q, qn, m, own, all);
        times(&l->k, normal, keys, kn, m, own, all);
        times(&l->v, normal, values, vn, m, own, all);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            const bf16 *c = cos + i * angle_row, *z = sin + i * angle_row;
            bf16 *new = values + i * vn, *to = v + i * by[5] + last * by[7];
            change(&l->q, normal, q + i * qn, i), change(&l->k, normal, keys + i * kn, i), change(&l->v, normal, new, i);
            heads_of(&l->query, q + i * qn, q + i * qn, d, l->heads, c, z, d);
            heads_of(&l->key, keys + i * kn, k + i * by[2] + last * by[4], by[3], l->kv_heads, c, z, d);
            for (long h = 0; h < l->kv_heads; h++) memcpy(to + h * by[6], new + h * d, 2 * d);
        }
#pragma omp for schedule(static)
        for (long task = 0; task < m * l->kv_heads; task++)
            if (s) attend(q, k, v, seen, seen_by, own_by, task, l->kv_heads, group, length, d, l->scale, s);
        free(s);
        times(&l->o, seen_by, made, hidden, m, own, all);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            change(&l->o, seen_by, made + i * hidden, i);
            add(x + i * hidden, made + i * hidden, mid + i * hidden, hidden);
            normed(&l->second, mid + i * hidden, normal + i * hidden, hidden);
        }
        times(&l->gate, normal, gate, wide, m, own, all);
        times(&l->up, normal, up, wide, m, own, all);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            bf16 *a = gate + i * wide, *b = up + i * wide;
            change(&l->gate, normal, a, i), change(&l->up, normal, b, i);
            if (l->tanh) gated_part(a, b, a, 0, wide, 1, 0); else gated_part(a, b, a, 0, wide, 0, 0);
        }
        times(&l->down, gate, made, hidden, m, own, all);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < m; i++) {
            change(&l->down, gate, made + i * hidden, i);
            add(mid + i * hidden, made + i * hidden, out + i * hidden, hidden);
        }
    }
    return failed;
}
