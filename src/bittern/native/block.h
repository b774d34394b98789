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

inline double steps(int rows, const Layer& layer) { return steps(rows, layer.inputs, layer.outputs); }

inline int quantize_rows(const float* x, int columns, const Format& format, int threads, const Codes& to,
                         const Range* known = nullptr) {
  return quantize_rows(x, to.rows, columns, format, threads, to.codes, to.scale, to.offset, to.sums, known);
}

inline Linear product(const Codes& a, const Layer& layer, int activation, Output where, float* out) {
  const Format& f = layer.input;
  return Linear{a.codes, a.scale, a.offset, a.sums, layer.panels, layer.scale, layer.bias, layer.sums, out,
                a.rows, layer.inputs, layer.outputs, layer.bits, layer.top, layer.zero, f.shift, activation,
                f.scheme == 2 || f.shift > 0, where == kPastCaches};
}

// then: the layer that multiplies next, if it is known; found: to be told the range of the output.
inline int multiply(const Codes& a, const Layer& layer, int activation, Output where, int threads, float* out,
                    const Layer* then = nullptr, Found* found = nullptr) {
  Linear l = product(a, layer, activation, where, out);
  if (then != nullptr) l.after = then->panels;
  l.found = found;
  return multiply_all(l, threads);
}

// The same to codes with a static scale, without the floats: a quarter of the memory, written and read once.
inline int multiply_to_codes(const Codes& a, const Layer& layer, int activation, const Format& next, int threads, int8_t* to,
                             const Layer& then) {
  Linear l = product(a, layer, activation, kCached, nullptr);
  const Rounder round(coding(next, Range{}));
  std::atomic<bool> finite{true};
  l.after = then.panels, l.codes = to, l.next = &round, l.finite = &finite;
  if (const int failed = multiply_all(l, threads)) return failed;
  return finite.load() ? kOk : kNotFinite;
}

// What else the next product reads of codes that were written with a static scale: padding, scales and sums.
inline void add_numbers(const Codes& to, int columns, const Format& format, int threads) {
  const int width = up(columns, kAlign), piece = 16;
  parallel(up(to.rows, piece) / piece, worth(double(to.rows) * width / 4, threads), [&](int chunk, int) {
    for (int r = chunk * piece; r < to.rows && r < (chunk + 1) * piece; ++r) {
      int8_t* row = to.codes + size_t(r) * size_t(width);
      memset(row + columns, 0, size_t(width - columns));
      to.scale[r] = format.scale, to.offset[r] = format.offset, to.sums[r] = sum_of(row, columns);
    }
  });
}

thread_local Scratch block_scratch;

// What body returns, with the threads that are worth their hand-over for it.
template <typename F>
int in_team(double work, int threads, F body) {
  int result = kOk;
  with_team(worth(work, threads), [&] { result = body(); });
  block_scratch.trim(64 << 20);
  return result;
}

// sum = x + y (or x, if there is no y), to be kept if `sum` is not null; out = its norm if there is one, whose range may be
// `found`. y may be sum, and x out.
inline void add_and_norm(const float* x, const float* y, int rows, int columns, float* sum, const Norm* norm, int threads,
                         float* out, Found* found = nullptr) {
  const int piece = 16;
  parallel(up(rows, piece) / piece, worth(double(rows) * columns, threads), [&](int chunk, int) {
    Range seen;
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
      if (found != nullptr) seen.see(to, columns, found->extremes_too);
    }
    if (found != nullptr) found->join(seen);
  });
}

inline bool same(const Format& a, const Format& b) { return memcmp(&a, &b, sizeof(Format)) == 0; }

// True if the input of queries, keys or values has a format that reads extremes.
inline bool reads_extremes(const Block& b) { return (b.query.input.scheme | b.key.input.scheme | b.value.input.scheme) != 0; }

// One block at work on x (batch, tokens, hidden), whose queries read `keys` keys.
struct BlockRun {
  const Block& b;
  const int batch, tokens, threads, rows, hidden;
  const bool keeps_map, keeps_inner;  // their scales are not known before
  uint8_t* memory = nullptr;
  Codes codes, inside;
  Coded coded = {};
  Format query_format, key_format, value_format;  // of what was coded, with the scales that it got
  float *context, *inner, *sum, *normed;           // inner: also what is to become codes of queries, keys and values

