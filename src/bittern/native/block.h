// A whole Transformer block in one call: attention and FFN with their norms and residual sums, without a step outside.
#pragma once

#include <utility>

#include "attention.h"
#include "linear.h"

extern "C" {

// A linear layer: packed weights, and the format of its input. top: the largest code; zero: the code that stands for 0;
// sums: of the codes less zero, for each output. scale, bias and sums are padded to a multiple of 16.
struct Layer {
  const uint8_t* panels;
  const float *scale, *bias;
  const int32_t* sums;
  int32_t inputs, outputs, bits, top, zero;
  Format input;
};

struct Norm {
  const float *weight, *bias;
  float epsilon;
};

// Attention of `heads` heads and an FFN. pre_norm: each reads a norm of what it is added to, or else the sum is normed.
struct Block {
  Layer query, key, value, output, up, down;
  Norm norms[2];
  int32_t pre_norm, activation, heads, key_heads, dim, value_dim;
  float scaling;
  Format query_format, key_format, value_format, map_format;
};

// Codes of rows (see bittern_quantize), less the shift of their format.
struct Codes {
  int8_t* codes;
  float *scale, *offset;
  int32_t* sums;
  int32_t rows;
};

}

namespace {

// Where a large output goes. What the next layer reads at once, twice if it has to find a range, stays in the caches.
enum Output { kCached, kPastCaches };

inline int quantize_rows(const float* x, int columns, const Format& format, int threads, const Codes& to) {
  return quantize_rows(x, to.rows, columns, format, threads, to.codes, to.scale, to.offset, to.sums);
}

inline Linear product(const Codes& a, const Layer& layer, int activation, Output where, float* out) {
  const Format& f = layer.input;
  return Linear{a.codes, a.scale, a.offset, a.sums, layer.panels, layer.scale, layer.bias, layer.sums, out,
                a.rows, layer.inputs, layer.outputs, layer.bits, layer.top, layer.zero, f.shift, activation,
                f.scheme == 2 || f.shift > 0, where == kPastCaches};
}

inline int multiply(const Codes& a, const Layer& layer, int activation, Output where, int threads, float* out) {
  return multiply_all(product(a, layer, activation, where, out), threads);
}

// The same to codes with a static scale, without the floats: a quarter of the memory, written and read once.
inline int multiply_to_codes(const Codes& a, const Layer& layer, int activation, const Format& next, int threads,
                             const Codes& to) {
  Linear l = product(a, layer, activation, kCached, nullptr);
  std::atomic<bool> finite{true};
  l.codes = to.codes, l.next = coding(next, Range{}), l.finite = &finite;
  if (const int failed = multiply_all(l, threads)) return failed;
  const int width = up(layer.outputs, kAlign), piece = 16;
  parallel(up(to.rows, piece) / piece, worth(double(to.rows) * width / 4, threads), [&](int chunk, int) {
    for (int r = chunk * piece; r < to.rows && r < (chunk + 1) * piece; ++r) {
      int8_t* row = to.codes + size_t(r) * size_t(width);
      memset(row + layer.outputs, 0, size_t(width - layer.outputs));
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < width; ++i) sum += row[i];
      to.scale[r] = l.next.scale, to.offset[r] = l.next.offset, to.sums[r] = sum;
    }
  });
  return finite.load() ? kOk : kNotFinite;
}

thread_local Scratch block_scratch;

// sum = x + y (or x, if there is no y), to be kept if `sum` is not null; out = its norm if there is one. y may be sum,
// and x out.
inline void add_and_norm(const float* x, const float* y, int rows, int columns, float* sum, const Norm* norm, int threads,
                         float* out) {
  const int piece = 16;
  parallel(up(rows, piece) / piece, worth(double(rows) * columns, threads), [&](int chunk, int) {
    for (int r = chunk * piece; r < rows && r < (chunk + 1) * piece; ++r) {
      const float* from = x + size_t(r) * columns;
      if (y != nullptr) {
        const float* other = y + size_t(r) * columns;
        float* to = sum + size_t(r) * columns;
#pragma omp simd
        for (int i = 0; i < columns; ++i) to[i] = from[i] + other[i];
        from = to;
      }
      if (norm == nullptr) continue;
      float* to = out + size_t(r) * columns;
      const float mean = total(from, columns, [](auto v) { return v; }) / float(columns);
      const float square = total(from, columns, [=](auto v) { return (v - mean) * (v - mean); });
      const float factor = 1 / sqrtf(square / float(columns) + norm->epsilon);
#pragma omp simd
      for (int i = 0; i < columns; ++i) to[i] = (from[i] - mean) * factor * norm->weight[i] + norm->bias[i];
    }
  });
}

inline bool same(const Format& a, const Format& b) { return memcmp(&a, &b, sizeof(Format)) == 0; }

