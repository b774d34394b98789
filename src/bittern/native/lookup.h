// Packed weights as floats, from codes as a file holds them: rows of an embedding, and products with inputs that stay
// floats, such as those of a language model's head, which is tied to it.
#pragma once

#include "linear.h"

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

// Numbers of one row from column k on, one in each byte, up to a multiple of 8.
inline void read_numbers(const Lookup& l, const uint8_t* from, int k, int n, uint8_t* to) {
  for (int i = 0; i < n; i += 8) {
    const int64_t byte = int64_t(k + i) / 8 * l.bits, left = l.row_bytes - byte;
    uint64_t word = 0;
    if (left >= 8) memcpy(&word, from + byte, 8);
    else memcpy(&word, from + byte, size_t(left));
    word = spread(word, l.bits);
    memcpy(to + i, &word, 8);
  }
}

// to (columns) = code x scale + offset of one row, rounded twice as PyTorch does.
inline void unpack_row(const Lookup& l, int64_t row, float* to) {
  constexpr int kPiece = 512;
  const uint8_t* from = l.codes + row * l.row_bytes;
  const int64_t unit = l.by_row ? row : 0;
  const float scale = l.scale[unit], step = float(l.step), low = float(l.low);
  uint8_t numbers[kPiece] = {};
  for (int k = 0; k < l.columns; k += kPiece) {
    const int n = l.columns - k < kPiece ? l.columns - k : kPiece;
    const bool bytes = l.bits == 8;
    if (!bytes) read_numbers(l, from, k, n, numbers);
    const uint8_t* number = bytes ? from + k : numbers;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + k + i, (load_bytes(number + i) * step + low) * scale);
    for (; i < n; ++i) to[k + i] = (float(number[i]) * step + low) * scale;
  }
  if (l.offset != nullptr)
    for (int k = 0; k < l.columns; ++k) to[k] += l.offset[unit];
}

// out (count, columns). False if an id is no row.
inline bool look_up(const Lookup& l, const int64_t* ids, int count, float* out) {
  int i = 0;
  for (; i < count && ids[i] >= 0 && ids[i] < l.rows; ++i) unpack_row(l, ids[i], out + size_t(i) * size_t(l.columns));
  return i == count;
}

// Rows of weights that are unpacked at a time, and of weights and inputs that are multiplied in registers: 4 x 4 sums for
// 8 loads a step, 4 x 2 for 6 where there are 16 registers.
constexpr int kUnpacked = 8, kWeights = 4, kInputs = kLanes == 16 ? 4 : 2;

// to[i * stride + j] = x[i] · w[j] + bias[j]; rows of x and w are `width` floats, in whole registers.
template <int inputs>
inline void dots(const float* x, const float* w, size_t width, const float* bias, int weights, size_t stride, float* to) {
  Floats sums[inputs][kWeights] = {};
  for (size_t k = 0; k < width; k += kLanes)
    for (int i = 0; i < inputs; ++i)
      for (int j = 0; j < kWeights; ++j) sums[i][j] += load(x + size_t(i) * width + k) * load(w + size_t(j) * width + k);
  for (int i = 0; i < inputs; ++i)
    for (int j = 0; j < weights; ++j) to[size_t(i) * stride + size_t(j)] = add_up(sums[i][j]) + (bias == nullptr ? 0 : bias[j]);
}

constexpr int kFewRows = 4, kTableRows = 64;  // rows of x that codes unpacked in registers serve, and of weights in one piece of work

// Few rows of x times codes of 1, 2, 4 or 8 bits, unpacked in registers: a step takes one field of each word, so that x
// lies in that order, field by field of `kLanes` words. Rows of codes come one after the other, as memory is fetched best;
// `kFewRows` sums hide the time that each takes. They are of codes around zero. totals: of x, which the rest of each value
// is multiplied by.
template <int bits, int inputs>
inline void few_dots(const Lookup& l, const float* x, const float* totals, int64_t row0, int64_t rows, const float* bias,
                     int count, float* out) {
  constexpr int kSums = kFewRows / inputs, kFields = 32 / bits, kBytes = 4 * kLanes, kHalf = 1 << (bits - 1);
  const int64_t whole = l.row_bytes / kBytes, rest = l.row_bytes % kBytes, width = up(int(l.row_bytes), kBytes) * 8 / bits;
  for (int64_t row = row0; row < row0 + rows; ++row) {
    Floats sums[inputs][kSums] = {};
    const uint8_t* from = l.codes + row * l.row_bytes;
    const auto step = [&](Ints words, const float* part) {
#pragma GCC unroll 32
      for (int field = 0; field < kFields; ++field) {
        const Ints number = (words >> (bits * field) & ((1 << bits) - 1)) | 0x4B000000;  // as floats, 2**23 more
        const Floats code = Floats(number) - float((1 << 23) + kHalf);
        for (int i = 0; i < inputs; ++i) sums[i][field % kSums] += load(part + i * width + field * kLanes) * code;
      }
    };
    for (int64_t r = 0; r < whole; ++r) {
      if (inputs == kFewRows) __builtin_prefetch(from + r * kBytes + 4096);  // fewer inputs read so fast that it is in the way
      step(load<Ints>(from + r * kBytes), x + r * kFields * kLanes);
    }
    if (rest > 0) {
      Ints words = {};
      memcpy(&words, from + whole * kBytes, size_t(rest));
      step(words, x + whole * kFields * kLanes);
    }
    const int64_t unit = l.by_row ? row : 0;
    const float scale = float(l.step) * l.scale[unit], added = bias == nullptr ? 0 : bias[row];
    const float base = float(l.low + kHalf * l.step) * l.scale[unit] + (l.offset == nullptr ? 0 : l.offset[unit]);
    for (int i = 0; i < inputs && i < count; ++i) {
      for (int j = 1; j < kSums; ++j) sums[i][0] += sums[i][j];
      out[i * l.rows + row] = add_up(sums[i][0]) * scale + totals[i] * base + added;
    }
  }
}

