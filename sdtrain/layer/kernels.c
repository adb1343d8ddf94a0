// What torch does in several passes over memory, in one, on a CPU. Maps are channels-last; sums are float32.
// Built by kernels.py, which says what each function takes.

#ifndef IN

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef float f32;
typedef uint16_t bf16;
typedef union { uint32_t bits; float value; } word;

static inline float from_f32(f32 v) { return v; }
static inline f32 to_f32(float v) { return v; }
static inline float from_bf16(bf16 v) { return ((word){.bits = (uint32_t)v << 16}).value; }
static inline bf16 to_bf16(float v) { // to the nearest, ties to even; what is no number stays none
  uint32_t bits = ((word){.value = v}).bits;
  bf16 rounded = (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)0x7fc0u : rounded;
}

// e^x to 2 ulp: the exponent's bits times a polynomial of what is left (Moshier, Cephes, expf). NaN stays NaN.
// Below -60 it is 0, above 60 e^60: what is made of it would soon be denormal, and those take ten times as long.
static inline float exponential(float x) {
  float inside = x < -60.f ? -60.f : (x > 60.f ? 60.f : x);
  float n = nearbyintf(inside * 1.44269504f);
  float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  p *= ((word){.bits = (uint32_t)((int32_t)n + 127) << 23}).value;
  return x < -60.f ? 0.f : p;
}

static inline float sigmoid(float z) { return 1.f / (1.f + exponential(-z)); }