inline int run_block(const Block& b, const float* x, int batch, int tokens, const float* mask, const int64_t* mask_strides,
                     int threads, float* out) {
  const int rows = batch * tokens, hidden = b.query.inputs, wide = b.up.outputs;
  const int queries = b.query.outputs, keys = b.key.outputs, values = b.value.outputs, contexts = b.output.inputs;
  if (rows == 0) return kOk;
  int widest = hidden > wide ? hidden : wide;
  widest = widest > contexts ? widest : contexts;
  const size_t padded = size_t(up(rows, kPanel)), map = size_t(batch) * b.heads * tokens * up(tokens, kPanel);
  const bool keeps_map = b.map_format.mode != 0, keeps_inner = b.down.input.mode != 0;  // their scales are not known before
  const size_t inner = keeps_inner && (!keeps_map || size_t(rows) * wide > map) ? size_t(rows) * wide : keeps_map ? map : 0;
  size_t used = 0;
  const auto take = [&](size_t bytes) { return used += (bytes + 127) / 64 * 64, used - (bytes + 127) / 64 * 64; };
  const size_t at_codes = take(padded * size_t(up(widest, kAlign))), at_numbers = take(padded * 12);
  const size_t at_query = take(size_t(rows) * queries * 4), at_key = take(size_t(rows) * keys * 4);
  const size_t at_value = take(size_t(rows) * values * 4), at_context = take(size_t(rows) * contexts * 4);
  const size_t at_wide = take(keeps_inner ? 0 : padded * (size_t(up(wide, kAlign)) + 12));
  const size_t at_inner = take(inner * 4), at_sum = take(size_t(rows) * hidden * 4), at_norm = take(size_t(rows) * hidden * 4);
  auto* memory = static_cast<uint8_t*>(block_scratch.get(used));
  if (memory == nullptr) return kNoMemory;
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(memory + at); };
  const auto codes_at = [&](size_t at, size_t at_numbers) {
    float* numbers = floats(at_numbers);
    return Codes{reinterpret_cast<int8_t*>(memory + at), numbers, numbers + padded,
                 reinterpret_cast<int32_t*>(numbers + 2 * padded), rows};
  };
  const Codes codes = codes_at(at_codes, at_numbers), inside = codes_at(at_wide + padded * 12, at_wide);
  const auto read_codes = [&](const float* from, const Layer& layer) {
    return quantize_rows(from, layer.inputs, layer.input, threads, codes);
  };
  float *sum = floats(at_sum), *normed = floats(at_norm);

  const float* read = x;
  if (b.pre_norm) add_and_norm(x, nullptr, rows, hidden, nullptr, &b.norms[0], threads, normed), read = normed;
  const Layer* before = nullptr;
  for (const auto& [layer, at] : {std::pair{&b.query, at_query}, {&b.key, at_key}, {&b.value, at_value}}) {
    if (before == nullptr || !same(before->input, layer->input))
      if (const int failed = read_codes(read, *layer)) return failed;
    before = layer;
    if (const int failed = multiply(codes, *layer, kNone, kPastCaches, threads, floats(at))) return failed;
  }
  Attention a{floats(at_query), floats(at_key), floats(at_value), mask, keeps_map ? floats(at_inner) : nullptr, floats(at_context),
              {int64_t(tokens) * queries, b.dim, queries}, {int64_t(tokens) * keys, b.dim, keys},
              {int64_t(tokens) * values, b.value_dim, values}, {}, batch, b.heads, b.key_heads, tokens, tokens, b.dim,
              b.value_dim, b.scaling, b.query_format, b.key_format, b.value_format, b.map_format};
  if (mask != nullptr) memcpy(a.mask_strides, mask_strides, sizeof(a.mask_strides));
  if (const int failed = attend(a, threads)) return failed;
  if (const int failed = read_codes(floats(at_context), b.output)) return failed;
  if (const int failed = multiply(codes, b.output, kNone, kPastCaches, threads, sum)) return failed;
  add_and_norm(sum, x, rows, hidden, sum, &b.norms[b.pre_norm ? 1 : 0], threads, normed);
  if (const int failed = read_codes(normed, b.up)) return failed;
  if (keeps_inner) {
    if (const int failed = multiply(codes, b.up, b.activation, kCached, threads, floats(at_inner))) return failed;
    if (const int failed = read_codes(floats(at_inner), b.down)) return failed;
  } else if (const int failed = multiply_to_codes(codes, b.up, b.activation, b.down.input, threads, inside)) {
    return failed;
  }
  if (const int failed = multiply(keeps_inner ? codes : inside, b.down, kNone, kPastCaches, threads, out)) return failed;
  if (b.pre_norm) add_and_norm(out, sum, rows, hidden, out, nullptr, threads, nullptr);
  else add_and_norm(out, normed, rows, hidden, out, &b.norms[1], threads, out);
  return kOk;
}

}  // namespace
