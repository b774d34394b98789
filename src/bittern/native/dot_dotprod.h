// Products by sdot (Armv8.2 dotprod): four byte products and a 32-bit sum in each place of one instruction.
#pragma once
#include "dot_arm.h"

namespace {

constexpr int kHeight = 4;

// One group of 4 inputs: those in `place` of each row's 16.
template <int R, int bits, int place>
inline void step(const uint8_t* panel, int group, const int8x16_t (&x)[R], int32x4_t (&sum)[R][4]) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const int8x16_t w = codes_of<bits>(panel, group + place, 16 * q);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][q] = vdotq_laneq_s32(sum[r][q], w, x[r], place);
  }
}

// For 64 codes and R rows: 4 loads of weights, R / 4 of inputs and 4 R products into 4 R sums, all in registers.
template <int R, int bits>
inline void tile(const uint8_t* panel, const int8_t* a, size_t stride, int groups, int, int32_t* sums, bool add) {
  int32x4_t sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < 4; ++q) sum[r][q] = add ? vld1q_s32(sums + r * kPanel + 4 * q) : vdupq_n_s32(0);
  for (int g = 0; g < groups; g += 4) {
    int8x16_t x[R];
    for (int r = 0; r < R; ++r) x[r] = vld1q_s8(a + r * stride + g * 4);
    step<R, bits, 0>(panel, g, x, sum);
    step<R, bits, 1>(panel, g, x, sum);
    step<R, bits, 2>(panel, g, x, sum);
    step<R, bits, 3>(panel, g, x, sum);
  }
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < 4; ++q) vst1q_s32(sums + r * kPanel + 4 * q, sum[r][q]);
}

}  // namespace
