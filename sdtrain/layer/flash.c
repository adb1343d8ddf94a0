// The gradients of attention in one pass over 32 x 32 blocks of scores, none of which leaves the first cache: flash
// attention's backward (Dao et al. 2022, algorithm 4) in the matrix tiles of AMX, bfloat16 with float32 sums. Built by
// kernels.py, called by flash.py; where there is no AMX it says so.

#include <stdint.h>

typedef int64_t size;
typedef uint16_t bf16;

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, ROWS = 16 }; // of a block, of a tile

// Linux gives the tiles to a process that asks.
int flash_is_here(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Eight tiles of 16 rows of 64 bytes.
static const uint8_t config[64] = {1, [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64, [26] = 64, [28] = 64,
                                   [30] = 64, [48 ... 55] = ROWS};

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

// Two rows as a tile's right factor wants them: side by side, number by number.
static inline __m512i paired(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// to += left right^T over `depth` numbers: left 16 rows of them, right packed by `pack_columns`.
static inline void scores(float *to, const bf16 *left, const bf16 *right, size depth) {
  written();
  _tile_zero(0);
  for (size c = 0; c < depth; c += SIDE) {
    _tile_loadd(1, left + c, depth * 2);
    _tile_loadd(2, right + c * ROWS, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, to, SIDE * 4);
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

// x (l, d) to blocks of 16 rows, (l / 16, depth / 2, 16, 2), zeros beyond d.
static void pack_columns(bf16 *to, const bf16 *x, size l, size d, size depth) {
  for (size i = 0; i < l; i++)
    for (size j = 0; j < depth; j++)
      to[i / ROWS * ROWS * depth + (j / 2 * ROWS + i % ROWS) * 2 + j % 2] = j < d ? x[i * d + j] : 0;
}

// x (l, d) to pairs of rows, (l / 2, d, 2).
static void pack_rows(bf16 *to, const bf16 *x, size l, size d) {
  for (size i = 0; i < l; i++)
    for (size j = 0; j < d; j++) to[(i / 2 * d + j) * 2 + i % 2] = x[i * d + j];
}

struct scratch { // of one thread; *_columns and *_rows are packed
  bf16 *k, *v, *k_turned, *q_columns, *dy_columns, *q_rows, *dy_rows;
  float *dq; // (l / 16, d, 16)
};

static void one_head(struct scratch *t, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy,
                     const float *logsum, const float *delta, bf16 *dq, bf16 *dk, bf16 *dv, size l, size m, size d,
                     size depth, float scale) {
  _Alignas(64) float s[SIDE][SIDE], ds[SIDE][SIDE], dks[SIDE * d], dvs[SIDE * d];
  _Alignas(64) bf16 p_half[SIDE][SIDE], ds_half[SIDE][SIDE], ds_rows[SIDE / 2][SIDE][2];
  pack_columns(t->q_columns, q, l, d, depth), pack_columns(t->dy_columns, dy, l, d, depth);
  pack_rows(t->q_rows, q, l, d), pack_rows(t->dy_rows, dy, l, d);
  for (size i = 0; i < m; i++)
    for (size j = 0; j < depth; j++) {
      t->k[i * depth + j] = j < d ? k[i * d + j] : 0, t->v[i * depth + j] = j < d ? v[i * d + j] : 0;
      if (j < d) t->k_turned[i / SIDE * SIDE * d + j * SIDE + i % SIDE] = k[i * d + j];
    }
  memset(t->dq, 0, l * d * sizeof(float));
  const __m512 steep = _mm512_set1_ps(scale * 1.44269504f), slope = _mm512_set1_ps(scale);
  for (size i = 0; i < m; i += SIDE) { // keys
    memset(dks, 0, sizeof dks), memset(dvs, 0, sizeof dvs);
    for (size j = 0; j < l; j += SIDE) { // queries
      for (size a = 0; a < SIDE; a += ROWS)
        for (size b = 0; b < SIDE; b += ROWS) {
          scores(&s[a][b], t->k + (i + a) * depth, t->q_columns + (j + b) * depth, depth);
          scores(&ds[a][b], t->v + (i + a) * depth, t->dy_columns + (j + b) * depth, depth);
        }
      for (size b = 0; b < SIDE; b += ROWS) {
        __m512 top = _mm512_mul_ps(_mm512_loadu_ps(logsum + j + b), _mm512_set1_ps(1.44269504f));
        __m512 mean = _mm512_loadu_ps(delta + j + b);
        for (size a = 0; a < SIDE; a += 2) {
          __m256i half[2];
          for (size c = 0; c < 2; c++) {
            __m512 p = power(_mm512_fmsub_ps(_mm512_load_ps(&s[a + c][b]), steep, top));
            __m512 g = _mm512_mul_ps(_mm512_mul_ps(p, slope), _mm512_sub_ps(_mm512_load_ps(&ds[a + c][b]), mean));
            _mm256_store_si256((__m256i *)&p_half[a + c][b], rounded(p));
            _mm256_store_si256((__m256i *)&ds_half[a + c][b], half[c] = rounded(g));
          }
          _mm512_store_si512(ds_rows[a / 2][b], paired(half[0], half[1]));
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
    for (size c = 0; c < SIDE * d; c += ROWS) {
      _mm256_storeu_si256((__m256i *)(dk + i * d + c), rounded(_mm512_loadu_ps(dks + c)));
      _mm256_storeu_si256((__m256i *)(dv + i * d + c), rounded(_mm512_loadu_ps(dvs + c)));
    }
  }
  for (size j = 0; j < l; j += ROWS)
    for (size c = 0; c < d; c++) {
      _Alignas(32) bf16 row[ROWS];
      _mm256_store_si256((__m256i *)row, rounded(_mm512_loadu_ps(t->dq + j * d + c * ROWS)));
      for (size b = 0; b < ROWS; b++) dq[(j + b) * d + c] = row[b];
    }
}

// Of y = softmax(scale q k^T) v: q, dy, dq (n, l, d), k, v, dk, dv (n, m, d), logsum of the scaled scores and
// delta = dy . y (n, l); l and m whole blocks of 32, d of 16.
void flash_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dy, const float *logsum,
                    const float *delta, bf16 *dq, bf16 *dk, bf16 *dv, size n, size l, size m, size d, float scale,
                    int threads) {
  size depth = (d + SIDE - 1) / SIDE * SIDE;
  _Pragma("omp parallel num_threads(threads)") {
    _tile_loadconfig(config);
    struct scratch t;
    bf16 **packed[] = {&t.k, &t.v, &t.k_turned, &t.q_columns, &t.dy_columns, &t.q_rows, &t.dy_rows};
    for (int i = 0; i < 7; i++) *packed[i] = aligned_alloc(64, (i < 3 ? m : l) * depth * sizeof(bf16));
    t.dq = aligned_alloc(64, l * d * sizeof(float));
    _Pragma("omp for") for (size i = 0; i < n; i++)
      one_head(&t, q + i * l * d, k + i * m * d, v + i * m * d, dy + i * l * d, logsum + i * l, delta + i * l,
               dq + i * l * d, dk + i * m * d, dv + i * m * d, l, m, d, depth, scale);
    for (int i = 0; i < 7; i++) free(*packed[i]);
    free(t.dq);
    _tile_release();
  }
}

#else

int flash_is_here(void) { return 0; }

#endif