  BlockRun(const Block& block, int batch, int tokens, int keys, int threads)
      : b(block), batch(batch), tokens(tokens), threads(threads), rows(batch * tokens), hidden(b.query.inputs),
        keeps_map(b.map_format.mode != 0), keeps_inner(b.down.input.mode != 0), query_format(b.query_format),
        key_format(b.key_format), value_format(b.value_format) {
    const int wide = b.up.outputs, contexts = b.output.inputs;
    int widest = hidden > wide ? hidden : wide;
    widest = widest > contexts ? widest : contexts;
    const size_t padded = size_t(up(rows, kPanel)), maps = size_t(batch) * b.heads * tokens;
    size_t used = 0, most = keeps_map ? maps * up(keys, kPanel) : 0;
    const auto take = [&](size_t bytes) { return used += (bytes + 127) / 64 * 64, used - (bytes + 127) / 64 * 64; };
    const auto keep = [&](int columns) { most = most > size_t(rows) * columns ? most : size_t(rows) * columns; };
    const size_t at_codes = take(padded * size_t(up(widest, kAlign))), at_numbers = take(padded * 12);
    const auto operand = [&](const Layer& layer, const Format& f) {
      if (f.mode != 0) keep(layer.outputs);
      return take((padded + kPanel) * size_t(up(layer.outputs, kAlign)));
    };
    const size_t at_query = operand(b.query, b.query_format), at_key = operand(b.key, b.key_format);
    const size_t at_value = operand(b.value, b.value_format);
    const size_t at_context = take(b.output.input.mode == 0 ? 0 : size_t(rows) * contexts * 4);
    const size_t at_wide = take(padded * (size_t(keeps_inner ? 0 : up(wide, kAlign)) + 12));
    if (keeps_inner) keep(wide);
    const size_t at_inner = take(most * 4), at_sum = take(size_t(rows) * hidden * 4), at_norm = take(size_t(rows) * hidden * 4);
    const size_t at_factors = take(keeps_map ? maps * 4 : 0);
    memory = static_cast<uint8_t*>(block_scratch.get(used));
    const auto floats = [&](size_t at) { return reinterpret_cast<float*>(memory + at); };
    const auto codes_at = [&](size_t at, size_t at_numbers) {
      float* numbers = floats(at_numbers);
      return Codes{reinterpret_cast<int8_t*>(memory + at), numbers, numbers + padded,
                   reinterpret_cast<int32_t*>(numbers + 2 * padded), rows};
    };
    codes = codes_at(at_codes, at_numbers), inside = codes_at(at_wide + padded * 12, at_wide);
    const auto rows_at = [&](size_t at, const Layer& layer) {
      return CodeRows{reinterpret_cast<int8_t*>(memory + at), size_t(up(layer.outputs, kAlign))};
    };
    coded.query = rows_at(at_query, b.query), coded.key = rows_at(at_key, b.key), coded.value = rows_at(at_value, b.value);
    coded.factors = keeps_map ? floats(at_factors) : nullptr;
    coded.context_format = b.output.input, coded.context_stride = size_t(up(contexts, kAlign));
    coded.context = b.output.input.mode == 0 ? codes.codes : nullptr, context = floats(at_context);
    inner = floats(at_inner), sum = floats(at_sum), normed = floats(at_norm);
  }

  // known: the range of all values, where it was found when they were made.
  int read_codes(const float* from, const Layer& layer, const Range* known = nullptr) const {
    return quantize_rows(from, layer.inputs, layer.input, threads, codes, known);
  }

  // Queries, keys and values of x, as floats or, where these are null, as codes.
  int project(const float* x, const Range* known, float* query, float* key, float* value) {
    if (memory == nullptr) return kNoMemory;
    Found found(reads_extremes(b));
    if (b.pre_norm) {
      add_and_norm(x, nullptr, rows, hidden, nullptr, &b.norms[0], threads, normed, &found);
      x = normed, known = &found.range;
    }
    const Layer* before = nullptr;
    const auto each = [&](const Layer& layer, Format* format, const CodeRows& rows, float* out, const Layer& then) {
      if (before == nullptr || !same(before->input, layer.input))
        if (const int failed = read_codes(x, layer, known)) return failed;
      before = &layer;
      auto* to = const_cast<int8_t*>(rows.codes);
      if (out != nullptr) return multiply(codes, layer, kNone, kPastCaches, threads, out, &then);
      if (format->mode == 0) return multiply_to_codes(codes, layer, kNone, *format, threads, to, then);
      Found made(*format);
      if (const int failed = multiply(codes, layer, kNone, kCached, threads, inner, &then, &made)) return failed;
      const Codes all{to, inside.scale, inside.offset, inside.sums, codes.rows};
      if (const int failed = quantize_rows(inner, layer.outputs, *format, threads, all, &made.range)) return failed;
      format->scale = coding(*format, made.range).scale, format->mode = 0;  // attention knows symmetric operands only
      return kOk;
    };
    if (const int failed = each(b.query, &query_format, coded.query, query, b.key)) return failed;
    if (const int failed = each(b.key, &key_format, coded.key, key, b.value)) return failed;
    return each(b.value, &value_format, coded.value, value, b.output);
  }