// The whole product for few rows of x; they are put in the order of words first.
template <int bits>
inline int few_products(const Lookup& l, const float* x, int count, const float* bias, int threads, float* out) {
  constexpr int kFields = 32 / bits, kCodes = kFields * kLanes;
  const int width = up(l.columns, kCodes), inputs = count == 3 ? 4 : count;
  auto* lying = static_cast<float*>(scratch.get(size_t(width) * size_t(inputs) * sizeof(float)));
  if (lying == nullptr) return kNoMemory;
  float totals[kFewRows];
  for (int i = 0; i < inputs; ++i) {
    double total = 0;
    for (int k = 0; k < width; ++k) {
      const int word = k / kFields, field = k % kFields;
      const float value = i < count && k < l.columns ? x[size_t(i) * size_t(l.columns) + size_t(k)] : 0;
      lying[i * width + word / kLanes * kCodes + field * kLanes + word % kLanes] = value;
      total += double(value);
    }
    totals[i] = float(total);
  }
  const auto product = inputs == 1 ? few_dots<bits, 1> : inputs == 2 ? few_dots<bits, 2> : few_dots<bits, 4>;
  parallel(int((l.rows + kTableRows - 1) / kTableRows), threads, [&](int chunk, int) {
    const int64_t first = int64_t(chunk) * kTableRows;
    product(l, lying, totals, first, l.rows - first < kTableRows ? l.rows - first : kTableRows, bias, count, out);
  });
  return kOk;
}

// out (count, rows of the table) = x (count, columns) · tableᵀ + bias. The weights are read once, as codes, and unpacked
// into the first cache; one row of x waits for memory, a byte a product at 8 bits.
inline int multiply_floats(const Lookup& l, const float* x, int count, const float* bias, int threads, float* out) {
  const size_t width = size_t(up(l.columns, kLanes)), rows = size_t(l.rows), tile = kUnpacked * width;
  threads = worth(double(count + 8) * double(l.rows) * double(l.columns), threads);
  if (count > 0 && count <= kFewRows && (l.bits & (l.bits - 1)) == 0) {
    const auto few = l.bits == 1 ? few_products<1> : l.bits == 2 ? few_products<2> : l.bits == 4 ? few_products<4> : few_products<8>;
    return few(l, x, count, bias, threads, out);
  }
  const bool whole = int(width) == l.columns;
  const size_t copy = whole ? 0 : width * size_t(count);
  auto* memory = static_cast<float*>(scratch.get((copy + tile * size_t(threads)) * sizeof(float)));
  if (memory == nullptr) return kNoMemory;
  for (int i = 0; i < count && !whole; ++i) {
    memcpy(memory + size_t(i) * width, x + size_t(i) * size_t(l.columns), size_t(l.columns) * sizeof(float));
    for (size_t k = size_t(l.columns); k < width; ++k) memory[size_t(i) * width + k] = 0;
  }
  const float* from = whole ? x : memory;
  float* tiles = memory + copy;
  parallel(int((rows + kUnpacked - 1) / kUnpacked), threads, [&](int chunk, int slot) {
    float* w = tiles + size_t(slot) * tile;
    const size_t first = size_t(chunk) * kUnpacked, many = rows - first < kUnpacked ? rows - first : kUnpacked;
    if (!whole || many < kUnpacked) memset(w, 0, tile * sizeof(float));
    for (size_t j = 0; j < many; ++j) unpack_row(l, int64_t(first + j), w + j * width);
    for (int i = 0; i < count;) {
      const int at_once = count - i >= kInputs ? kInputs : 1;
      for (size_t j = 0; j < many; j += kWeights) {
        const int weights = many - j < kWeights ? int(many - j) : kWeights;
        const float* row = from + size_t(i) * width;
        float* to = out + size_t(i) * rows + first + j;
        const float* added = bias == nullptr ? nullptr : bias + first + j;
        if (at_once == kInputs) dots<kInputs>(row, w + j * width, width, added, weights, rows, to);
        else dots<1>(row, w + j * width, width, added, weights, rows, to);
      }
      i += at_once;
    }
  });
  scratch.trim(64 << 20);
  return kOk;
}

}  // namespace
