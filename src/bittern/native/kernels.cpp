// Products of quantized activations and packed weights, and what stands between them in a Transformer, for CPUs.
//
// A plain C interface without any framework: the caller owns all memory and has checked sizes (see products.py).
// The file is compiled once for each kind of CPU; the library that suits the machine is chosen when it is loaded.
// Floats must be finite (or be clipped to finite ones): functions that read unchecked ones return 1 if they are not, and
// the caller does without us.

#include "block.h"
#include "conv.h"
#include "lookup.h"
#include "losses.h"
#include "objects.h"
#include "rounding.h"

extern "C" {

// Counts changes of functions and structures below; library.py has the same number.
int bittern_interface() { return 9; }

// Asks the system for what this kind of CPU needs; 0 if it is granted or nothing is needed. openmp: see pool.h; may be null.
int bittern_start(Parallel openmp) { return lend(openmp), start() ? 0 : 1; }

void bittern_pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* panels) {
  pack(codes, rows, columns, bits, panels);
}

void bittern_unpack(const uint8_t* panels, int rows, int columns, int bits, uint8_t* codes) {
  unpack(panels, rows, columns, bits, codes);
}

// Rows of floats to bytes (rows up to a multiple of 16, columns up to one of 64), with scale, offset and sum of each row.
int bittern_quantize(const float* x, int columns, const Format* format, int threads, const Codes* out) {
  return quantize_rows(x, columns, *format, threads, *out);
}

// n values, in rows of `columns` if each has its scale, to what their codes stand for.
int bittern_round(const float* x, int64_t n, int columns, const Format* format, int threads, float* out) {
  return round_values(x, n, columns, *format, threads, out);
}

// The same for ternary codes; columns: n for one scale. A magnitude above `factor` times their mean is kept.
int bittern_round_ternary(const float* x, int64_t n, int64_t columns, float factor, float clip, int threads, float* out) {
  return round_ternary(x, n, columns, factor, clip, threads, out);
}

// What each candidate for the scales of each row loses.
void bittern_losses(const Losses* losses, int threads) { row_losses(*losses, threads); }

// out (rows, outputs) = quantized rows x packed weights + bias, then the activation.
int bittern_linear(const Codes* rows, const Layer* layer, int activation, int threads, float* out) {
  return multiply(*rows, *layer, activation, kPastCaches, threads, out);
}

// The same of images (batch, height, width, channels): out (batch, out height, out width, outputs); see conv.h.
int bittern_convolve(const float* x, const Convolution* convolution, const Layer* layer, int threads, float* out) {
  return convolve(x, *convolution, *layer, threads, out);
}

// out (rows, outputs) from floats (rows, inputs), which become codes as the layer says.
int bittern_product(const Layer* layer, const float* x, int rows, int threads, float* out) {
  if (rows == 0) return kOk;
  const size_t padded = size_t(up(rows, kPanel));
  auto* numbers = static_cast<float*>(block_scratch.get(padded * (12 + size_t(up(layer->inputs, kAlign)))));
  if (numbers == nullptr) return kNoMemory;
  auto* sums = reinterpret_cast<int32_t*>(numbers + 2 * padded);
  const Codes codes{reinterpret_cast<int8_t*>(sums + padded), numbers, numbers + padded, sums, rows};
  return in_team(steps(rows, *layer), threads, [&] {
    const int failed = quantize_rows(x, layer->inputs, layer->input, threads, codes);
    return failed ? failed : multiply(codes, *layer, kNone, kPastCaches, threads, out);
  });
}

// out = (x - mean) / deviation of each row, times weight, plus bias.
int bittern_norm(const float* x, int rows, int columns, const float* weight, const float* bias, float epsilon,
                 int threads, float* out) {
  const Norm norm{weight, bias, epsilon};
  return add_and_norm(x, nullptr, rows, columns, nullptr, &norm, threads, out), kOk;
}

int bittern_activate(const float* x, int64_t count, int activation, int threads, float* out) {
  const int piece = 8192, chunks = int((count + piece - 1) / piece);
  parallel(chunks, worth(double(count) * 4, threads), [&](int chunk, int) {
    const int64_t first = int64_t(chunk) * piece, n = count - first < piece ? count - first : piece;
    activate(x + first, int(n), activation, out + first);
  });
  return kOk;
}

// Attention with quantized queries, keys, values and map; see attention.h.
int bittern_attention(const Attention* attention, int threads) { return attend(*attention, Coded{}, threads); }

// Whole Transformer blocks, of which each reads what the one before gave; see block.h. mask: null, or with its strides as
// in Attention. outs: where each block's output goes.
int bittern_blocks(const Block* const* blocks, int count, const float* x, int batch, int tokens, const float* mask,
                   const int64_t* mask_strides, int threads, float* const* outs) {
  const double work = 2 * count * steps(batch * tokens, blocks[0]->up);
  return in_team(work, threads, [&] { return run_blocks(blocks, count, x, batch, tokens, mask, mask_strides, threads, outs); });
}

// A block in two calls, between which the caller adds keys and values to those of earlier tokens. The first makes them and
// the queries: (batch, tokens, heads, dim). The second reads queries as these, and keys and values (batch, heads, keys, dim).
int bittern_project(const Block* block, const float* x, int batch, int tokens, int threads, float* query, float* key,
                    float* value) {
  BlockRun run(*block, batch, tokens, 1, threads);
  const double work = 3 * steps(batch * tokens, block->query);
  return in_team(work, threads, [&] { return run.project(x, nullptr, query, key, value); });
}

int bittern_finish(const Block* block, const float* x, int batch, int tokens, const float* query, const float* key,
                   const float* value, int keys, const float* mask, const int64_t* mask_strides, int threads, float* out) {
  const BlockRun run(*block, batch, tokens, keys, threads);
  const int64_t dim = block->dim, value_dim = block->value_dim;
  const int64_t key_strides[3] = {block->key_heads * keys * dim, keys * dim, dim};
  const int64_t value_strides[3] = {block->key_heads * keys * value_dim, keys * value_dim, value_dim};
  return in_team(2 * steps(batch * tokens, block->up), threads, [&] {
    return run.finish(x, query, key, value, keys, key_strides, value_strides, mask, mask_strides, out, nullptr);
  });
}

// Rows of an embedding by their numbers; 1 if there is no such row.
int bittern_rows(const Lookup* lookup, const int64_t* ids, int count, float* out) {
  return look_up(*lookup, ids, count, out) ? 0 : 1;
}

// out (count, rows of the table) = x (count, columns) x their values, plus bias, which may be null: nothing is rounded.
int bittern_multiply_floats(const Lookup* table, const float* x, int count, const float* bias, int threads, float* out) {
  return multiply_floats(*table, x, count, bias, threads, out);
}

// 1 if Python's objects hold what they held. Called with the interpreter's lock.
int bittern_unchanged(const Objects* objects) { return unchanged(*objects) ? 1 : 0; }

}  // extern "C"