// The normal distribution function to 1e-7 (Abramowitz and Stegun 1964, 7.1.26), given e^(-z^2 / 2).
static inline float normal_cdf(float z, float bell) {
  float t = 1.f / (1.f + 0.3275911f * 0.70710678f * fabsf(z));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  float tail = 0.5f * p * t * bell;
  return z < 0.f ? tail : 1.f - tail;
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FROM(type, v) JOIN(from, type)(v)
#define TO(type, v) JOIN(to, type)(v)
#define NAME(what) JOIN(JOIN(what, IN), OUT)
#define ROWS _Pragma("omp parallel for num_threads(threads)")
#define EACH _Pragma("omp simd") for
typedef int64_t size;

#define IN f32
#define OUT f32
#include "kernels.c"
#undef IN
#undef OUT
#define IN bf16
#define OUT bf16
#include "kernels.c"
#undef IN
#undef OUT
#define IN f32
#define OUT bf16
#include "kernels.c"

#else

// y = act((x - mean) rstd weight + bias): x (n, hw, c), mean and rstd (n, groups), act is SiLU or nothing.
void NAME(group_norm)(const IN *restrict x, const float *restrict weight, const float *restrict bias, OUT *restrict y,
                      float *restrict mean, float *restrict rstd, size n, size hw, size c, size groups, float eps,
                      int silu, int threads) {
  ROWS for (size i = 0; i < n; i++) {
    const IN *restrict xi = x + i * hw * c;
    OUT *restrict yi = y + i * hw * c;
    float sum[c], scale[c], shift[c];
    size width = c / groups;
    for (size k = 0; k < c; k++) sum[k] = 0;
    for (size p = 0; p < hw; p++)
      EACH (size k = 0; k < c; k++) sum[k] += FROM(IN, xi[p * c + k]);
    for (size g = 0; g < groups; g++) {
      float total = 0;
      for (size k = g * width; k < (g + 1) * width; k++) total += sum[k];
      mean[i * groups + g] = total / (hw * width);
      for (size k = g * width; k < (g + 1) * width; k++) shift[k] = mean[i * groups + g], sum[k] = 0;
    }
    for (size p = 0; p < hw; p++) // a second look: x^2 - mean^2 would lose what a large mean leaves
      EACH (size k = 0; k < c; k++) {
        float d = FROM(IN, xi[p * c + k]) - shift[k];
        sum[k] += d * d;
      }
    for (size g = 0; g < groups; g++) {
      float total = 0;
      for (size k = g * width; k < (g + 1) * width; k++) total += sum[k];
      rstd[i * groups + g] = 1.f / sqrtf(total / (hw * width) + eps);
      for (size k = g * width; k < (g + 1) * width; k++) {
        scale[k] = rstd[i * groups + g] * weight[k];
        shift[k] = bias[k] - shift[k] * scale[k];
      }
    }
    if (silu) {
      for (size p = 0; p < hw; p++)
        EACH (size k = 0; k < c; k++) {
          float z = FROM(IN, xi[p * c + k]) * scale[k] + shift[k];
          yi[p * c + k] = TO(OUT, z * sigmoid(z));
        }
    } else {
      for (size p = 0; p < hw; p++)
        EACH (size k = 0; k < c; k++) yi[p * c + k] = TO(OUT, FROM(IN, xi[p * c + k]) * scale[k] + shift[k]);
    }
  }
}

// dweight and dbias are (n, c): of each sample, so that their sum does not depend on the threads.
void NAME(group_norm_backward)(const OUT *restrict dy, const IN *restrict x, const float *restrict weight,
                               const float *restrict bias, const float *restrict mean, const float *restrict rstd,
                               IN *restrict dx, float *restrict dweight, float *restrict dbias,
                               size n, size hw, size c, size groups, int silu, int threads) {
  _Pragma("omp parallel num_threads(threads)") {
  float *restrict kept = malloc(hw * c * sizeof(float));
  _Pragma("omp for") for (size i = 0; i < n; i++) {
    const IN *restrict xi = x + i * hw * c;
    const OUT *restrict dyi = dy + i * hw * c;
    IN *restrict dxi = dx + i * hw * c;
    float *restrict sum = dbias + i * c, *restrict dot = dweight + i * c;
    float m[c], r[c], scale[c], shift[c];
    size width = c / groups;
    for (size k = 0; k < c; k++) {
      m[k] = mean[i * groups + k / width], r[k] = rstd[i * groups + k / width];
      scale[k] = r[k] * weight[k], shift[k] = bias[k] - m[k] * scale[k];
      sum[k] = dot[k] = 0;
    }
    if (silu) {
      for (size p = 0; p < hw; p++)
        EACH (size k = 0; k < c; k++) {
          float v = FROM(IN, xi[p * c + k]), z = v * scale[k] + shift[k], s = sigmoid(z);
          float d = FROM(OUT, dyi[p * c + k]) * s * (1.f + z * (1.f - s));
          kept[p * c + k] = d, sum[k] += d, dot[k] += d * (v - m[k]) * r[k];
        }
    } else {
      for (size p = 0; p < hw; p++)
        EACH (size k = 0; k < c; k++) {
          float d = FROM(OUT, dyi[p * c + k]);
          kept[p * c + k] = d, sum[k] += d, dot[k] += d * (FROM(IN, xi[p * c + k]) - m[k]) * r[k];
        }
    }
    float constant[c], slope[c]; // dx = scale d + slope x + constant
    for (size g = 0; g < groups; g++) {
      float a = 0, b = 0;
      for (size k = g * width; k < (g + 1) * width; k++) a += weight[k] * sum[k], b += weight[k] * dot[k];
      a /= hw * width, b /= hw * width;
      for (size k = g * width; k < (g + 1) * width; k++) {
        slope[k] = -b * r[k] * r[k];
        constant[k] = -a * r[k] - slope[k] * m[k];
      }
    }
    for (size p = 0; p < hw; p++)
      EACH (size k = 0; k < c; k++)
        dxi[p * c + k] = TO(IN, scale[k] * kept[p * c + k] + slope[k] * FROM(IN, xi[p * c + k]) + constant[k]);
  }
  free(kept);
  }
}

// y = a gelu(b): x (rows, 2 d) is a beside b, y (rows, d).
void NAME(geglu)(const IN *restrict x, OUT *restrict y, size rows, size d, int threads) {
  ROWS for (size i = 0; i < rows; i++) {
    const IN *restrict a = x + i * 2 * d, *restrict b = a + d;
    OUT *restrict yi = y + i * d;
    EACH (size k = 0; k < d; k++) {
      float z = FROM(IN, b[k]);
      yi[k] = TO(OUT, FROM(IN, a[k]) * z * normal_cdf(z, exponential(-0.5f * z * z)));
    }
  }
}

void NAME(geglu_backward)(const OUT *restrict dy, const IN *restrict x, IN *restrict dx, size rows, size d,
                          int threads) {
  ROWS for (size i = 0; i < rows; i++) {
    const IN *restrict a = x + i * 2 * d, *restrict b = a + d;
    IN *restrict da = dx + i * 2 * d, *restrict db = da + d;
    const OUT *restrict dyi = dy + i * d;
    EACH (size k = 0; k < d; k++) {
      float z = FROM(IN, b[k]), bell = exponential(-0.5f * z * z), cdf = normal_cdf(z, bell), g = FROM(OUT, dyi[k]);
      da[k] = TO(IN, g * z * cdf);
      db[k] = TO(IN, g * FROM(IN, a[k]) * (cdf + z * 0.39894228f * bell));
    }
  }
}

#endif
