// Loops that the compiler turns into vectors: rounding to codes, exp, erf, norms.
#pragma once
#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

constexpr int32_t kInfinity = 0x7f800000;

// One register of floats, or of integers as wide.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));

template <typename V = Floats, typename T>
inline V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store(T* to, const V& v) {
  memcpy(to, &v, sizeof(v));
}

inline float add_up(const Floats& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#else
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

// Sum of f of n values.
template <typename F>
inline float total(const float* x, int n, F f) {
  Floats sums[2] = {};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) sums[0] += f(load(x + i)), sums[1] += f(load(x + i + kLanes));
  float sum = add_up(sums[0] + sums[1]);
  for (; i < n; ++i) sum += f(x[i]);
  return sum;
}

// Largest magnitude as bits, whose order as integers is that of the magnitudes, with NaN above infinity.
inline int32_t largest(const float* x, int n) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < n; ++i) {
    const int32_t size = bits_of(x[i]) & 0x7fffffff;
    most = most > size ? most : size;
  }
  return most;
}

inline void extremes(const float* x, int n, float* low, float* high) {
  float least = *low, most = *high;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int i = 0; i < n; ++i) {
    least = least < x[i] ? least : x[i];
    most = most > x[i] ? most : x[i];
  }
  *low = least, *high = most;
}

// How values become codes: clipped, less the offset, by the scale, rounded half to even, limited to low .. high; the
// stored byte is the code less `shift`.
struct Coding {
  float scale = 1, offset = 0, clip = FLT_MAX;
  int low = -128, high = 127, shift = 0;
};

// Codes as whole floats. The arithmetic is the quantizers': a division. A product with the inverse takes its place,
// except where that comes near a tie and could round the other way.
#if defined(__AVX512F__)
struct Rounder {
  static constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m512 least, clip, offset, scale, inverse, low, high;
  explicit Rounder(const Coding& c)
      : least(_mm512_set1_ps(-c.clip)), clip(_mm512_set1_ps(c.clip)), offset(_mm512_set1_ps(c.offset)),
        scale(_mm512_set1_ps(c.scale)), inverse(_mm512_set1_ps(1 / c.scale)), low(_mm512_set1_ps(float(c.low))),
        high(_mm512_set1_ps(float(c.high))) {}
  __m512 operator()(__m512 x) const {
    const __m512 v = _mm512_sub_ps(_mm512_max_ps(_mm512_min_ps(x, clip), least), offset);
    const __m512 ratio = _mm512_mul_ps(v, inverse);
    __m512 whole = _mm512_roundscale_ps(ratio, nearest);
    if (_mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(ratio, whole)), _mm512_set1_ps(0.4999f), _CMP_GT_OQ))
      whole = _mm512_roundscale_ps(_mm512_div_ps(v, scale), nearest);
    return _mm512_min_ps(_mm512_max_ps(low, whole), high);
  }
};

inline __mmask16 first(int n) { return n < 16 ? __mmask16((1 << n) - 1) : __mmask16(0xffff); }

// Codes of n values (padded with zeros to `width`) and their sum.
inline int32_t to_codes(const float* x, int n, const Coding& c, int8_t* out, int width) {
  const Rounder round(c);
  const __m512i shift = _mm512_set1_epi32(c.shift);
  __m512i sum = _mm512_setzero_si512();
  for (int at = 0; at < n; at += 16) {
    const __mmask16 real = first(n - at);
    const __m512i code = _mm512_sub_epi32(_mm512_cvtps_epi32(round(_mm512_maskz_loadu_ps(real, x + at))), shift);
    if (n - at >= 16) {
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), _mm512_cvtepi32_epi8(code));
    } else {  // masked stores are slow
      sum = _mm512_mask_add_epi32(sum, real, sum, code);
      _mm512_mask_cvtepi32_storeu_epi8(out + at, real, code);
    }
  }
  if (width > n) memset(out + n, 0, size_t(width - n));
  return _mm512_reduce_add_epi32(sum);
}

// What the codes of n values stand for: code x scale + offset, rounded twice.
inline void to_values(const float* x, int n, const Coding& c, float* out) {
  const Rounder round(c);
  for (int at = 0; at < n; at += 16) {
    const __mmask16 real = first(n - at);
    __m512 value = _mm512_mul_ps(round(_mm512_maskz_loadu_ps(real, x + at)), round.scale);
    asm("" : "+v"(value));  // or the compiler makes one operation of product and sum
    if (c.offset != 0) value = _mm512_add_ps(value, round.offset);
    if (n - at >= 16) _mm512_storeu_ps(out + at, value);
    else _mm512_mask_storeu_ps(out + at, real, value);
  }
}
#else
struct Rounder {
  static constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m256 least, clip, offset, scale, inverse, low, high;
  explicit Rounder(const Coding& c)
      : least(_mm256_set1_ps(-c.clip)), clip(_mm256_set1_ps(c.clip)), offset(_mm256_set1_ps(c.offset)),
        scale(_mm256_set1_ps(c.scale)), inverse(_mm256_set1_ps(1 / c.scale)), low(_mm256_set1_ps(float(c.low))),
        high(_mm256_set1_ps(float(c.high))) {}
  __m256 operator()(__m256 x) const {
    const __m256 v = _mm256_sub_ps(_mm256_max_ps(_mm256_min_ps(x, clip), least), offset);
    const __m256 ratio = _mm256_mul_ps(v, inverse);
    __m256 whole = _mm256_round_ps(ratio, nearest);
    const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(ratio, whole));
    if (_mm256_movemask_ps(_mm256_cmp_ps(distance, _mm256_set1_ps(0.4999f), _CMP_GT_OQ)))
      whole = _mm256_round_ps(_mm256_div_ps(v, scale), nearest);
    return _mm256_min_ps(_mm256_max_ps(low, whole), high);
  }
};

inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Codes of n values (padded with zeros to `width`) and their sum.
inline int32_t to_codes(const float* x, int n, const Coding& c, int8_t* out, int width) {
  const Rounder round(c);
  const __m256i shift = _mm256_set1_epi32(c.shift);
  __m256i sum = _mm256_setzero_si256();
  for (int at = 0; at < n; at += 8) {
    const int real = n - at < 8 ? n - at : 8;
    const __m256 whole = round(_mm256_maskload_ps(x + at, first(real)));
    const __m256i code = _mm256_and_si256(_mm256_sub_epi32(_mm256_cvtps_epi32(whole), shift), first(real));
    sum = _mm256_add_epi32(sum, code);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    memcpy(out + at, &bytes, size_t(real));
  }
  if (width > n) memset(out + n, 0, size_t(width - n));
  int32_t parts[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), sum);
  int32_t total = 0;
  for (const int32_t part : parts) total += part;
  return total;
}

// What the codes of n values stand for: code x scale + offset, rounded twice.
inline void to_values(const float* x, int n, const Coding& c, float* out) {
  const Rounder round(c);
  for (int at = 0; at < n; at += 8) {
    __m256 value = _mm256_mul_ps(round(_mm256_maskload_ps(x + at, first(n - at))), round.scale);
    asm("" : "+x"(value));  // or the compiler makes one operation of product and sum
    if (c.offset != 0) value = _mm256_add_ps(value, round.offset);
    if (n - at >= 8) _mm256_storeu_ps(out + at, value);
    else _mm256_maskstore_ps(out + at, first(n - at), value);
  }
}
#endif

// Whole numbers next to x, and what adding 1.5 * 2**23 leaves in the low bits of a float: them, ready to be an exponent.
template <typename F>
inline F nearest(F x, F* exponent) {
  const F shifted = x + 12582912.0f;
  *exponent = shifted;
  return shifted - 12582912.0f;
}

inline float power(float exponent) { return float_of(int32_t(uint32_t(bits_of(exponent)) << 23) + (127 << 23)); }
inline Floats power(Floats exponent) { return Floats((Ints(exponent) << 23) + (127 << 23)); }

// e**x for x <= 0, to 1 or 2 units in the last place (Cephes' polynomial); exactly 0 below the smallest normal number.
template <typename F>
inline F exp_negative(F x) {
  const F limited = x < -87.0f ? F{} - 87.0f : x;
  F exponent;
  const F n = nearest(limited * 1.44269504f, &exponent);
  const F r = limited - n * 0.693359375f - n * -2.12194440e-4f;
  F y = F{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const F value = y * power(exponent);
  return x < -87.0f ? F{} : value;
}

// 2**x for -126 <= x <= 0, to 1 or 2 units in the last place.
inline float power_of_2(float x) {
  float exponent;
  const float r = x - nearest(x, &exponent);
  float y = 1.534581141e-4f;
  y = y * r + 1.339993121e-3f;
  y = y * r + 9.618488959e-3f;
  y = y * r + 5.550328777e-2f;
  y = y * r + 2.402264689e-1f;
  y = y * r + 6.931472057e-1f;
  y = y * r + 1.0f;
  return y * power(exponent);
}

// 1 - erf(x) for x >= 0, to 1.1e-7: 2**-p(x) with p fitted so that the largest error is least; without a division.
inline float complement(float x) {
  const float t = x < 4.0f ? x : 4.0f;
  float p = 4.535860593e-5f;
  p = p * t - 4.455076941e-4f;
  p = p * t + 1.489441749e-3f;
  p = p * t + 7.746295147e-4f;
  p = p * t - 2.825368099e-2f;
  p = p * t + 1.484816150e-1f;
  p = p * t + 9.184163933e-1f;
  p = p * t + 1.627908593f;
  const float value = power_of_2(-p * t);
  return x < 4.0f ? value : 0.0f;
}

inline float gelu(float x) {
  const float tail = 0.5f * complement(fabsf(x) * 0.70710678f);
  return x * (x < 0 ? tail : 1 - tail);
}

inline float sigmoid(float x) {
  const float e = exp_negative(-fabsf(x));
  return (x < 0 ? e : 1.0f) / (1 + e);
}

// GELU by tanh: x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

}  // namespace
