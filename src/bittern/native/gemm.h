// Integer products: rows of signed bytes times panels of 16 outputs whose weights are small codes.
//
// A panel holds, for each `kStep` inputs, 16 outputs x kStep bytes: a line. With 4 inputs it has 64 bytes, which is what
// two AVX2 registers, one AVX-512 register and a row of an AMX tile want alike. In memory codes have 2, 4 or 8 bits: a line
// holds 4, 2 or 1 such groups at bit 0, 2, .. of each byte. A panel is unpacked into the first cache for as many rows as
// share it, if they are more than `kFew`.
//
// Each kind of CPU has one file of products, which says
//   kStep    inputs of an output that lie side by side: 4 or 8
//   kSigned  whether codes of 8 bits lie as signed bytes, less 128
//   kPlanes  2 if codes of 8 bits are multiplied as two of 4
//   kPair    panels that are multiplied together
//   kDepth   what attention pads to what it sums over
//   kFew     rows that multiply packed weights as they lie, by `rows_packed`
// and has `multiply`: sums (rows, 16) for each of `count` <= kPair panels, `next` bytes apart, whose sums are `next_sums`
// apart; `add` goes on from what they hold; what is `ahead` may be fetched. `a` and sums must have memory for a multiple of
// 16 rows; groups, of 4 inputs, are a multiple of kDepth / 4; `Tiles` must be there. Panels are expanded, with a `field` of
// 8 bits for each code of `bits` bits, or for up to `packed_rows` rows of all they may be as they lie in memory.
#pragma once
#include <cstdlib>

#include "vectors.h"

namespace {

constexpr int kPanel = 16;    // outputs of a panel
constexpr int kAlign = 64;    // rows of inputs are padded with zeros to a multiple of this
constexpr int kBlock = 384;   // inputs of a panel that are unpacked at a time: the rows' own should stay in the first cache
constexpr int kRows = 256;    // rows of inputs in one piece of work
constexpr int kShare = 48;    // rows for which a thread reads all weights itself, and not all rows
constexpr int kTile = 32;     // rows whose sums are made together, and still in the first cache when they are finished

inline int up(int n, int to) { return (n + to - 1) / to * to; }

// What is fetched into the caches beside products: `pace` bytes in each step of 4 inputs, once for 8 rows, from `from` on,
// and as much `next` bytes further. Spread evenly, since a core waits for at most some 16 lines at a time.
struct Ahead {
  const uint8_t* from;
  size_t pace, next;
};

}  // namespace

#if defined(__AMX_INT8__)
#include "dot_amx.h"
#elif defined(__AVX512VNNI__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_arm.h"
#endif

namespace {

#if !defined(__AVX512VNNI__) || defined(__AMX_INT8__)
inline int packed_rows() { return 0; }
#endif

#if !defined(__AMX_INT8__)
struct Tiles {  // see dot_amx.h
  Tiles() {}
};
inline bool start() { return true; }
#endif

constexpr int kLine = kPanel * kStep;

inline int planes(int bits) { return bits == 8 ? kPlanes : 1; }

// What is taken from codes of so many bits in panels.
inline int flip(int bits) { return kSigned && bits == 8 ? 128 : 0; }

// Calls each(code's index, byte's, bit's) for the codes of a matrix, one in a byte, and their place in panels.
template <typename F>
void each_code(int rows, int columns, int bits, F each) {
  const int per = 8 / bits, width = up(columns, kAlign);
  size_t line = 0;
  for (int row0 = 0; row0 < rows; row0 += kPanel)
    for (int column0 = 0; column0 < width; column0 += kStep * per, line += kLine)
      for (int i = 0; i < kLine; ++i)
        for (int part = 0; part < per; ++part) {
          const int row = row0 + i / kStep, column = column0 + kStep * part + i % kStep;
          if (row < rows && column < columns) each(size_t(row) * columns + column, line + i, bits * part);
        }
}

// Codes (rows, columns), one in a byte, to panels. Rows and columns beyond the matrix are bytes of zero.
void pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* out) {
  memset(out, 0, size_t(up(rows, kPanel)) * up(columns, kAlign) * bits / 8);
  each_code(rows, columns, bits, [=](size_t code, size_t byte, int bit) { out[byte] |= (codes[code] ^ flip(bits)) << bit; });
}

// The inverse of `pack`.
void unpack(const uint8_t* panels, int rows, int columns, int bits, uint8_t* codes) {
  each_code(rows, columns, bits, [=](size_t code, size_t byte, int bit) {
    codes[code] = uint8_t((panels[byte] >> bit & ((1 << bits) - 1)) ^ flip(bits));
  });
}

// Fields of `bits` bits, each as a byte: those of a line side by side, or `apart` lines from each other.
template <int bits>
inline void expand(const uint8_t* packed, int lines, int next, int apart, uint8_t* out) {
  for (int line = 0; line < lines; ++line)
    for (int at = 0; at < kLine; at += int(sizeof(Bytes))) {
      const Bytes some = load<Bytes>(packed + line * kLine + at);
#pragma GCC unroll 4
      for (int field = 0; field < 8 / bits; ++field)
        store(out + (line * next + field * apart) * kLine + at, some >> (bits * field) & uint8_t((1 << bits) - 1));
    }
}

// `groups` groups of 4 inputs of one packed panel; with two planes the high halves of its codes follow.
inline void expand(const uint8_t* packed, int groups, int bits, uint8_t* out) {
  const int lines = groups * 4 / kStep;
  if (bits == 2) expand<2>(packed, lines / 4, 4, 1, out);
  else if (bits == 4) expand<4>(packed, lines / 2, 2, 1, out);
  else expand<4>(packed, lines, 1, lines, out);
}

}  // namespace
