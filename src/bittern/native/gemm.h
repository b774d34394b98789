// Integer products: rows of signed bytes times panels of 16 outputs whose weights are small unsigned codes.
//
// A panel holds, for each 4 inputs, 16 outputs x 4 bytes: 64 bytes, which is what two AVX2 registers, one AVX-512
// register and a row of an AMX tile want alike. In memory codes have 2, 4 or 8 bits: a 64-byte line holds 4, 2 or 1
// such groups at bit 0, 2, .. of each byte. A panel is unpacked into the first cache for as many rows as share it, if they
// are more than two.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kPanel = 16;    // outputs of a panel
constexpr int kAlign = 64;    // rows of inputs are padded with zeros to a multiple of this
constexpr int kBlock = 384;   // inputs of a panel that are unpacked at a time: the rows' own should stay in the first cache
constexpr int kRows = 256;    // rows of inputs in one piece of work
constexpr int kFew = 2;       // rows that multiply packed weights as they lie, where that is possible
constexpr int kVectors = 4;   // rows that are better multiplied without AMX tiles
constexpr int kTile = 32;     // rows whose sums are made together, and still in the first cache when they are finished
#if defined(__AVX512VNNI__)
constexpr int kPlanes = 1;    // byte products and 32-bit sums in one instruction
constexpr int kPair = 2;      // panels that are multiplied together
#else
constexpr int kPlanes = 2;    // codes of 8 bits are multiplied as two of 4, so that 16-bit sums cannot overflow
constexpr int kPair = 1;
#endif

inline int up(int n, int to) { return (n + to - 1) / to * to; }
inline int planes(int bits) { return bits == 8 ? kPlanes : 1; }

// Codes (rows, columns), one in a byte, to panels. Rows and columns beyond the matrix are codes of zero.
void pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out) {
  const int per = 8 / bits, width = up(columns, kAlign);
  for (int row0 = 0; row0 < rows; row0 += kPanel)
    for (int column0 = 0; column0 < width; column0 += 4 * per, out += 64)
      for (int i = 0; i < 64; ++i) {
        int byte = 0;
        for (int part = 0; part < per; ++part) {
          const int row = row0 + i / 4, column = column0 + 4 * part + i % 4;
          if (row < rows && column < columns) byte |= codes[size_t(row) * columns + column] << (bits * part);
        }
        out[i] = uint8_t(byte);
      }
}

// The inverse of `pack`.
void unpack(const uint8_t* panels, int rows, int columns, int bits, uint8_t* codes) {
  const int per = 8 / bits, width = up(columns, kAlign);
  for (int row0 = 0; row0 < rows; row0 += kPanel)
    for (int column0 = 0; column0 < width; column0 += 4 * per, panels += 64)
      for (int i = 0; i < 64; ++i)
        for (int part = 0; part < per; ++part) {
          const int row = row0 + i / 4, column = column0 + 4 * part + i % 4;
          if (row < rows && column < columns)
            codes[size_t(row) * columns + column] = uint8_t(panels[i] >> (bits * part) & ((1 << bits) - 1));
        }
}

// `groups` groups of 4 inputs of one packed panel, each 64 bytes in `out`; with two planes the high halves follow.
inline void expand(const uint8_t* packed, int groups, int bits, uint8_t* out) {
#if defined(__AVX512F__)
  using V = __m512i;
  const auto load = [](const uint8_t* p) { return _mm512_loadu_si512(p); };
  const auto store = [](uint8_t* p, V v) { _mm512_store_si512(p, v); };
  const V mask = _mm512_set1_epi8(char((1 << bits) - 1));
  const auto field = [&](V v, int shift) { return _mm512_and_si512(_mm512_srl_epi16(v, _mm_cvtsi32_si128(shift)), mask); };
  constexpr int wide = 64;
#else
  using V = __m256i;
  const auto load = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); };
  const auto store = [](uint8_t* p, V v) { _mm256_store_si256(reinterpret_cast<V*>(p), v); };
  const V mask = _mm256_set1_epi8(char(bits == 8 ? 15 : (1 << bits) - 1));
  const auto field = [&](V v, int shift) { return _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift)), mask); };
  constexpr int wide = 32;
#endif
  for (int at = 0; at < 64; at += wide) {
    if (bits == 2) {
      for (int g = 0; g < groups / 4; ++g) {
        const V line = load(packed + g * 64 + at);
        uint8_t* to = out + g * 256 + at;
        store(to, field(line, 0)), store(to + 64, field(line, 2)), store(to + 128, field(line, 4)), store(to + 192, field(line, 6));
      }
    } else if (bits == 4) {
      for (int g = 0; g < groups / 2; ++g) {
        const V line = load(packed + g * 64 + at);
        store(out + g * 128 + at, field(line, 0)), store(out + g * 128 + 64 + at, field(line, 4));
      }
    } else {  // with one plane they are multiplied as they lie
      for (int g = 0; g < groups; ++g) {
        const V line = load(packed + g * 64 + at);
        store(out + g * 64 + at, field(line, 0)), store(out + (groups + g) * 64 + at, field(line, 4));
      }
    }
  }
}

// The products below: sums (rows, 16) of one expanded panel, `count` rows of `a`; `add` goes on from what sums holds.

