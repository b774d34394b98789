// Loops that the compiler turns into vectors: rounding to codes, exp, erf, norms.
#pragma once
#include <cfloat>
#include <cmath>

#include "vectors.h"

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

// Whole numbers next to x, and what adding 1.5 * 2**23 leaves in the low bits of a float: them, ready to be an exponent.
constexpr float kNearest = 12582912.0f;

template <typename F>
inline F nearest(F x, F* exponent) {
  const F shifted = x + kNearest;
  *exponent = shifted;
  return shifted - kNearest;
}

// How values become codes: clipped, less the offset, by the scale, rounded half to even, limited to low .. high; the
// stored byte is the code less `shift`.
struct Coding {
  float scale = 1, offset = 0, clip = FLT_MAX;
  int low = -128, high = 127, shift = 0;
};

// Codes of values. The arithmetic is the quantizers': a division. A product with the inverse takes its place, except
// where that comes near a tie and could round the other way.
struct Rounder {
  Floats least, clip, offset, scale, inverse, low, high, low_ratio, high_ratio, nearest;
  explicit Rounder(const Coding& c)
      : least(Floats{} - c.clip), clip(Floats{} + c.clip), offset(Floats{} + c.offset), scale(Floats{} + c.scale),
        inverse(Floats{} + 1 / c.scale), low(Floats{} + float(c.low)), high(Floats{} + float(c.high)),
        nearest(Floats{} + (kNearest - float(c.shift))) {
    const float from = (-c.clip - c.offset) * inverse[0], to = (c.clip - c.offset) * inverse[0];
    low_ratio = Floats{} + (from > low[0] ? from : low[0]), high_ratio = Floats{} + (to < high[0] ? to : high[0]);
  }

  // As whole floats.
  Floats operator()(const Floats& x) const {
    const Floats v = larger(smaller(x, clip), least) - offset, ratio = rounded(v * inverse);
    Floats code = whole(ratio);
    if (any_above(distance(ratio, code), kFar)) code = whole(v / scale);
    return smaller(larger(low, code), high);
  }

  // As bits: the same in fewer steps, for N registers at once. No step changes the order of values, so that they can be
  // limited, also to what the clip leaves, just before the last: a sum whose bits are kBase more than the code less shift.
  template <int N>
  void bits(const Floats* x, Ints* out) const {
    Floats worst = {};
    for (int i = 0; i < N; ++i) {
      const Floats ratio = smaller(larger(low_ratio, rounded((x[i] - offset) * inverse)), high_ratio);
      const Floats sum = ratio + nearest;
      worst = larger(worst, distance(ratio, sum - nearest));
      out[i] = Ints(sum);
    }
    if (any_above(worst, kFar))
      for (int i = 0; i < N; ++i) out[i] = Ints((*this)(x[i]) + nearest);
  }

  static constexpr int32_t kBase = 0x4b400000;  // the bits of kNearest; the lowest byte is 0

 private:
  static constexpr float kFar = 0.4999f;
  static Floats distance(const Floats& ratio, const Floats& code) { return Floats(Ints(ratio - code) & 0x7fffffff); }
};

// body(first, values, count) for a register's width of n values at a time; beyond the last are zeros.
template <typename F>
inline void registers(const float* x, int n, F body) {
  int at = 0;
  for (; at + kLanes <= n; at += kLanes) body(at, load(x + at), kLanes);
  if (at < n) body(at, load_first(x + at, n - at), n - at);
}

// Codes of n values, times a factor (padded with zeros to `width`) and their sum.
template <typename F>
inline int32_t to_codes(const float* x, int n, F factor, const Rounder& round, int8_t* out, int width) {
  constexpr int kGroup = 4;
  Floats values[kGroup];
  Ints bits[kGroup];
  Words sum = {};
  int at = 0;
  for (; at + kGroup * kLanes <= n; at += kGroup * kLanes) {
    for (int i = 0; i < kGroup; ++i) values[i] = factor(load(x + at + i * kLanes));
    round.bits<kGroup>(values, bits);
    for (int i = 0; i < kGroup; ++i) sum += Words(bits[i]), store_bytes(out + at + i * kLanes, bits[i]);
  }
  registers(x + at, n - at, [&](int from, const Floats& some, int count) {
    values[0] = factor(some);
    round.bits<1>(values, bits);
    if (count == kLanes) {
      sum += Words(bits[0]);
      store_bytes(out + at + from, bits[0]);
    } else {
      sum += Words(bits[0] & first(count));
      store_first_bytes(out + at + from, bits[0], count);
    }
  });
  if (width > n) memset(out + n, 0, size_t(width - n));
  return int32_t(uint32_t(add_up(Ints(sum))) - uint32_t(n) * uint32_t(Rounder::kBase));
}

inline int32_t to_codes(const float* x, int n, const Rounder& round, int8_t* out, int width) {
  return to_codes(x, n, [](const Floats& v) { return v; }, round, out, width);
}

inline int32_t to_codes(const float* x, int n, const Coding& c, int8_t* out, int width) {
  return to_codes(x, n, Rounder(c), out, width);
}

inline int32_t sum_of(const int8_t* codes, int n) {
  int32_t sum = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16) sum += sum_of_sixteen(codes + i);
  for (; i < n; ++i) sum += codes[i];
  return sum;
}

// What the codes of n values stand for: code x scale + offset, rounded twice.
inline void to_values(const float* x, int n, const Coding& c, float* out) {
  const Rounder round(c);
  registers(x, n, [&](int at, const Floats& values, int count) {
    Floats value = rounded(round(values) * round.scale);
    if (c.offset != 0) value += round.offset;
    if (count == kLanes) store(out + at, value);
    else store_first(out + at, value, count);
  });
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
