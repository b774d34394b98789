// Quantized rows x packed weights, to floats.
#pragma once

#include "quantize.h"

namespace {

enum Activation { kNone, kGelu, kGeluTanh, kSilu, kRelu };

template <typename F>
void in_place(float* x, int n, F f) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] = f(x[i]);
}

void activate(float* x, int n, int activation) {
  switch (activation) {
    case kGelu: return in_place(x, n, [](float v) { return gelu(v); });
    case kGeluTanh: return in_place(x, n, [](float v) { return gelu_tanh(v); });
    case kSilu: return in_place(x, n, [](float v) { return v * sigmoid(v); });
    case kRelu: return in_place(x, n, [](float v) { return v > 0 ? v : 0.0f; });
    default: return;
  }
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
  int8_t* codes = nullptr;  // where codes of the output go in its place, of rows padded to kAlign, and by which rule
  Coding next = {};
  std::atomic<bool>* finite = nullptr;  // to be cleared if an output has no code
  const uint8_t* after = nullptr;  // panels of the next product
  Found* found = nullptr;          // to be told the range of the output
  Range* seen = nullptr;           // what one piece of work sees of it
};

constexpr size_t kStream = 2 << 20;  // bytes of an output beyond which no core's cache holds it

using PanelFloats = float __attribute__((vector_size(4 * kPanel)));
using PanelInts = int32_t __attribute__((vector_size(4 * kPanel)));

// The floats of a row and of P panels, of which the first `real` are outputs.
template <int P>
inline void write(const Linear& l, const PanelFloats* value, float* out, int real) {
  if (real < P * kPanel) memcpy(out, value, sizeof(float) * size_t(real));
  else if (l.stream)
    for (int i = 0; i < P * kPanel; i += kLanes) stream(out + i, load(reinterpret_cast<const float*>(value) + i));
  else memcpy(out, value, sizeof(PanelFloats) * P);
}

// Outputs of some rows and of P panels from their integer sums. Those that get an activation or become codes lie together
// first: constants of a function are loaded once for all of them. A row of the output is written in one go: rows lie far
// apart, and each visit costs a look-up of its page.
template <int P, bool offsets>
inline void finish(const Linear& l, int row0, int rows, int output, const int32_t* sums, size_t next_sums) {
  const bool direct = l.activation == kNone && l.codes == nullptr && l.found == nullptr;
  const int width = P * kPanel, real = l.outputs - output < width ? l.outputs - output : width;
  PanelFloats weight_scale[P], bias[P], weight_sum[P];
  PanelInts shifted[P];
  for (int p = 0; p < P; ++p) {
    memcpy(&weight_scale[p], l.weight_scale + output + p * kPanel, sizeof(PanelFloats));
    memcpy(&bias[p], l.bias + output + p * kPanel, sizeof(PanelFloats));
    memcpy(&shifted[p], l.weight_sums + output + p * kPanel, sizeof(PanelInts));
    weight_sum[p] = __builtin_convertvector(shifted[p], PanelFloats);
    shifted[p] *= l.shift;
  }
  alignas(64) float together[kTile * P * kPanel];
  for (int r = 0; r < rows; ++r, sums += kPanel) {
    const float scale = l.scale[row0 + r], offset = l.offset[row0 + r];
    const int32_t zero = l.zero * l.sums[row0 + r];
    PanelFloats value[P];
    for (int p = 0; p < P; ++p) {
      PanelInts sum;
      memcpy(&sum, sums + p * next_sums, sizeof(sum));
      sum -= zero;
      if (offsets) {
        const PanelFloats exact = __builtin_convertvector(sum + shifted[p], PanelFloats);
        value[p] = weight_scale[p] * (scale * exact + offset * weight_sum[p]) + bias[p];
      } else {
        value[p] = weight_scale[p] * scale * __builtin_convertvector(sum, PanelFloats) + bias[p];
      }
    }
    if (direct) write<P>(l, value, l.out + size_t(row0 + r) * l.outputs + output, real);
    else memcpy(together + r * width, value, sizeof(value));
  }
  if (direct) return;
  activate(together, rows * width, l.activation);
  if (l.found != nullptr) {
    const bool all = real == width;  // else zeros follow the outputs
    for (int r = 0; r < (all ? 1 : rows); ++r) l.seen->see(together + r * width, all ? rows * width : real, l.found->extremes_too);
  }
  if (l.codes == nullptr) {
    for (int r = 0; r < rows; ++r) {
      const auto* value = reinterpret_cast<const PanelFloats*>(together + r * width);
      write<P>(l, value, l.out + size_t(row0 + r) * l.outputs + output, real);
    }
    return;
  }
  if (largest(together, rows * width) >= kInfinity) l.finite->store(false);
  const Rounder round(l.next);
  const size_t stride = size_t(up(l.outputs, kAlign));
  int8_t* to = l.codes + size_t(row0) * stride + output;
  constexpr int kRegisters = P * kPanel / kLanes;
  for (int r = 0; r < rows; ++r, to += stride) {
    if (real < width) {
      to_codes(together + r * width, real, round, to, real);
      continue;
    }
    Floats value[kRegisters];
    Ints bits[kRegisters];
    memcpy(value, together + r * width, sizeof(value));
    round.bits<kRegisters>(value, bits);
    for (int i = 0; i < kRegisters; ++i) store_bytes(to + i * kLanes, bits[i]);
  }
}

inline void finish(const Linear& l, int row0, int rows, int output, int count, const int32_t* sums, size_t next_sums) {
  const auto with = [&](auto one, auto pair) { (count == kPair ? pair : one)(l, row0, rows, output, sums, next_sums); };
  if (l.offsets) with(finish<1, true>, finish<kPair, true>);
  else with(finish<1, false>, finish<kPair, false>);
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
  const bool as_they_lie = l.bits == 8 && kPlanes == 1;
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
               size_t(width), some, groups, l.bits, l.top, mine, next_sums, at > 0, ahead);
      if (last) finish(l, row0 + r, some, first * kPanel, count, mine, next_sums);
    }
  }
}

// All of the product; memory for the threads comes from `scratch`.
inline int multiply_all(Linear l, int threads) {
  if (l.rows == 0 || l.outputs == 0) return kOk;
  const bool lines = l.outputs % kPanel == 0 && reinterpret_cast<uintptr_t>(l.out) % 64 == 0;
  l.zero -= flip(l.bits);
  l.stream = l.stream && lines && size_t(l.rows) * size_t(l.outputs) * sizeof(float) > kStream;
  const int pairs = up(up(l.outputs, kPanel) / kPanel, kPair) / kPair;
  const int pieces = up(l.rows, kRows) / kRows, each = up(up(l.rows, pieces) / pieces, 16);
  threads = worth(double(l.rows) * l.columns * l.outputs / 64, threads);
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
