// Products by plain NEON (Armv8.0): byte products into 16-bit sums, eight at a time, widened only when they could overflow.
#pragma once
#include "dot_arm.h"

namespace {

constexpr int kHeight = 2;

// For 64 codes and R rows: 4 loads of weights, R broadcasts and 8 R products into 8 R sums of 16 bits, in registers. Codes of
// 8 bits leave room for one product, so that 8 R additions to sums of 32 bits come with them.
template <int R, int bits>
inline void tile(const uint8_t* panel, const int8_t* a, size_t stride, int groups, int late, int32_t* sums, bool add) {
  for (int i = 0; i < R * kPanel && !add; ++i) sums[i] = 0;
  const auto input = [&](int r, int g) {
    int32_t four;
    memcpy(&four, a + r * stride + g * 4, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  };
  const auto add_pairs = [&](int r, int q, int32x4_t low, int32x4_t high) {
    int32_t* to = sums + r * kPanel + 4 * q;
    vst1q_s32(to, vaddq_s32(vld1q_s32(to), vpaddq_s32(low, high)));
  };
  if (bits == 8 && late == 1) {
    int32x4_t sum[R][8] = {};
    for (int g = 0; g < groups; ++g) {
      int8x16_t x[R];
      for (int r = 0; r < R; ++r) x[r] = input(r, g);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const int8x16_t w = codes_of<bits>(panel, g, 16 * q);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          sum[r][2 * q] = vpadalq_s16(sum[r][2 * q], vmull_s8(vget_low_s8(w), vget_low_s8(x[r])));
          sum[r][2 * q + 1] = vpadalq_s16(sum[r][2 * q + 1], vmull_high_s8(w, x[r]));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < 4; ++q) add_pairs(r, q, sum[r][2 * q], sum[r][2 * q + 1]);
    return;
  }
  for (int g = 0; g < groups;) {
    const int end = g + late < groups ? g + late : groups;
    int16x8_t sum[R][8] = {};
    for (; g < end; ++g) {
      int8x16_t x[R];
      for (int r = 0; r < R; ++r) x[r] = input(r, g);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const int8x16_t w = codes_of<bits>(panel, g, 16 * q);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          sum[r][2 * q] = vmlal_s8(sum[r][2 * q], vget_low_s8(w), vget_low_s8(x[r]));
          sum[r][2 * q + 1] = vmlal_high_s8(sum[r][2 * q + 1], w, x[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < 4; ++q) add_pairs(r, q, vpaddlq_s16(sum[r][2 * q]), vpaddlq_s16(sum[r][2 * q + 1]));
  }
}

}  // namespace
