// Floats to codes, row by row, with scales that are given or found from extremes as quantizers.py finds them.
#pragma once
#include <atomic>
#include <mutex>

#include "gemm.h"
#include "math.h"
#include "pool.h"

extern "C" {

// scheme: 0 symmetric, 1 unsigned, 2 asymmetric. mode: 0 a static scale, 1 one found for the tensor, 2 one for each row.
struct Format {
  float scale, offset, clip;
  int32_t low, high, shift, scheme, mode;
};

}

namespace {

thread_local Scratch scratch;  // for the threads of one job

constexpr int kOk = 0, kNotFinite = 1, kNoMemory = 2;

// Threads that are worth their hand-over for `work` simple steps. Those that are yet to be borrowed may sleep.
inline int worth(double work, int threads) { return work < (team != nullptr ? 5e3 : 100e3) ? 1 : threads; }

inline float clipped(float x, float clip) { return x < -clip ? -clip : x > clip ? clip : x; }

// What is known of the values that share a scale: their extremes, and the largest magnitude's bits.
struct Range {
  float low = FLT_MAX, high = -FLT_MAX;
  int32_t most = 0;

  void see(const float* x, int n, bool extremes_too) {
    const int32_t found = largest(x, n);
    most = most > found ? most : found;
    if (extremes_too) extremes(x, n, &low, &high);
  }
  void join(const Range& other) {
    low = low < other.low ? low : other.low, high = high > other.high ? high : other.high;
    most = most > other.most ? most : other.most;
  }
  bool finite() const { return most < kInfinity; }
};

inline Coding coding(const Format& f, const Range& range) {
  Coding c{f.scale, f.offset, f.clip, f.low, f.high, f.shift};
  if (f.mode == 0) return c;
  float high = f.scheme == 0 ? float_of(range.most) : range.high;
  high = clipped(high, f.clip);
  c.offset = f.scheme == 2 ? clipped(range.low, f.clip) : 0;
  c.scale = (high - c.offset) / float(f.high);
  if (c.scale < FLT_MIN) c.scale = 1;  // no range, or one too small for codes to stay in it
  return c;
}

// The range of a tensor that several threads make or read: each joins what it sees.
struct Found {
  const bool extremes_too;
  Range range;
  std::mutex merge;

  explicit Found(bool extremes_too) : extremes_too(extremes_too) {}
  explicit Found(const Format& f) : Found(f.scheme != 0) {}
  void join(const Range& part) {
    std::lock_guard<std::mutex> lock(merge);
    range.join(part);
  }
};

// One range for rows of a tensor.
template <typename Row>
Range find_range(int rows, int columns, const Format& f, int threads, Row row) {
  const int piece = columns < 1024 ? 16384 / (columns + 1) : 16;
  Found all(f);
  parallel(up(rows, piece) / piece, worth(double(rows) * columns, threads), [&](int chunk, int) {
    Range mine;
    for (int r = chunk * piece; r < rows && r < (chunk + 1) * piece; ++r) mine.see(row(r), columns, all.extremes_too);
    all.join(mine);
  });
  return all.range;
}

// known: the range of all of x, where it was found when x was made.
inline int quantize_rows(const float* x, int rows, int columns, const Format& f, int threads, int8_t* out, float* scale,
                         float* offset, int32_t* sums, const Range* known = nullptr) {
  const int width = up(columns, kAlign), piece = 16;
  const auto row = [&](int r) { return x + size_t(r) * size_t(columns); };
  Range whole;
  if (known != nullptr) whole = *known;
  else if (f.mode == 1) whole = find_range(rows, columns, f, threads, row);
  if (!whole.finite()) return kNotFinite;
  const bool by_row = f.mode == 2 || (f.mode == 0 && known == nullptr);
  const Coding all = coding(f, whole);
  const Rounder round(all);
  std::atomic<bool> finite{true};
  parallel(up(rows, piece) / piece, worth(double(rows) * columns, threads), [&](int chunk, int) {
    for (int r = chunk * piece; r < rows && r < (chunk + 1) * piece; ++r) {
      Range range = by_row ? Range{} : whole;
      if (by_row) range.see(row(r), columns, f.scheme != 0);
      if (!range.finite()) finite.store(false);
      const Coding c = f.mode == 2 ? coding(f, range) : all;
      int8_t* to = out + size_t(r) * size_t(width);
      sums[r] = f.mode == 2 ? to_codes(row(r), columns, c, to, width) : to_codes(row(r), columns, round, to, width);
      scale[r] = c.scale, offset[r] = c.offset;
    }
  });
  return finite.load() ? kOk : kNotFinite;
}

}  // namespace
