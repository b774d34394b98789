// Products by AVX-512 VNNI: byte products and 32-bit sums in one instruction.
#pragma once
#include "gemm.h"

namespace {

#if defined(__AMX_INT8__)
constexpr int kDepth = 64;  // a row of a tile
#else
constexpr int kDepth = 16;
#endif
constexpr int kStep = 4, kPlanes = 1, kPair = 2, kFew = 2;
constexpr bool kSigned = false;

// sum + w (unsigned) x x (signed), four products in each place. As an intrinsic, GCC 12 copies each sum in each step, which
// doubles the instructions of the loops below.
inline __m512i dot(__m512i sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// R x P products for R broadcasts and P loads: 8 x 2 take 8 cycles where two can start in each, the other 10 + 3
// instructions fit beside them, and 16 sums are more than the 2 x 5 products under way. Rows up to a multiple of 4 are read.
// Fields of `bits` bits are unpacked in registers.
template <int R, int P, int bits>
inline void tile(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int groups, int32_t* sums,
                 size_t next_sums, bool add, const Ahead& ahead) {
  constexpr int fields = 8 / bits;
  const __m512i mask = _mm512_set1_epi8(char((1 << bits) - 1));
  __m512i sum[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      sum[r][p] = add ? _mm512_loadu_si512(sums + p * next_sums + r * kPanel) : _mm512_setzero_si512();
  const uint8_t* fetched = ahead.from;
  for (int g = 0; g < groups; panel += 64) {
    __m512i packed[P], w[P];
    for (int p = 0; p < P; ++p) packed[p] = _mm512_loadu_si512(panel + p * next);
#pragma GCC unroll 4
    for (int f = 0; f < fields; ++f, ++g, fetched += ahead.pace) {
      for (int p = 0; p < P; ++p) {
        w[p] = bits == 8 ? packed[p] : _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, packed[p], unsigned(bits * f)), mask);
        __builtin_prefetch(fetched + p * ahead.next);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        memcpy(&four, a + r * stride + g * 4, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[r][p] = dot(sum[r][p], w[p], x);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) _mm512_storeu_si512(sums + p * next_sums + r * kPanel, sum[r][p]);
}

template <int P, int bits>
void rows_vnni(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int rows, int groups, int32_t* sums,
               size_t next_sums, bool add, Ahead ahead) {
  int r = 0;
  for (; r + 4 < rows; r += 8, ahead.from += groups * ahead.pace)
    tile<8, P, bits>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add, ahead);
  for (; r + 1 < rows; r += 4)
    tile<4, P, bits>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add, ahead);
  if (r < rows) tile<1, P, bits>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add, ahead);
}

// Sums (R, 16) of packed panels, for so few rows that unpacking would cost more than the product: each field of the
// bytes is multiplied where it lies, and the power of two that it counts too much is shifted out of its sums.
template <int R, int P, int bits>
inline void tile_packed(const uint8_t* packed, size_t next, const int8_t* a, size_t stride, int lines, int32_t* sums,
                        size_t next_sums) {
  constexpr int fields = 8 / bits;
  __m512i sum[R][P][fields], mask[fields];
  for (int f = 0; f < fields; ++f) {
    mask[f] = _mm512_set1_epi8(char(((1 << bits) - 1) << (bits * f)));
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) sum[r][p][f] = _mm512_setzero_si512();
  }
  for (int line = 0; line < lines; ++line)
    for (int p = 0; p < P; ++p) {
      const __m512i w = _mm512_loadu_si512(packed + p * next + line * 64);
      __builtin_prefetch(packed + (P + p) * next + line * 64);  // the next panels
#pragma GCC unroll 4
      for (int f = 0; f < fields; ++f) {
        const __m512i field = bits == 8 ? w : _mm512_and_si512(w, mask[f]);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          int32_t four;
          memcpy(&four, a + r * stride + (line * fields + f) * 4, 4);
          sum[r][p][f] = dot(sum[r][p][f], field, _mm512_set1_epi32(four));
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) {
      __m512i total = sum[r][p][0];
      for (int f = 1; f < fields; ++f)
        total = _mm512_add_epi32(total, _mm512_maskz_sra_epi32(0xffff, sum[r][p][f], _mm_cvtsi32_si128(bits * f)));
      _mm512_storeu_si512(sums + p * next_sums + r * kPanel, total);
    }
}

template <int bits>
void rows_packed(const uint8_t* packed, size_t next, int count, const int8_t* a, size_t stride, int rows, int,
                 int32_t* sums, size_t next_sums) {
  const int lines = int(next / 64);
  if (rows == 1 && count == 2) return tile_packed<1, 2, bits>(packed, next, a, stride, lines, sums, next_sums);
  for (int p = 0; p < count; ++p, packed += next, sums += next_sums)
    (rows == 1 ? tile_packed<1, 1, bits> : tile_packed<2, 1, bits>)(packed, next, a, stride, lines, sums, next_sums);
}

inline void multiply_vectors(const uint8_t* panel, size_t next, int count, const int8_t* a, size_t stride, int rows,
                             int groups, int field, int32_t* sums, size_t next_sums, bool add, const Ahead& ahead) {
  const auto with = [=](auto pair, auto one) {
    (count == 2 ? pair : one)(panel, next, a, stride, rows, groups, sums, next_sums, add, ahead);
  };
  if (field == 2) with(rows_vnni<2, 2>, rows_vnni<1, 2>);
  else if (field == 4) with(rows_vnni<2, 4>, rows_vnni<1, 4>);
  else with(rows_vnni<2, 8>, rows_vnni<1, 8>);
}

#if !defined(__AMX_INT8__)
// Beyond 8 rows Intel's pipes that multiply would have to unpack too often; AMD's others do that beside them.
inline int packed_rows() { return __builtin_cpu_is("amd") ? kRows : 8; }

inline void multiply(const uint8_t* panel, size_t next, int count, const int8_t* a, size_t stride, int rows, int groups,
                     int field, int, int, int32_t* sums, size_t next_sums, bool add, const Ahead& ahead) {
  multiply_vectors(panel, next, count, a, stride, rows, groups, field, sums, next_sums, add, ahead);
}
#endif

}  // namespace
