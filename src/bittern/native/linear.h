// Quantized rows x packed weights, to floats.
#pragma once

#include "quantize.h"

namespace {

enum Activation { kNone, kGelu, kGeluTanh, kSilu, kRelu };

// then(the activation, a function of a register).
template <typename Then>
inline void with_activation(int activation, Then then) {
  switch (activation) {
    case kGelu: return then([](const Floats& v) { return gelu(v); });
    case kGeluTanh: return then([](const Floats& v) { return gelu_tanh(v); });
    case kSilu: return then([](const Floats& v) { return v * sigmoid(v); });
    case kRelu: return then([](const Floats& v) { return larger(Floats{}, v); });
    default: return then([](const Floats& v) { return v; });
  }
}

void activate(const float* x, int n, int activation, float* to) {
  with_activation(activation, [=](auto f) {
    registers(x, n, [=](int at, const Floats& v, int count) { store_some(to + at, f(v), count); });
  });
}

struct Linear {
  const int8_t* a;
  const float *scale, *offset;
  const int32_t* sums;
  const uint8_t* panels;
  const float *weight_scale, *bias;
  const int32_t* weight_sums;
  float* out;
  int rows, columns, outputs, bits, top, zero, shift, activation;
  bool offsets, stream;  // stream: write past the caches, if the output is too large for them
  int8_t* codes = nullptr;  // where codes of the output go in its place, of rows padded to kAlign, and how they are made
  const Rounder* next = nullptr;
  std::atomic<bool>* finite = nullptr;  // to be cleared if an output has no code
  const uint8_t* after = nullptr;  // panels of the next product
  Found* found = nullptr;          // to be told the range of the output
  Range* seen = nullptr;           // what one piece of work sees of it
};

constexpr size_t kStream = 2 << 20;  // bytes of an output beyond which no core's cache holds it

// Outputs of some rows and of P panels from their integer sums, whose place those that become codes take first. A row of the
// output is written in one go: rows lie far apart, and each visit costs a look-up of its page.
template <int P, bool offsets, typename F>
void finish(const Linear& l, int row0, int rows, int output, int32_t* sums, size_t next_sums, F activation) {
  constexpr int kWidth = P * kPanel, kRegisters = kWidth / kLanes;
  const int real = l.outputs - output < kWidth ? l.outputs - output : kWidth;
  const bool to_be_codes = l.codes != nullptr, watched = to_be_codes || l.found != nullptr;
  const auto place = [=](int r, int i) { return sums + r * kPanel + i * kLanes / kPanel * next_sums + i * kLanes % kPanel; };
  Floats weight_scale[kRegisters], bias[kRegisters], weight_sum[kRegisters];
  Ints shifted[kRegisters], size[kRegisters], most = {};  // size: the bits of outputs that are their magnitudes
  for (int i = 0; i < kRegisters; ++i) {
    const int at = output + i * kLanes;
    weight_scale[i] = load(l.weight_scale + at), bias[i] = load(l.bias + at);
    shifted[i] = load<Ints>(l.weight_sums + at), weight_sum[i] = __builtin_convertvector(shifted[i], Floats);
    shifted[i] *= l.shift, size[i] = first(real - i * kLanes) & 0x7fffffff;
  }
  for (int r = 0; r < rows; ++r) {
    const float scale = l.scale[row0 + r], offset = l.offset[row0 + r];
    const int32_t zero = l.zero * l.sums[row0 + r];
    Floats value[kRegisters];
    for (int i = 0; i < kRegisters; ++i) {
      const Ints sum = load<Ints>(place(r, i)) - zero;
      if (offsets) {
        const Floats exact = __builtin_convertvector(sum + shifted[i], Floats);
        value[i] = weight_scale[i] * (scale * exact + offset * weight_sum[i]) + bias[i];
      } else {
        value[i] = weight_scale[i] * scale * __builtin_convertvector(sum, Floats) + bias[i];
      }
    }
    for (Floats& v : value) v = activation(v);
    if (watched)
      for (int i = 0; i < kRegisters; ++i) most = larger(most, Ints(value[i]) & size[i]);
    float* to = to_be_codes ? nullptr : l.out + size_t(row0 + r) * l.outputs + output;
    for (int i = 0; i < kRegisters; ++i) {
      const int left = real - i * kLanes;
      if (to_be_codes) store(place(r, i), value[i]);
      else if (left >= kLanes && l.stream) stream(to + i * kLanes, value[i]);
      else store_some(to + i * kLanes, value[i], left);
    }
  }
  if (!watched) return;
  Range seen;
  seen.see(reinterpret_cast<const float*>(&most), kLanes, false);
  if (l.found != nullptr && l.found->extremes_too)
    for (int r = 0; r < rows; ++r) seen.see(l.out + size_t(row0 + r) * l.outputs + output, real, true);
  if (l.found != nullptr) l.seen->join(seen);
  if (!to_be_codes) return;
  if (!seen.finite()) l.finite->store(false);
  const Rounder round(*l.next);  // not in memory, which bytes that are written could be
  const size_t width = size_t(up(l.outputs, kAlign));
  int8_t* to = l.codes + size_t(row0) * width + output;
  for (int r = 0; r < rows; ++r, to += width) {
    Floats value[kRegisters];
    Ints bits[kRegisters];
    for (int i = 0; i < kRegisters; ++i) value[i] = load(place(r, i));
    round.bits<kRegisters>(value, bits);
    for (int i = 0; i < kRegisters; ++i) store_some(to + i * kLanes, bits[i], real - i * kLanes);
  }
}

inline void finish(const Linear& l, int row0, int rows, int output, int count, int32_t* sums, size_t next_sums) {
  with_activation(l.activation, [&](auto f) {
    using F = decltype(f);
    const auto with = [&](auto one, auto pair) { (count == kPair ? pair : one)(l, row0, rows, output, sums, next_sums, f); };
    if (l.offsets) with(finish<1, true, F>, finish<kPair, true, F>);
    else with(finish<1, false, F>, finish<kPair, false, F>);
  });
}

void multiply_panels(const Linear& l, int pair, int row0, int rows, uint8_t* panel, int32_t* sums) {
  const int width = up(l.columns, kAlign), first = pair * kPair;
  const int all = up(l.outputs, kPanel) / kPanel, count = all - first < kPair ? all - first : kPair;
  const size_t packed = size_t(width) * kPanel * l.bits / 8, next = size_t(kBlock) * kPanel * planes(l.bits);
  const size_t next_sums = size_t(kTile) * kPanel;
  if (rows <= kFew) {
    const auto product = l.bits == 2 ? rows_packed<2> : l.bits == 4 ? rows_packed<4> : rows_packed<8>;
    product(l.panels + first * packed, packed, count, l.a + size_t(row0) * width, size_t(width), rows, l.top, sums,
            next_sums);
    finish(l, row0, rows, first * kPanel, count, sums, next_sums);
    return;
  }
  const bool as_they_lie = rows <= packed_rows() || (l.bits == 8 && kPlanes == 1);
  const size_t block = size_t(kBlock) * kPanel * l.bits / 8;  // bytes of a panel that are multiplied at a time
  for (int at = 0; at < width; at += kBlock) {
    const bool last = at + kBlock >= width;
    const int groups = (last ? width - at : kBlock) / 4;
    const uint8_t* lie = l.panels + first * packed + size_t(at) * kPanel * l.bits / 8;
    for (int p = 0; p < count && !as_they_lie; ++p) expand(lie + p * packed, groups, l.bits, panel + p * next);
    // then come more inputs of these panels, or the next pair, or another product
    const uint8_t* following = first + count < all ? l.panels + (first + count) * packed : l.after;
    const uint8_t* then = !last ? lie + block : following != nullptr ? following : lie;
    Ahead ahead{then, block / size_t(up(rows, 8) / 8 * groups), packed};
    for (int r = 0; r < rows; r += kTile) {
      const int some = rows - r < kTile ? rows - r : kTile;
      ahead.from = then + size_t(r / 8 * groups) * ahead.pace;
      if (last && l.codes == nullptr && !l.stream)  // what will be written must be there, too
        for (int i = r; i < r + some; ++i)
          for (int p = first; p < first + count; ++p) __builtin_prefetch(l.out + size_t(row0 + i) * l.outputs + p * kPanel, 1);
      int32_t* mine = width <= kBlock ? sums : sums + size_t(r) * kPanel * kPair;
      multiply(as_they_lie ? lie : panel, as_they_lie ? packed : next, count, l.a + size_t(row0 + r) * width + at,
               size_t(width), some, groups, as_they_lie ? l.bits : 8, l.bits, l.top, mine, next_sums, at > 0, ahead);
      if (last) finish(l, row0 + r, some, first * kPanel, count, mine, next_sums);
    }
  }
}

// What a product takes, as `worth` counts it: reading the weights takes as long as multiplying 8 rows by them.
inline double steps(int rows, int columns, int outputs) { return double(rows + 8) * columns * outputs / 64; }

// All of the product; memory for the threads comes from `scratch`.
inline int multiply_all(Linear l, int threads) {
  if (l.rows == 0 || l.outputs == 0) return kOk;
  const bool lines = l.outputs % kPanel == 0 && reinterpret_cast<uintptr_t>(l.out) % 64 == 0;
  l.zero -= flip(l.bits);
  l.stream = l.stream && lines && size_t(l.rows) * size_t(l.outputs) * sizeof(float) > kStream;
  const int pairs = up(up(l.outputs, kPanel) / kPanel, kPair) / kPair;
  threads = worth(steps(l.rows, l.columns, l.outputs), threads);
  // enough rows for all threads: each has its own, from one product to the next
  const int least = up(l.rows, kRows) / kRows, pieces = l.rows < kShare * threads ? least : up(least, threads);
  const int each = up(up(l.rows, pieces) / pieces, 16);
  const size_t panel = size_t(kBlock) * kPanel * kPlanes * kPair, all = panel + size_t(kRows) * kPanel * kPair * 4;
  auto* memory = static_cast<uint8_t*>(scratch.get(all * size_t(threads)));
  if (memory == nullptr) return kNoMemory;
  // some pairs at a time, so that a piece of work outweighs taking it, but enough pieces to go round
  const int few = pairs / (4 * threads), step = few < 1 ? 1 : few < 4 ? few : 4, steps = up(pairs, step) / step;
  parallel(steps * pieces, threads, [&](int chunk, int slot) {
    const int row0 = chunk / steps * each, count = l.rows - row0 < each ? l.rows - row0 : each;
    uint8_t* mine = memory + all * size_t(slot);
    const Tiles tiles;
    Linear part = l;
    Range seen;
    part.seen = &seen;
    for (int pair = chunk % steps * step; pair < pairs && pair < (chunk % steps + 1) * step && count > 0; ++pair)
      multiply_panels(part, pair, row0, count, mine, reinterpret_cast<int32_t*>(mine + panel));
    if (l.found != nullptr) l.found->join(seen);
    if (l.stream) drain();
  });
  return kOk;
}

}  // namespace
