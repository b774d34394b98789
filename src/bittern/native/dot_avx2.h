// Products by AVX2: two byte products in 16 bits in one instruction, summed there as long as they fit.
#pragma once
#include "gemm.h"

namespace {

constexpr int kStep = 4, kPair = 1, kDepth = 16, kFew = 0;
constexpr int kPlanes = 2;  // so that 16-bit sums cannot overflow
constexpr bool kSigned = false;

// Sums of products stay in 16 bits for `late` groups, then are widened; `weight` is what this plane counts.
template <int R>
inline void tile(const uint8_t* panel, const int8_t* a, size_t stride, int groups, int late, int weight, int32_t* sums,
                 bool add) {
  __m256i wide[R][2];
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      wide[r][h] = add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * kPanel + 8 * h))
                       : _mm256_setzero_si256();
  const __m256i weights = _mm256_set1_epi16(int16_t(weight));
  for (int g = 0; g < groups;) {
    const int end = g + late < groups ? g + late : groups;
    __m256i sum[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (; g < end; ++g) {
      const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + g * 64));
      const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + g * 64 + 32));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t four;
        memcpy(&four, a + r * stride + g * 4, 4);
        const __m256i x = _mm256_set1_epi32(four);
        sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(w0, x));
        sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(w1, x));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h)
        wide[r][h] = _mm256_add_epi32(wide[r][h], _mm256_madd_epi16(sum[r][h], weights));
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + 8 * h), wide[r][h]);
}

inline void rows_avx2(const uint8_t* panel, const int8_t* a, size_t stride, int rows, int groups, int late, int weight,
                      int32_t* sums, bool add) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    tile<4>(panel, a + r * stride, stride, groups, late, weight, sums + r * kPanel, add);
  for (; r + 2 <= rows; r += 2)
    tile<2>(panel, a + r * stride, stride, groups, late, weight, sums + r * kPanel, add);
  for (; r < rows; ++r) tile<1>(panel, a + r * stride, stride, groups, late, weight, sums + r * kPanel, add);
}

template <int bits>
void rows_packed(const uint8_t*, size_t, int, const int8_t*, size_t, int, int, int32_t*, size_t) {}  // kFew is 0

inline void multiply(const uint8_t* panel, size_t, int, const int8_t* a, size_t stride, int rows, int groups, int,
                     int bits, int top, int32_t* sums, size_t, bool add, const Ahead&) {
  // 2 products of a code and -128 in each 16-bit sum; -32768 still fits
  const int late = 32768 / (2 * 128 * (bits == 8 ? 15 : top));
  rows_avx2(panel, a, stride, rows, groups, late, 1, sums, add);
  if (bits == 8) rows_avx2(panel + size_t(groups) * 64, a, stride, rows, groups, late, 16, sums, true);
}

}  // namespace
