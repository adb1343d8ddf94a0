// Attention and its gradients over blocks of 32 queries, whose scores do not leave the second cache: flash attention
// (Dao et al. 2022, algorithms 1 and 4) in the matrix tiles of AMX, bfloat16 with float32 sums. Built by kernels.py,
// called by flash.py; where there is no AMX it says so.

#include <stdint.h>

typedef int64_t size;
typedef uint16_t bf16;

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, ROWS = 16 }; // of a block, of a tile

// Linux gives the tiles to a process that asks.
int flash_bf16_is_here(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Eight tiles of 16 rows of 64 bytes.
static const uint8_t config[64] = {1, [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64, [26] = 64, [28] = 64,
                                   [30] = 64, [48 ... 55] = ROWS};

static inline size whole(size length) { return (length + SIDE - 1) / SIDE * SIDE; }

static inline void *room(size bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

// gcc does not know that loading a tile reads memory.
static inline void written(void) { __asm__ volatile("" ::: "memory"); }

// 2^x to 1e-4 of it, where bfloat16 rounds to 4e-3. What is below 2^-100 is 2^-100: no denormals. NaN stays NaN.
static inline __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-100.f), x);
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(5.517166875e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.426111479e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.932609878e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999280720e-1f));
  return _mm512_scalef_ps(p, n);
}

static inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline float wide(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Two rows as a tile's right factor wants them: side by side, number by number.
static inline __m512i paired(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// to (32 x 32) = left right^T over `depth` numbers: left 32 rows of them, right packed by `pack_columns`.
static inline void scores(float (*to)[SIDE], const bf16 *left, const bf16 *right, size depth) {
  written();
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (size c = 0; c < depth; c += SIDE) {
    _tile_loadd(4, left + c, depth * 2);
    _tile_loadd(5, left + ROWS * depth + c, depth * 2);
    _tile_loadd(6, right + c * ROWS, 64);
    _tile_loadd(7, right + (depth + c) * ROWS, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to[0], SIDE * 4); _tile_stored(1, &to[0][ROWS], SIDE * 4);
  _tile_stored(2, to[ROWS], SIDE * 4); _tile_stored(3, &to[ROWS][ROWS], SIDE * 4);
}

// to (16 x 16, rows `step` bytes apart) += left (16 x 32) right (32 x 16, paired).
static inline void add_product(float *to, size step, const bf16 *left, size left_step, const bf16 *right,
                               size right_step) {
  written();
  _tile_loadd(3, to, step);
  _tile_loadd(4, left, left_step);
  _tile_loadd(5, right, right_step);
  _tile_dpbf16ps(3, 4, 5);
  _tile_stored(3, to, step);
}

// x (l, d), rows `step` apart, is packed with zeros beyond its l rows, up to a whole block, and beyond d.

// As it is: (l, depth).
static void pack(bf16 *to, const bf16 *x, size step, size l, size d, size depth) {
  memset(to, 0, whole(l) * depth * sizeof(bf16));
  for (size i = 0; i < l; i++) memcpy(to + i * depth, x + i * step, d * sizeof(bf16));
}

// In blocks of 16 rows, two numbers of each row side by side: (l / 16, depth / 2, 16, 2).
static void pack_columns(bf16 *to, const bf16 *x, size step, size l, size d, size depth) {
  memset(to, 0, whole(l) * depth * sizeof(bf16));
  for (size i = 0; i < l; i++) {
    const bf16 *from = x + i * step;
    bf16 *column = to + i / ROWS * ROWS * depth + i % ROWS * 2;
    for (size j = 0; j < d; j += 2) memcpy(column + j * ROWS, from + j, 2 * sizeof(bf16));
  }
}

// In pairs of rows: (l / 2, d, 2).
static void pack_rows(bf16 *to, const bf16 *x, size step, size l, size d) {
  if (l % SIDE) memset(to + l / 2 * d * 2, 0, (whole(l) - l / 2 * 2) * d * sizeof(bf16));
  for (size i = 0; i < l; i += 2) {
    const bf16 *even = x + i * step, *odd = i + 1 < l ? even + step : even;
    const bf16 last = i + 1 < l ? 0xffff : 0;
    bf16 *pair = to + i * d;
    for (size j = 0; j < d; j++) pair[2 * j] = even[j], pair[2 * j + 1] = odd[j] & last;
  }
}

// Transposed in blocks of 32 rows: (l / 32, d, 32).
static void turn(bf16 *to, const bf16 *x, size step, size l, size d) {
  if (l % SIDE) memset(to + l / SIDE * SIDE * d, 0, SIDE * d * sizeof(bf16));
  for (size i = 0; i < l; i++)
    for (size j = 0; j < d; j++) to[(i / SIDE * d + j) * SIDE + i % SIDE] = x[i * step + j];
}

static const float LOG2_E = 1.44269504f;

struct forward { // what a thread needs: k, q and v packed, the scores of 32 queries, their powers in pairs of keys
  bf16 *k, *q, *v, *p;
  float (*s)[SIDE];
};

static void attend(struct forward *t, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *y, float *logsum, size step,
                   size l, size m, size d, size depth, float scale) {
  _Alignas(64) float out[ROWS][SIDE], top[SIDE], sum[SIDE];
  _Alignas(64) bf16 turned[SIDE];
  pack(t->k, k, step, m, d, depth), turn(t->v, v, step, m, d);
  const __m512 steep = _mm512_set1_ps(scale * LOG2_E);
  for (size j = 0; j < l; j += SIDE) {
    const size num = l - j < SIDE ? l - j : SIDE;
    pack_columns(t->q, q + j * step, step, num, d, depth);
    __m512 tops[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    for (size i = 0; i < m; i += SIDE) {
      scores(t->s + i, t->k + i * depth, t->q, depth);
      written();
      for (size a = i; a < i + SIDE && a < m; a++)
        for (size b = 0; b < 2; b++) tops[b] = _mm512_max_ps(tops[b], _mm512_load_ps(&t->s[a][b * ROWS]));
    }
    for (size b = 0; b < SIDE; b += ROWS) {
      const __m512 most = _mm512_mul_ps(tops[b / ROWS], steep);
      __m512 total = _mm512_setzero_ps();
      for (size i = 0; i < whole(m); i += 2) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        if (i < m) even = power(_mm512_fmsub_ps(_mm512_load_ps(&t->s[i][b]), steep, most));
        if (i + 1 < m) odd = power(_mm512_fmsub_ps(_mm512_load_ps(&t->s[i + 1][b]), steep, most));
        total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
        _mm512_store_si512(t->p + (i / 2 * SIDE + b) * 2, paired(even, odd));
      }
      _mm512_store_ps(top + b, most), _mm512_store_ps(sum + b, total);
    }
    for (size b = 0; b < num; b++) logsum[j + b] = top[b] / LOG2_E + logf(sum[b]);
    for (size c = 0; c < d; c += ROWS) { // y^T = v^T p^T
      written();
      _tile_zero(0); _tile_zero(1);
      for (size i = 0; i < m; i += SIDE) {
        _tile_loadd(4, t->v + i * d + c * SIDE, 64);
        _tile_loadd(6, t->p + i * SIDE, SIDE * 4);
        _tile_loadd(7, t->p + i * SIDE + 2 * ROWS, SIDE * 4);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, out[0], SIDE * 4); _tile_stored(1, &out[0][ROWS], SIDE * 4);
      written();
      for (size r = 0; r < ROWS; r++) {
        for (size b = 0; b < SIDE; b += ROWS)
          _mm256_store_si256((__m256i *)(turned + b),
                             rounded(_mm512_div_ps(_mm512_load_ps(&out[r][b]), _mm512_load_ps(sum + b))));
        for (size b = 0; b < num; b++) y[(j + b) * step + c + r] = turned[b];
      }
    }
  }
}

struct backward { // of one thread; *_columns and *_rows are packed
  bf16 *k, *v, *k_turned, *q_columns, *dy_columns, *q_rows, *dy_rows;
  float *dq, *logsum, *delta; // dq (l / 16, d, 16); delta = dy . y (l); with zeros beyond
};

static void differentiate(struct backward *t, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy,
                          const bf16 *y, const float *logsum, bf16 *dq, bf16 *dk, bf16 *dv, size step, size l, size m,
                          size d, size depth, float scale) {
  _Alignas(64) float s[SIDE][SIDE], ds[SIDE][SIDE], dks[SIDE * d], dvs[SIDE * d];
  _Alignas(64) bf16 p_half[SIDE][SIDE], ds_half[SIDE][SIDE], ds_rows[SIDE / 2][SIDE][2];
  pack_columns(t->q_columns, q, step, l, d, depth), pack_columns(t->dy_columns, dy, step, l, d, depth);
  pack_rows(t->q_rows, q, step, l, d), pack_rows(t->dy_rows, dy, step, l, d);
  pack(t->k, k, step, m, d, depth), pack(t->v, v, step, m, d, depth), turn(t->k_turned, k, step, m, d);
  memset(t->dq, 0, whole(l) * d * sizeof(float));
  for (size j = 0; j < whole(l); j++) {
    float sum = 0;
    for (size c = 0; c < d && j < l; c++) sum += wide(dy[j * step + c]) * wide(y[j * step + c]);
    t->delta[j] = sum, t->logsum[j] = j < l ? logsum[j] * LOG2_E : 0;
  }
  const __m512 steep = _mm512_set1_ps(scale * LOG2_E), slope = _mm512_set1_ps(scale);
  for (size i = 0; i < m; i += SIDE) { // keys
    memset(dks, 0, sizeof dks), memset(dvs, 0, sizeof dvs);
    for (size j = 0; j < l; j += SIDE) { // queries
      scores(s, t->k + i * depth, t->q_columns + j * depth, depth);
      scores(ds, t->v + i * depth, t->dy_columns + j * depth, depth);
      for (size b = 0; b < SIDE; b += ROWS) {
        __m512 top = _mm512_load_ps(t->logsum + j + b), mean = _mm512_load_ps(t->delta + j + b);
        for (size a = 0; a < SIDE; a += 2) {
          __m512 g[2];
          for (size c = 0; c < 2; c++) {
            __m512 p = power(_mm512_fmsub_ps(_mm512_load_ps(&s[a + c][b]), steep, top));
            if (i + a + c >= m) p = _mm512_setzero_ps(); // no key: its score of 0 may be far above all that are
            g[c] = _mm512_mul_ps(_mm512_mul_ps(p, slope), _mm512_sub_ps(_mm512_load_ps(&ds[a + c][b]), mean));
            _mm256_store_si256((__m256i *)&p_half[a + c][b], rounded(p));
            _mm256_store_si256((__m256i *)&ds_half[a + c][b], rounded(g[c]));
          }
          _mm512_store_si512(ds_rows[a / 2][b], paired(g[0], g[1]));
        }
      }
      for (size c = 0; c < d; c += ROWS) {
        for (size a = 0; a < SIDE; a += ROWS) {
          add_product(dvs + a * d + c, d * 4, p_half[a], 64, t->dy_rows + j * d + c * 2, d * 4);
          add_product(dks + a * d + c, d * 4, ds_half[a], 64, t->q_rows + j * d + c * 2, d * 4);
        }
        for (size b = 0; b < SIDE; b += ROWS) // dq^T += k^T ds^T
          add_product(t->dq + (j + b) * d + c * ROWS, 64, t->k_turned + i * d + c * SIDE, 64, ds_rows[0][b], SIDE * 4);
      }
    }
    for (size a = 0; a < SIDE && i + a < m; a++)
      for (size c = 0; c < d; c += ROWS) {
        _mm256_storeu_si256((__m256i *)(dk + (i + a) * step + c), rounded(_mm512_loadu_ps(dks + a * d + c)));
        _mm256_storeu_si256((__m256i *)(dv + (i + a) * step + c), rounded(_mm512_loadu_ps(dvs + a * d + c)));
      }
  }
  for (size j = 0; j < l; j += ROWS)
    for (size c = 0; c < d; c++) {
      _Alignas(32) bf16 row[ROWS];
      _mm256_store_si256((__m256i *)row, rounded(_mm512_load_ps(t->dq + j * d + c * ROWS)));
      for (size b = 0; b < ROWS && j + b < l; b++) dq[(j + b) * step + c] = row[b];
    }
}

// y = softmax(scale q k^T) v: q, y (n, l, heads, d), k, v (n, m, heads, d), logsum of the scaled scores
// (n, heads, l); d whole tiles of 16.
void flash_bf16_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *y, float *logsum, size n, size heads,
                        size l, size m, size d, float scale, int threads) {
  const size depth = whole(d), step = heads * d;
  _Pragma("omp parallel num_threads(threads)") {
    _tile_loadconfig(config);
    struct forward t = {room(whole(m) * depth * 2), room(SIDE * depth * 2), room(whole(m) * d * 2),
                        room(whole(m) * SIDE * 2), room(whole(m) * SIDE * 4)};
    _Pragma("omp for collapse(2)") for (size i = 0; i < n; i++) for (size h = 0; h < heads; h++) {
      const size at_q = i * l * step + h * d, at_k = i * m * step + h * d;
      attend(&t, q + at_q, k + at_k, v + at_k, y + at_q, logsum + (i * heads + h) * l, step, l, m, d, depth, scale);
    }
    free(t.k), free(t.q), free(t.v), free(t.p), free(t.s);
    _tile_release();
  }
}

// The same sizes; of dq, dk, dv as of q, k, v.
void flash_bf16_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy, const bf16 *y,
                         const float *logsum, bf16 *dq, bf16 *dk, bf16 *dv, size n, size heads, size l, size m,
                         size d, float scale, int threads) {
  const size depth = whole(d), step = heads * d;
  _Pragma("omp parallel num_threads(threads)") {
    _tile_loadconfig(config);
    struct backward t;
    bf16 **packed[] = {&t.k, &t.v, &t.k_turned, &t.q_columns, &t.dy_columns, &t.q_rows, &t.dy_rows};
    for (int i = 0; i < 7; i++) *packed[i] = room(whole(i < 3 ? m : l) * depth * 2);
    t.dq = room(whole(l) * d * 4), t.logsum = room(whole(l) * 4), t.delta = room(whole(l) * 4);
    _Pragma("omp for collapse(2)") for (size i = 0; i < n; i++) for (size h = 0; h < heads; h++) {
      const size at_q = i * l * step + h * d, at_k = i * m * step + h * d;
      differentiate(&t, q + at_q, k + at_k, v + at_k, dy + at_q, y + at_q, logsum + (i * heads + h) * l, dq + at_q,
                    dk + at_k, dv + at_k, step, l, m, d, depth, scale);
    }
    for (int i = 0; i < 7; i++) free(*packed[i]);
    free(t.dq), free(t.logsum), free(t.delta);
    _tile_release();
  }
}

#else

int flash_bf16_is_here(void) { return 0; }

#endif
