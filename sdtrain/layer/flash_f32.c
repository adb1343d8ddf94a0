// Attention and its gradients in float32 over blocks whose scores do not leave the first cache: flash attention
// (Dao et al. 2022, algorithms 1 and 4) in the vectors of AVX-512. Built by kernels.py, called by flash.py; where there
// is no AVX-512 it says so.

#include <stdint.h>

typedef int64_t size;

#if defined(__AVX512F__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, ROWS = 16, SIDE = 32, KEYS = 256 }; // of a vector, of a product; of a block; keys on the way there

int flash_f32_is_here(void) { return 1; }

static inline size whole(size length) { return (length + SIDE - 1) / SIDE * SIDE; }

static inline float *room(size numbers) { return aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64); }

// 2^x to 2e-7 of it. What is below 2^-100 is 2^-100: no denormals. NaN stays NaN.
static inline __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-100.f), x);
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.327647198e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.675541334e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550713274e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402211972e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469671e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.000000072f));
  return _mm512_scalef_ps(p, n);
}

// to (16 / vectors rows of vectors, `to_row` apart) = left right, added to what is there if `add`: left (rows, depth),
// its numbers `row` and `column` apart, right (depth, vectors), `right_row` apart. 16 registers hold the sums.
static inline __attribute__((always_inline)) void tile(float *to, size to_row, const float *left, size row, size column,
                                                       const float *right, size right_row, size depth,
                                                       const int vectors, const int add) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    sum[i] = add ? _mm512_loadu_ps(to + i / vectors * to_row + i % vectors * LANES) : _mm512_setzero_ps();
  for (size j = 0; j < depth; j++) {
    const __m512 first = _mm512_loadu_ps(right + j * right_row);
    const __m512 last = _mm512_loadu_ps(right + j * right_row + (vectors - 1) * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const __m512 number = _mm512_set1_ps(left[i / vectors * row + j * column]);
      sum[i] = _mm512_fmadd_ps(number, i % vectors ? last : first, sum[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i / vectors * to_row + i % vectors * LANES, sum[i]);
}

// to (rows, 32), `to_row` apart, = left (rows, d) right (d, 32).
static inline void scores(float *to, size to_row, const float *left, const float *right, size rows, size d) {
  for (size r = 0; r < rows; r += 8) tile(to + r * to_row, to_row, left + r * d, d, 1, right, SIDE, d, 2, 0);
}

// to (16, d) += left (16, depth), its numbers `row` and `column` apart, right (depth, d).
static inline __attribute__((always_inline)) void add_product(float *to, const float *left, size row, size column,
                                                              const float *right, size depth, size d) {
  size c = 0;
  for (; c + 2 * LANES <= d; c += 2 * LANES)
    for (size r = 0; r < ROWS; r += 8) tile(to + r * d + c, d, left + r * row, row, column, right + c, d, depth, 2, 1);
  if (c < d) tile(to + c, d, left, row, column, right + c, d, depth, 1, 1);
}

// x (l, d), rows `step` apart, times a factor -> (l up to a whole block, d), zeros beyond.
static void pack(float *to, const float *x, size step, size l, size d, float factor) {
  for (size i = 0; i < l; i++)
    for (size c = 0; c < d; c++) to[i * d + c] = x[i * step + c] * factor;
  memset(to + l * d, 0, (whole(l) - l) * d * sizeof(float));
}

// Turned in blocks of 32 rows: (l / 32, d, 32), zeros beyond.
static void turn(float *to, const float *x, size step, size l, size d) {
  for (size i = 0; i < whole(l); i += SIDE)
    for (size c = 0; c < d; c++)
      for (size b = 0; b < SIDE; b++) to[i * d + c * SIDE + b] = i + b < l ? x[(i + b) * step + c] : 0;
}

static const float LOG2_E = 1.44269504f;

struct forward { // of one thread: k turned, v packed, 16 queries, their scores with KEYS keys, what is attended to
  float *k, *v, *q, *s, *out;
};

static void attend(struct forward *t, const float *q, const float *k, const float *v, float *y, float *logsum,
                   size step, size l, size m, size d, float scale) {
  turn(t->k, k, step, m, d), pack(t->v, v, step, m, d, 1);
  for (size j = 0; j < l; j += ROWS) {
    const size queries = l - j < ROWS ? l - j : ROWS;
    float top[ROWS];
    __m512 sum[ROWS];
    pack(t->q, q + j * step, step, queries, d, scale * LOG2_E);
    memset(t->out, 0, ROWS * d * sizeof(float));
    for (size b = 0; b < ROWS; b++) top[b] = -INFINITY, sum[b] = _mm512_setzero_ps();
    for (size i = 0; i < m; i += KEYS) {
      const size keys = m - i < KEYS ? m - i : KEYS, vectors = (keys + LANES - 1) / LANES;
      for (size a = 0; a < keys; a += SIDE) scores(t->s + a, KEYS, t->q, t->k + (i + a) * d, ROWS, d);
      for (size b = 0; b < queries; b++) {
        float *s = t->s + b * KEYS;
        for (size a = keys; a < vectors * LANES; a++) s[a] = -INFINITY;
        __m512 tops = _mm512_set1_ps(top[b]), total = _mm512_setzero_ps();
        for (size a = 0; a < vectors; a++) tops = _mm512_max_ps(tops, _mm512_load_ps(s + a * LANES));
        const float most = _mm512_reduce_max_ps(tops);
        const __m512 kept = power(_mm512_set1_ps(top[b] - most));
        for (size a = 0; a < vectors; a++) {
          const __m512 p = power(_mm512_sub_ps(_mm512_load_ps(s + a * LANES), _mm512_set1_ps(most)));
          total = _mm512_add_ps(total, p);
          _mm512_store_ps(s + a * LANES, p);
        }
        sum[b] = _mm512_fmadd_ps(sum[b], kept, total), top[b] = most;
        for (size c = b * d; i && c < (b + 1) * d; c += LANES)
          _mm512_store_ps(t->out + c, _mm512_mul_ps(_mm512_load_ps(t->out + c), kept));
      }
      add_product(t->out, t->s, KEYS, 1, t->v + i * d, keys, d);
    }
    for (size b = 0; b < queries; b++) {
      const float total = _mm512_reduce_add_ps(sum[b]);
      logsum[j + b] = top[b] / LOG2_E + logf(total);
      for (size c = 0; c < d; c++) y[(j + b) * step + c] = t->out[b * d + c] / total;
    }
  }
}

struct backward { // of one thread; delta = dy . y (l); zeros beyond
  float *k, *k_turned, *v_turned, *q, *dy, *dq, *logsum, *delta;
};

static void differentiate(struct backward *t, const float *q, const float *k, const float *v, const float *dy,
                          const float *y, const float *logsum, float *dq, float *dk, float *dv, size step, size l,
                          size m, size d, float scale) {
  _Alignas(64) float p[SIDE * SIDE], g[SIDE * SIDE], dks[SIDE * d], dvs[SIDE * d];
  pack(t->k, k, step, m, d, scale), turn(t->k_turned, k, step, m, d), turn(t->v_turned, v, step, m, d);
  pack(t->q, q, step, l, d, scale * LOG2_E), pack(t->dy, dy, step, l, d, 1);
  memset(t->dq, 0, whole(l) * d * sizeof(float));
  for (size j = 0; j < whole(l); j++) {
    float sum = 0;
    for (size c = 0; c < d && j < l; c++) sum += dy[j * step + c] * y[j * step + c];
    t->delta[j] = sum, t->logsum[j] = j < l ? logsum[j] * LOG2_E : 0;
  }
  for (size i = 0; i < m; i += SIDE) { // keys
    const size keys = m - i < SIDE ? m - i : SIDE;
    memset(dks, 0, sizeof dks), memset(dvs, 0, sizeof dvs);
    for (size j = 0; j < l; j += SIDE) { // queries
      scores(p, SIDE, t->q + j * d, t->k_turned + i * d, SIDE, d);
      scores(g, SIDE, t->dy + j * d, t->v_turned + i * d, SIDE, d);
      for (size b = 0; b < SIDE; b++) {
        const __m512 top = _mm512_set1_ps(t->logsum[j + b]), mean = _mm512_set1_ps(t->delta[j + b]);
        for (size a = 0; a < SIDE; a += LANES) {
          float *score = p + b * SIDE + a, *slope = g + b * SIDE + a;
          const __mmask16 is_key = keys - a >= LANES ? 0xffff : keys > a ? (1 << (keys - a)) - 1 : 0;
          const __m512 share = _mm512_maskz_mov_ps(is_key, power(_mm512_sub_ps(_mm512_load_ps(score), top)));
          _mm512_store_ps(score, share);
          _mm512_store_ps(slope, _mm512_mul_ps(share, _mm512_sub_ps(_mm512_load_ps(slope), mean)));
        }
      }
      for (size a = 0; a < SIDE; a += ROWS) {
        add_product(dvs + a * d, p + a, 1, SIDE, t->dy + j * d, SIDE, d);
        add_product(dks + a * d, g + a, 1, SIDE, t->q + j * d, SIDE, d);
        add_product(t->dq + (j + a) * d, g + a * SIDE, SIDE, 1, t->k + i * d, SIDE, d);
      }
    }
    for (size a = 0; a < keys; a++)
      for (size c = 0; c < d; c++)
        dk[(i + a) * step + c] = dks[a * d + c] / LOG2_E, dv[(i + a) * step + c] = dvs[a * d + c];
  }
  for (size j = 0; j < l; j++) memcpy(dq + j * step, t->dq + j * d, d * sizeof(float));
}

// y = softmax(scale q k^T) v: q, y (n, l, heads, d), k, v (n, m, heads, d), logsum of the scaled scores
// (n, heads, l); d a multiple of 16.
void flash_f32_forward(const float *q, const float *k, const float *v, float *y, float *logsum, size n, size heads,
                       size l, size m, size d, float scale, int threads) {
  const size step = heads * d;
  _Pragma("omp parallel num_threads(threads)") {
    struct forward t = {room(whole(m) * d), room(whole(m) * d), room(SIDE * d), room(ROWS * KEYS), room(ROWS * d)};
    _Pragma("omp for collapse(2)") for (size i = 0; i < n; i++) for (size h = 0; h < heads; h++) {
      const size at_q = i * l * step + h * d, at_k = i * m * step + h * d;
      attend(&t, q + at_q, k + at_k, v + at_k, y + at_q, logsum + (i * heads + h) * l, step, l, m, d, scale);
    }
    free(t.k), free(t.v), free(t.q), free(t.s), free(t.out);
  }
}

// The same sizes; of dq, dk, dv as of q, k, v.
void flash_f32_backward(const float *q, const float *k, const float *v, const float *dy, const float *y,
                        const float *logsum, float *dq, float *dk, float *dv, size n, size heads, size l, size m,
                        size d, float scale, int threads) {
  const size step = heads * d;
  _Pragma("omp parallel num_threads(threads)") {
    struct backward t;
    float **kept[] = {&t.k, &t.k_turned, &t.v_turned, &t.q, &t.dy, &t.dq};
    for (int i = 0; i < 6; i++) *kept[i] = room(whole(i < 3 ? m : l) * d);
    t.logsum = room(whole(l)), t.delta = room(whole(l));
    _Pragma("omp for collapse(2)") for (size i = 0; i < n; i++) for (size h = 0; h < heads; h++) {
      const size at_q = i * l * step + h * d, at_k = i * m * step + h * d;
      differentiate(&t, q + at_q, k + at_k, v + at_k, dy + at_q, y + at_q, logsum + (i * heads + h) * l, dq + at_q,
                    dk + at_k, dv + at_k, step, l, m, d, scale);
    }
    for (int i = 0; i < 6; i++) free(*kept[i]);
    free(t.logsum), free(t.delta);
  }
}

#else

int flash_f32_is_here(void) { return 0; }

#endif
