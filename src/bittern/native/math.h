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

inline Ints smaller(const Ints& a, const Ints& b) { return a < b ? a : b; }
inline Ints larger(const Ints& a, const Ints& b) { return a > b ? a : b; }
inline Floats magnitude(const Floats& x) { return Floats(Ints(x) & 0x7fffffff); }

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

// Added to a float, leaves the whole number next to it in the low bits, ready to be an exponent: 1.5 * 2**23.
constexpr float kNearest = 12582912.0f;

// How values become codes: clipped, less the offset, by the scale, rounded half to even, limited to low .. high; the
// stored byte is the code less `shift`.
struct Coding {
  float scale = 1, offset = 0, clip = FLT_MAX;
  int low = -128, high = 127, shift = 0;
};

// Codes of values. The arithmetic is the quantizers': a division. A product with the inverse takes its place, except
// where that comes near a tie and could round the other way.
struct Rounder {
  Floats least, clip, offset, scale, inverse, low, high, nearest;
  Ints lowest, highest;  // as bits, also of what the clip leaves
  Rounder(const Coding& c)
      : least(Floats{} - c.clip), clip(Floats{} + c.clip), offset(Floats{} + c.offset), scale(Floats{} + c.scale),
        inverse(Floats{} + 1 / c.scale), low(Floats{} + float(c.low)), high(Floats{} + float(c.high)),
        nearest(Floats{} + (kNearest - float(c.shift))) {
    lowest = Ints((*this)(least) + nearest), highest = Ints((*this)(clip) + nearest);
  }

  // As whole floats.
  Floats operator()(const Floats& x) const {
    const Floats v = larger(smaller(x, clip), least) - offset, ratio = rounded(v * inverse);
    Floats code = whole(ratio);
    if (any_above(distance(ratio, code), kFar)) code = whole(v / scale);
    return smaller(larger(low, code), high);
  }

  // As bits: the same in fewer steps, for N registers at once. No step changes the order of values, so that they can be
  // limited last, as integers: a sum whose bits are kBase more than the code less shift.
  template <int N>
  void bits(const Floats* x, Ints* out) const {
    Ints worst = {};
    for (int i = 0; i < N; ++i) {
      const Floats ratio = rounded((x[i] - offset) * inverse), sum = ratio + nearest;
      worst = larger(worst, Ints(distance(ratio, sum - nearest)));
      out[i] = smaller(larger(Ints(sum), lowest), highest);
    }
    if (any_above(Floats(worst), kFar))
      for (int i = 0; i < N; ++i) out[i] = Ints((*this)(x[i]) + nearest);
  }

  static constexpr int32_t kBase = 0x4b400000;  // the bits of kNearest; the lowest byte is 0

 private:
  static constexpr float kFar = 0.4999f;
  static Floats distance(const Floats& ratio, const Floats& code) { return magnitude(ratio - code); }
};

// The first n values of a register, n not above 0 for none, and the lowest bytes of integers.
inline void store_some(float* to, const Floats& v, int n) {
  if (n >= kLanes) store(to, v);
  else if (n > 0) store_first(to, v, n);
}

inline void store_some(int8_t* to, const Ints& v, int n) {
  if (n >= kLanes) store_bytes(to, v);
  else if (n > 0) store_first_bytes(to, v, n);
}

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
    sum += Words(bits[0] & first(count));
    store_some(out + at + from, bits[0], count);
  });
  if (width > n) memset(out + n, 0, size_t(width - n));
  return int32_t(uint32_t(add_up(Ints(sum))) - uint32_t(n) * uint32_t(Rounder::kBase));
}

inline int32_t to_codes(const float* x, int n, const Rounder& round, int8_t* out, int width) {
  return to_codes(x, n, [](const Floats& v) { return v; }, round, out, width);
}

inline int32_t sum_of(const int8_t* codes, int n) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += codes[i];
  return sum;
}

// What the codes of n values stand for: code x scale + offset, rounded twice.
inline void to_values(const float* x, int n, const Coding& c, float* out) {
  const Rounder round(c);
  registers(x, n, [&](int at, const Floats& values, int count) {
    Floats value = rounded(round(values) * round.scale);
    if (c.offset != 0) value += round.offset;
    store_some(out + at, value, count);
  });
}

// The polynomial of x with these factors, that of the highest power first.
template <typename... More>
inline Floats polynomial(const Floats& x, float highest, More... more) {
  Floats y = Floats{} + highest;
  ((y = y * x + more), ...);
  return y;
}

// y x 2**n, n in the low bits of a float to which kNearest was added. What was no number may become one.
inline Floats scaled(const Floats& y, const Floats& n) { return Floats(Words(y) + (Words(n) << 23)); }

// e**x for x <= 0, to 1 or 2 units in the last place, by 2**r for the rest of the exponent; exactly 0 below the smallest
// normal number.
inline Floats exp_negative(const Floats& x) {
  const Floats shifted = x * 1.44269504f + kNearest;
  const Floats r = x * 1.44269504f - (shifted - kNearest) + x * 1.92596299e-08f;
  const Floats y = polynomial(r, 1.534581141e-4f, 1.339993121e-3f, 9.618488959e-3f, 5.550328777e-2f, 2.402264689e-1f,
                              6.931472057e-1f, 1.0f);
  return x < -87.0f ? Floats{} : y * scaled(Floats{} + 1.0f, shifted);
}

// x times the normal distribution up to x, which is 2**-(p(-x) * -x + 1) for x < 0, with p fitted so that the largest error of
// 1 - erf, 1.1e-7, is least, and the power of 2 to 1 or 2 units in the last place; without a division.
inline Floats gelu(const Floats& x) {
  const Floats size = magnitude(x), t = smaller(size, Floats{} + 9.5f);  // then there are 100 zeros behind the point
  const Floats p = polynomial(t, 2.834912871e-6f, -3.937768895e-5f, 1.861802186e-4f, 1.369364457e-4f, -7.063420248e-3f,
                              5.249617842e-2f, 4.592081967e-1f, 1.151105205f);
  const Floats exponent = -1.0f - p * t, shifted = exponent + kNearest, r = exponent - (shifted - kNearest);
  const Floats y = polynomial(r, 1.326472708e-3f, 9.671512862e-3f, 5.550733746e-2f, 2.402224208e-1f, 6.931469776e-1f, 1.0f);
  return larger(Floats{}, x) - size * scaled(y, shifted);
}

inline Floats sigmoid(const Floats& x) {
  const Floats e = exp_negative(-magnitude(x));
  return (x < 0 ? e : Floats{} + 1.0f) / (1 + e);
}

// GELU by tanh: x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
inline Floats gelu_tanh(const Floats& x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

}  // namespace