#if defined(__AVX512VNNI__)
// sum + w (unsigned) x x (signed), four products in each place. As an intrinsic, GCC 12 copies each sum in each step, which
// doubles the instructions of the loops below.
inline __m512i dot(__m512i sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// R x P products for R broadcasts and P loads: 8 x 2 take 8 cycles where two can start in each, the other 10 + 3
// instructions fit beside them, and 16 sums are more than the 2 x 5 products under way. Rows up to a multiple of 4 are read.
template <int R, int P>
inline void tile(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int groups, int32_t* sums,
                 size_t next_sums, bool add) {
  __m512i sum[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      sum[r][p] = add ? _mm512_loadu_si512(sums + p * next_sums + r * kPanel) : _mm512_setzero_si512();
  for (int g = 0; g < groups; ++g) {
    __m512i w[P];
    for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(panel + p * next + g * 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t four;
      memcpy(&four, a + r * stride + g * 4, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[r][p] = dot(sum[r][p], w[p], x);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) _mm512_storeu_si512(sums + p * next_sums + r * kPanel, sum[r][p]);
}

template <int P>
void rows_vnni(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int rows, int groups, int32_t* sums,
               size_t next_sums, bool add) {
  int r = 0;
  for (; r + 4 < rows; r += 8)
    tile<8, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
  for (; r + 1 < rows; r += 4)
    tile<4, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
  if (r < rows) tile<1, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
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
void rows_packed(const uint8_t* packed, size_t next, int count, const int8_t* a, size_t stride, int rows, int32_t* sums,
                 size_t next_sums) {
  const int lines = int(next / 64);
  if (rows == 1 && count == 2) return tile_packed<1, 2, bits>(packed, next, a, stride, lines, sums, next_sums);
  for (int p = 0; p < count; ++p, packed += next, sums += next_sums)
    (rows == 1 ? tile_packed<1, 1, bits> : tile_packed<2, 1, bits>)(packed, next, a, stride, lines, sums, next_sums);
}
#else
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
#endif

// A thread's AMX tiles, ready to use while this lives.
struct Tiles {
#if defined(__AMX_INT8__)
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Tiles() {
    static const Config config;  // in memory as a whole: GCC's intrinsic says that it reads 8 bytes
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
  Tiles(const Tiles&) = delete;
};

#if defined(__AMX_INT8__)
// Tiles of 16 rows x 16 outputs; `a` must have memory for a multiple of 16 rows, and sums too.
template <int R, int P>
inline void tile_amx(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int groups, int32_t* sums,
                     size_t next_sums, bool add) {
  constexpr int ld = kPanel * 4;
  if (add) {
    _tile_loadd(0, sums, ld);
    if (P > 1) _tile_loadd(1, sums + next_sums, ld);
    if (R > 1) _tile_loadd(2, sums + 16 * kPanel, ld);
    if (R > 1 && P > 1) _tile_loadd(3, sums + next_sums + 16 * kPanel, ld);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (int g = 0; g < groups; g += 16) {
    _tile_loadd(4, a + g * 4, stride);
    _tile_loadd(6, panel + g * 64, 64);
    _tile_dpbsud(0, 4, 6);
    if (P > 1) {
      _tile_loadd(7, panel + next + g * 64, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, a + 16 * stride + g * 4, stride);
      _tile_dpbsud(2, 5, 6);
      if (P > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, ld);
  if (P > 1) _tile_stored(1, sums + next_sums, ld);
  if (R > 1) _tile_stored(2, sums + 16 * kPanel, ld);
  if (R > 1 && P > 1) _tile_stored(3, sums + next_sums + 16 * kPanel, ld);
}

template <int P>
void rows_amx(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int rows, int groups, int32_t* sums,
              size_t next_sums, bool add) {
  int r = 0;
  for (; r + 16 < rows; r += 32)
    tile_amx<2, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
  if (r < rows) tile_amx<1, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
}
#endif

// Sums (rows, 16) for each of `count` <= kPair expanded panels, `next` bytes apart; their sums are `next_sums` apart.
// `a` and sums must have memory for a multiple of 16 rows; groups is a multiple of 16; `Tiles` must be there.
inline void multiply(const uint8_t* panel, size_t next, int count, const int8_t* a, size_t stride, int rows, int groups,
                     int bits, int top, int32_t* sums, size_t next_sums, bool add) {
#if defined(__AVX512VNNI__)
  (void)bits, (void)top;
#if defined(__AMX_INT8__)
  if (rows > kVectors) {
    if (count == 2) rows_amx<2>(panel, next, a, stride, rows, groups, sums, next_sums, add);
    else rows_amx<1>(panel, next, a, stride, rows, groups, sums, next_sums, add);
    return;
  }
#endif
  if (count == 2) rows_vnni<2>(panel, next, a, stride, rows, groups, sums, next_sums, add);
  else rows_vnni<1>(panel, next, a, stride, rows, groups, sums, next_sums, add);
#else
  (void)next, (void)count, (void)next_sums;
  // 2 products of a code and -128 in each 16-bit sum; -32768 still fits
  const int late = 32768 / (2 * 128 * (bits == 8 ? 15 : top));
  rows_avx2(panel, a, stride, rows, groups, late, 1, sums, add);
  if (bits == 8) rows_avx2(panel + size_t(groups) * 64, a, stride, rows, groups, late, 16, sums, true);
#endif
}

}  // namespace
