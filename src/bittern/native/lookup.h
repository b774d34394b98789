// Rows of a packed embedding, from codes as a file holds them.
#pragma once

#include "pool.h"

extern "C" {

// Rows of `row_bytes` bytes hold `columns` codes of `bits` bits, counted from the lowest bit; a code is its number x step +
// low. scale, offset: one each, or one for each row; offset may be null.
struct Lookup {
  const uint8_t* codes;
  const float *scale, *offset;
  int64_t rows, row_bytes;
  int32_t columns, bits, low, step, by_row;
};

}

namespace {

// The first codes, in whole bytes of several; returns how many.
template <int bits>
inline int whole_bytes(const Lookup& l, const uint8_t* from, float scale, float* to) {
  constexpr int per = 8 / bits;
  for (int k = 0; k + per <= l.columns; k += per, ++from)
    for (int f = 0; f < per; ++f) to[k + f] = float((*from >> (bits * f) & ((1 << bits) - 1)) * l.step + l.low) * scale;
  return l.columns / per * per;
}

// out (count, columns) = code x scale + offset, rounded twice as PyTorch does. False if an id is no row.
inline bool look_up(const Lookup& l, const int64_t* ids, int count, float* out) {
  for (int i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= l.rows) return false;
  for (int i = 0; i < count; ++i) {
    const uint8_t* from = l.codes + ids[i] * l.row_bytes;
    float* to = out + size_t(i) * size_t(l.columns);
    const int64_t unit = l.by_row ? ids[i] : 0;
    const float scale = l.scale[unit];
    int k = 0;
    if (l.bits == 8) k = whole_bytes<8>(l, from, scale, to);
    if (l.bits == 4) k = whole_bytes<4>(l, from, scale, to);
    if (l.bits == 2) k = whole_bytes<2>(l, from, scale, to);
    for (; k < l.columns; ++k) {
      const int64_t bit = int64_t(k) * l.bits, byte = bit / 8;
      const int pair = from[byte] | (byte + 1 < l.row_bytes ? from[byte + 1] << 8 : 0);
      to[k] = float((pair >> (bit % 8) & ((1 << l.bits) - 1)) * l.step + l.low) * scale;
    }
    if (l.offset != nullptr)
      for (k = 0; k < l.columns; ++k) to[k] += l.offset[unit];
  }
  return true;
}

}  // namespace
