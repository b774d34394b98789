// What the kinds of aarch64 share around their tiles of kHeight rows x 16 outputs.
#pragma once
#include "gemm.h"

namespace {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kStep = 8;
#else
constexpr int kStep = 4;
#endif
constexpr int kPlanes = 1, kPair = 1, kDepth = 16;
constexpr bool kSigned = true;  // there are no products of signed and unsigned bytes, but with i8mm

// 16 bytes of line `line` of an unpacked panel, which lies as codes of `bits` bits do: unpacked itself if they are 8.
template <int bits>
inline int8x16_t codes_of(const uint8_t* panel, int line, int at) {
  constexpr int fields = 8 / bits;
  const Bytes some = load<Bytes>(panel + size_t(line / fields) * kPanel * kStep + at);
  return int8x16_t(bits == 8 ? some : some >> (bits * (line % fields)) & uint8_t((1 << bits) - 1));
}

}  // namespace

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "dot_i8mm.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "dot_dotprod.h"
#else
#include "dot_neon.h"
#endif

namespace {

constexpr int kFew = kHeight;  // beyond that a tile's codes are worth being unpacked once

// Rows up to a multiple of kHeight are read.
template <int bits>
void rows_arm(const uint8_t* panel, const int8_t* a, size_t stride, int rows, int groups, int late, int32_t* sums, bool add) {
  int r = 0;
  for (; r + 1 < rows; r += kHeight)
    tile<kHeight, bits>(panel, a + r * stride, stride, groups, late, sums + r * kPanel, add);
  if (r < rows) tile<1, bits>(panel, a + r * stride, stride, groups, late, sums + r * kPanel, add);
}

// Products of a code and -128 whose sum fits in 16 bits; -32768 still does.
inline int late_for(int bits, int top) { return bits == 8 ? 1 : 32768 / (128 * top); }

template <int bits>
void rows_packed(const uint8_t* packed, size_t next, int, const int8_t* a, size_t stride, int rows, int top, int32_t* sums,
                 size_t) {
  rows_arm<bits>(packed, a, stride, rows, int(next / (2 * bits) / 4), late_for(bits, top), sums, false);
}

inline void multiply(const uint8_t* panel, size_t, int, const int8_t* a, size_t stride, int rows, int groups, int,
                     int bits, int top, int32_t* sums, size_t, bool add, const Ahead&) {
  rows_arm<8>(panel, a, stride, rows, groups, late_for(bits, top), sums, add);
}

}  // namespace
