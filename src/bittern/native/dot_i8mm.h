// Products by smmla (i8mm): two rows x two outputs x eight inputs, and four 32-bit sums, in one instruction.
#pragma once
#include "dot_arm.h"

namespace {

constexpr int kHeight = 4;

// For 128 codes and R rows: 8 loads of weights, R halves of registers of inputs and 4 R products into 4 R sums, all in
// registers. A row alone fills both places of a pair.
template <int R, int bits>
inline void tile(const uint8_t* panel, const int8_t* a, size_t stride, int groups, int, int32_t* sums, bool add) {
  constexpr int pairs = (R + 1) / 2;
  int32x4_t sum[pairs][8];
  const auto row = [](int pair, int second) { return R == 1 ? 0 : 2 * pair + second; };
  for (int p = 0; p < pairs; ++p)
    for (int q = 0; q < 4; ++q) {
      const int32_t *even = sums + row(p, 0) * kPanel + 4 * q, *odd = sums + row(p, 1) * kPanel + 4 * q;
      for (int half = 0; half < 2; ++half)
        sum[p][2 * q + half] = add ? vcombine_s32(vld1_s32(even + 2 * half), vld1_s32(odd + 2 * half)) : vdupq_n_s32(0);
    }
  for (int g = 0; g < groups / 2; ++g) {
    int8x16_t x[pairs];
    for (int p = 0; p < pairs; ++p)
      x[p] = vcombine_s8(vld1_s8(a + row(p, 0) * stride + g * 8), vld1_s8(a + row(p, 1) * stride + g * 8));
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const int8x16_t w = codes_of<bits>(panel, g, 16 * q);
#pragma GCC unroll 2
      for (int p = 0; p < pairs; ++p) sum[p][q] = vmmlaq_s32(sum[p][q], x[p], w);
    }
  }
  for (int p = 0; p < pairs; ++p)
    for (int q = 0; q < 8; ++q) {
      vst1_s32(sums + row(p, 0) * kPanel + 2 * q, vget_low_s32(sum[p][q]));
      if (R > 1) vst1_s32(sums + row(p, 1) * kPanel + 2 * q, vget_high_s32(sum[p][q]));
    }
}

}  // namespace
