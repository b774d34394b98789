// Floats rounded to a format and back to floats, as quantizers.py does it and with the same bits, in fewer passes.
#pragma once
#include <vector>

#include "quantize.h"

namespace {

constexpr int64_t kPiece = 16384;  // values that a thread takes at a time, so that sums do not depend on who takes them

// body(first, count) for pieces of n values, each a multiple of `unit`.
template <typename F>
void pieces(int64_t n, int64_t unit, int threads, F body) {
  const int64_t piece = unit * (unit < kPiece ? kPiece / unit : 1);
  parallel(int((n + piece - 1) / piece), worth(double(n), threads), [&](int chunk, int) {
    const int64_t at = chunk * piece;
    body(at, n - at < piece ? n - at : piece);
  });
}

// n values, whose rows are of `columns`.
inline int round_values(const float* x, int64_t n, int columns, const Format& f, int threads, float* out) {
  const bool by_row = f.mode == 2, extremes_too = f.scheme != 0;
  Range whole;
  std::mutex merge;
  if (f.mode == 1)
    pieces(n, 1, threads, [&](int64_t at, int64_t count) {
      Range mine;
      mine.see(x + at, int(count), extremes_too);
      std::lock_guard<std::mutex> lock(merge);
      whole.join(mine);
    });
  std::atomic<bool> finite{whole.finite()};
  if (!finite.load()) return kNotFinite;
  pieces(n, by_row ? columns : 1, threads, [&](int64_t first, int64_t count) {
    const int unit = by_row ? columns : int(count);
    for (int64_t at = first; at < first + count; at += unit) {
      Range range = whole;
      if (f.mode != 1) range.see(x + at, unit, extremes_too);
      if (!range.finite()) finite.store(false);
      to_values(x + at, unit, coding(f, range), out + at);
    }
  });
  return finite.load() ? kOk : kNotFinite;
}

// Sums are made in double, where their order leaves practically no trace in the float that becomes of them.
inline double magnitude(const float* x, int64_t n, float clip) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float size = fabsf(x[i]);
    sum += size > clip ? clip : size;
  }
  return sum;
}

// Sum of magnitudes above a threshold, and how many they are.
struct Kept {
  double sum = 0, count = 0;
};

inline Kept kept(const float* x, int64_t n, float clip, float threshold) {
  double sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; ++i) {
    const float all = fabsf(x[i]), size = all > clip ? clip : all;
    sum += size > threshold ? size : 0.0f;
    count += size > threshold ? 1 : 0;
  }
  return {sum, double(count)};
}

inline void to_ternary(const float* x, int64_t n, float clip, float threshold, float scale, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float all = fabsf(x[i]), size = all > clip ? clip : all, signed_scale = x[i] < 0 ? -scale : scale;
    out[i] = size > threshold ? signed_scale : 0.0f;
  }
}

// Each row of n = rows x columns values to -scale, 0 or scale: what is above `factor` times the mean magnitude stays.
inline int round_ternary(const float* x, int64_t n, int64_t columns, float factor, float clip, int threads, float* out) {
  const auto threshold = [&](double sum) { return factor * (float(sum) / float(columns)); };
  const auto scale = [](const Kept& k) { return float(k.sum) / float(k.count < 1 ? 1 : k.count); };
  if (columns < n) {
    std::atomic<bool> finite{true};
    pieces(n, columns, threads, [&](int64_t first, int64_t count) {
      for (int64_t at = first; at < first + count; at += columns) {
        const double sum = magnitude(x + at, columns, clip);
        if (!(sum < INFINITY)) finite.store(false);
        const float limit = threshold(sum);
        to_ternary(x + at, columns, clip, limit, scale(kept(x + at, columns, clip, limit)), out + at);
      }
    });
    return finite.load() ? kOk : kNotFinite;
  }
  std::vector<Kept> parts(size_t((n + kPiece - 1) / kPiece));
  const auto total = [&](auto part) {
    pieces(n, 1, threads, [&](int64_t at, int64_t count) { parts[size_t(at / kPiece)] = part(x + at, count); });
    Kept all;
    for (const Kept& found : parts) all.sum += found.sum, all.count += found.count;
    return all;
  };
  const double sum = total([&](const float* from, int64_t count) { return Kept{magnitude(from, count, clip), 0}; }).sum;
  if (!(sum < INFINITY)) return kNotFinite;
  const float limit = threshold(sum);
  const float step = scale(total([&](const float* from, int64_t count) { return kept(from, count, clip, limit); }));
  pieces(n, 1, threads, [&](int64_t at, int64_t count) { to_ternary(x + at, count, clip, limit, step, out + at); });
  return kOk;
}

}  // namespace
