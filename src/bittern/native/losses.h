// What candidates for the scales of a matrix lose, row by row, as the search for scales estimates it.
#pragma once
#include <vector>

#include "quantize.h"

extern "C" {

// scales, offsets: of each row, candidate after candidate. factors: `rank` rows, a multiple of 4, of `columns` values.
struct Losses {
  const float *x, *scales, *offsets, *factors, *rest, *linear;
  float* out;
  int32_t rows, columns, candidates, rank;
  float low, high;
};

}

namespace {

// e = rounded x less x; returns the sum of (linear + rest e) e, without linear if that is null.
inline float errors(const float* x, const Losses& l, float scale, float offset, const float* linear, float* e) {
  const float* rest = l.rest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < l.columns; ++i) {
    float code = rintf((x[i] - offset) / scale);
    code = code < l.low ? l.low : code > l.high ? l.high : code;
    e[i] = code * scale + offset - x[i];
    sum += rest[i] * e[i] * e[i];
  }
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < (linear == nullptr ? 0 : l.columns); ++i) sum += linear[i] * e[i];
  return sum;
}

inline float length_along(const float* e, const Losses& l) {
  float total = 0;
  for (int k = 0; k < l.rank; k += 4) {  // four sums at once, since each waits for its last addition
    const float *f = l.factors + size_t(k) * size_t(l.columns), *g = f + l.columns, *h = g + l.columns, *j = h + l.columns;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int i = 0; i < l.columns; ++i) a += e[i] * f[i], b += e[i] * g[i], c += e[i] * h[i], d += e[i] * j[i];
    total += a * a + b * b + c * c + d * d;
  }
  return total;
}

// out (candidates, rows): |e F'|² + sum of (linear + rest e) e.
inline void row_losses(const Losses& l, int threads) {
  const double work = double(l.rows) * l.columns * l.candidates;
  parallel(l.rows, worth(work, threads), [&](int row, int) {
    std::vector<float> e(size_t(l.columns));
    const size_t at = size_t(row) * size_t(l.columns);
    for (int c = 0; c < l.candidates; ++c) {
      const size_t own = size_t(c) * size_t(l.rows) + size_t(row);
      const float offset = l.offsets == nullptr ? 0 : l.offsets[own];
      const float sum = errors(l.x + at, l, l.scales[own], offset, l.linear == nullptr ? nullptr : l.linear + at, e.data());
      l.out[own] = sum + length_along(e.data(), l);
    }
  });
}

}  // namespace