  // Attention of these queries, keys and values (null: of the codes), with strides as in Attention, and all that follows.
  // found: to be told the range of the output.
  int finish(const float* x, const float* query, const float* key, const float* value, int keys, const int64_t* key_strides,
             const int64_t* value_strides, const float* mask, const int64_t* mask_strides, float* out, Found* found) const {
    if (memory == nullptr) return kNoMemory;
    const int64_t wide = b.query.outputs;
    Attention a{query, key, value, mask, keeps_map ? inner : nullptr, context, {tokens * wide, b.dim, wide}, {}, {}, {},
                batch, b.heads, b.key_heads, tokens, keys, b.dim, b.value_dim, b.scaling, query_format, key_format,
                value_format, b.map_format};
    if (key != nullptr)
      memcpy(a.key_strides, key_strides, sizeof(a.key_strides)), memcpy(a.value_strides, value_strides, sizeof(a.value_strides));
    if (mask != nullptr) memcpy(a.mask_strides, mask_strides, sizeof(a.mask_strides));
    const CodeRows none = {};
    Coded given = coded;
    given.query = query ? none : coded.query, given.key = key ? none : coded.key, given.value = value ? none : coded.value;
    if (const int failed = attend(a, given, threads)) return failed;
    if (coded.context != nullptr) add_numbers(codes, b.output.inputs, b.output.input, threads);
    else if (const int failed = read_codes(context, b.output)) return failed;
    if (const int failed = multiply(codes, b.output, kNone, kPastCaches, threads, sum, &b.up)) return failed;
    Found of_norm(b.up.input), of_inner(b.down.input);
    add_and_norm(sum, x, rows, hidden, sum, &b.norms[b.pre_norm ? 1 : 0], threads, normed, &of_norm);
    if (const int failed = read_codes(normed, b.up, &of_norm.range)) return failed;
    if (keeps_inner) {
      const bool whole = b.down.input.mode == 1;  // one range, not one of each row
      if (const int failed = multiply(codes, b.up, b.activation, kCached, threads, inner, &b.down, whole ? &of_inner : nullptr))
        return failed;
      if (const int failed = read_codes(inner, b.down, whole ? &of_inner.range : nullptr)) return failed;
    } else {
      if (const int failed = multiply_to_codes(codes, b.up, b.activation, b.down.input, threads, inside.codes, b.down))
        return failed;
      add_numbers(inside, b.down.inputs, b.down.input, threads);
    }
    if (const int failed = multiply(keeps_inner ? codes : inside, b.down, kNone, kPastCaches, threads, out)) return failed;
    if (b.pre_norm) add_and_norm(out, sum, rows, hidden, out, nullptr, threads, nullptr);
    else add_and_norm(out, normed, rows, hidden, out, &b.norms[1], threads, out, found);
    return kOk;
  }
};

// known: the range of x, or null; found: to be told that of the output, if that is a norm.
inline int run_block(const Block& b, const float* x, const Range* known, int batch, int tokens, const float* mask,
                     const int64_t* mask_strides, int threads, float* out, Found* found) {
  if (batch * tokens == 0) return kOk;
  BlockRun run(b, batch, tokens, tokens, threads);
  if (const int failed = run.project(x, known, nullptr, nullptr, nullptr)) return failed;
  return run.finish(x, nullptr, nullptr, nullptr, tokens, nullptr, nullptr, mask, mask_strides, out, found);
}

// Blocks of which each reads what the one before gave.
inline int run_blocks(const Block* const* blocks, int count, const float* x, int batch, int tokens, const float* mask,
                      const int64_t* mask_strides, int threads, float* const* outs) {
  Range known;
  int result = kOk;
  for (int i = 0; i < count && result == kOk; ++i) {
    Found found(i + 1 < count && reads_extremes(*blocks[i + 1]));
    const bool normed = i > 0 && !blocks[i - 1]->pre_norm;
    result = run_block(*blocks[i], i == 0 ? x : outs[i - 1], normed ? &known : nullptr, batch, tokens, mask, mask_strides,
                       threads, outs[i], &found);
    known = found.range;
  }
  return result;
}

}  // namespace
