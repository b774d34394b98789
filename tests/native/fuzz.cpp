// The kernels against plain loops on random shapes, in buffers of exactly the size that they may touch: built with
// sanitizers, a read or write beyond one ends the run. Arguments: a seed and how many rounds.
#include "kernels.cpp"
#include "openmp.h"

#include <sys/wait.h>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

thread_local std::mt19937 generator;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> floats(size_t n, float spread = 1) {
  std::vector<float> x(n);
  std::normal_distribution<float> normal(0, spread);
  for (float& v : x) v = normal(generator);
  return x;
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

Format any_format(bool attention, bool map) {
  Format f{0.02f, 0, FLT_MAX, -128, 127, 0, 0, attention ? pick(0, 1) : pick(0, 2)};
  const int bits = pick(2, 8);
  f.scheme = attention ? (map ? pick(0, 1) : 0) : pick(0, 2);
  f.low = f.scheme == 0 ? -(1 << (bits - 1)) : 0;
  f.high = f.scheme == 0 ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  f.shift = f.high > 127 ? 128 : 0;
  if (f.scheme == 2 && f.mode == 0) f.offset = -1.5f;
  if (pick(0, 1)) f.clip = 2.5f;
  return f;
}

void linear(int rows, int columns, int outputs, int threads) {
  const int bits = 1 << pick(1, 3), top = bits == 2 ? pick(1, 3) : (1 << bits) - 1, zero = pick(0, top);
  std::vector<uint8_t> codes(size_t(outputs) * columns), again(codes.size());
  for (uint8_t& c : codes) c = uint8_t(pick(0, 3) ? pick(0, top) : top);
  std::vector<uint8_t> panels(panel_bytes(outputs, columns, bits));
  bittern_pack(codes.data(), outputs, columns, bits, panels.data());
  bittern_unpack(panels.data(), outputs, columns, bits, again.data());
  if (codes != again) fail("unpack is not the inverse of pack");

  const Format f = any_format(false, false);
  const std::vector<float> x = floats(size_t(rows) * columns, pick(0, 9) ? 1 : 100);
  const int padded = up(rows, 16), width = up(columns, 64), panel_outputs = up(outputs, 16);
  std::vector<int8_t> a(size_t(padded) * width);
  std::vector<float> scale(rows), offset(rows), out(size_t(rows) * outputs), weight_scale(panel_outputs, 1.0f);
  std::vector<float> bias(panel_outputs, 0.0f);
  std::vector<int32_t> sums(rows), weight_sums(panel_outputs, 0);
  const Codes rows_codes{a.data(), scale.data(), offset.data(), sums.data(), rows};
  if (bittern_quantize(x.data(), columns, &f, threads, &rows_codes)) fail("finite values are not finite");
  const std::vector<float> own_scale = scale, own_offset = offset;
  for (int r = 0; r < rows; ++r) {
    int sum = 0;
    for (int k = 0; k < width; ++k) sum += a[size_t(r) * width + k];
    if (sum != sums[r]) fail("sum of a row's codes");
    for (int k = 0; k < columns; ++k) {  // the division itself, in the order of quantizers.py
      float v = x[size_t(r) * columns + k];
      v = v < -f.clip ? -f.clip : v > f.clip ? f.clip : v;
      float code = std::nearbyint((v - offset[r]) / scale[r]);
      code = code < float(f.low) ? float(f.low) : code > float(f.high) ? float(f.high) : code;
      if (int(code) != a[size_t(r) * width + k] + f.shift) fail("code of a value");
    }
    scale[r] = 1, offset[r] = 0;  // so that what comes out is the sum of integers
  }
  for (int n = 0; n < outputs; ++n)
    for (int k = 0; k < columns; ++k) weight_sums[n] += int(codes[size_t(n) * columns + k]) - zero;
  const Layer layer{panels.data(), weight_scale.data(), bias.data(), weight_sums.data(), columns, outputs, bits, top, zero, f};
  if (bittern_linear(&rows_codes, &layer, 0, threads, out.data())) fail("linear failed");
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < outputs; ++n) {
      int64_t sum = 0;
      for (int k = 0; k < columns; ++k)
        sum += int64_t(a[size_t(r) * width + k] + f.shift) * (int(codes[size_t(n) * columns + k]) - zero);
      if (float(sum) != out[size_t(r) * outputs + n])
        fail("product of " + std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(outputs));
    }
  scale = own_scale, offset = own_offset;
  std::vector<float> from_floats(out.size());
  if (bittern_linear(&rows_codes, &layer, 0, threads, out.data())) fail("linear failed");
  if (bittern_product(&layer, x.data(), rows, threads, from_floats.data()) || out != from_floats) fail("product of floats");
}

void attention(int threads) {
  const int batch = pick(1, 2), key_heads = pick(1, 2), heads = key_heads * pick(1, 3), queries = pick(1, 90);
  const int keys = pick(1, 90), dim = pick(1, 70), value_dim = pick(1, 70);
  const std::vector<float> q = floats(size_t(batch) * heads * queries * dim), mask = floats(size_t(queries) * keys);
  const std::vector<float> k = floats(size_t(batch) * key_heads * keys * dim);
  const std::vector<float> v = floats(size_t(batch) * key_heads * keys * value_dim);
  std::vector<float> map(size_t(batch) * heads * queries * up(keys, 16)), context(size_t(batch) * queries * heads * value_dim);
  Attention a{q.data(), k.data(), v.data(), pick(0, 1) ? mask.data() : nullptr, map.data(), context.data(),
              {int64_t(queries) * heads * dim, dim, int64_t(heads) * dim},
              {int64_t(keys) * key_heads * dim, dim, int64_t(key_heads) * dim},
              {int64_t(keys) * key_heads * value_dim, value_dim, int64_t(key_heads) * value_dim},
              {0, 0, keys}, batch, heads, key_heads, queries, keys, dim, value_dim, 0.2f,
              any_format(true, false), any_format(true, false), any_format(true, false), any_format(true, true)};
  if (bittern_attention(&a, threads)) fail("attention failed");
  for (size_t row = 0; row < map.size() / size_t(up(keys, 16)); ++row) {
    double sum = 0;
    for (int i = 0; i < keys; ++i) sum += map[row * size_t(up(keys, 16)) + i];
    if (std::abs(sum - 1) > 1e-5) fail("a row of the map does not sum to 1");
  }
}

void rounding(int threads) {
  const int count = pick(0, 60), columns = pick(1, 900);
  const Format f = any_format(false, false);
  const std::vector<float> x = floats(size_t(count) * columns);
  std::vector<float> out(x.size());
  if (bittern_round(x.data(), int64_t(x.size()), columns, &f, threads, out.data())) fail("finite values are not finite");
  if (x.empty()) return;
  std::vector<int8_t> codes(size_t(up(count, 16)) * up(columns, 64));
  std::vector<float> scale(count), offset(count);
  std::vector<int32_t> sums(count);
  const Codes rows{codes.data(), scale.data(), offset.data(), sums.data(), count};
  bittern_quantize(x.data(), columns, &f, threads, &rows);
  for (int r = 0; r < count; ++r)
    for (int k = 0; k < columns; ++k) {
      volatile float value = float(codes[size_t(r) * up(columns, 64) + k] + f.shift) * scale[r];  // rounded here
      if (value + offset[r] != out[size_t(r) * columns + k]) fail("value of a code");
    }
  const int64_t together = pick(0, 1) ? columns : int64_t(x.size());
  if (bittern_round_ternary(x.data(), int64_t(x.size()), together, 0.7f, INFINITY, threads, out.data())) fail("ternary");
  for (size_t i = 0; i < x.size(); ++i)
    if (out[i] != 0 && (out[i] < 0) != (x[i] < 0)) fail("sign of a ternary value");
}

void losses(int threads) {
  const int rows = pick(1, 30), columns = pick(1, 200), candidates = pick(1, 9), rank = 4 * pick(0, 4);
  const std::vector<float> x = floats(size_t(rows) * columns), linear = floats(x.size()), rest = floats(columns);
  const std::vector<float> factors = floats(size_t(rank) * columns), offsets = floats(size_t(candidates) * rows);
  const std::vector<float> scales(offsets.size(), 0.25f);
  std::vector<float> out(offsets.size(), NAN);
  const Losses l{x.data(), scales.data(), pick(0, 1) ? offsets.data() : nullptr, factors.data(), rest.data(),
                 pick(0, 1) ? linear.data() : nullptr, out.data(), rows, columns, candidates, rank, -8, 7};
  bittern_losses(&l, threads);
  for (const float loss : out)
    if (!std::isfinite(loss)) fail("a loss is not finite");
}

void rows(int threads) {
  const int count = pick(0, 40), columns = pick(1, 300);
  const std::vector<float> x = floats(size_t(count) * columns), weight = floats(columns), bias = floats(columns);
  std::vector<float> out(x.size());
  bittern_norm(x.data(), count, columns, weight.data(), bias.data(), 1e-5f, threads, out.data());
  bittern_activate(x.data(), int64_t(x.size()), pick(0, 4), threads, out.data());
}

void look_up(int threads) {
  const int rows = pick(1, 20), columns = pick(0, 9) ? pick(1, 70) : pick(500, 600), bits = pick(1, 8), by_row = pick(0, 1);
  const int64_t row_bytes = (int64_t(columns) * bits + 7) / 8;
  std::vector<uint8_t> codes(size_t(rows * row_bytes));
  for (uint8_t& c : codes) c = uint8_t(pick(0, 255));
  const std::vector<float> scale = floats(by_row ? rows : 1), offset = floats(scale.size());
  const Lookup l{codes.data(), scale.data(), pick(0, 1) ? offset.data() : nullptr, rows, row_bytes, columns, bits, -3, 2, by_row};
  const int64_t ids[3] = {0, rows - 1, pick(0, rows - 1)}, wrong[2] = {pick(-9, -1), rows};
  std::vector<float> out(size_t(3 * columns));
  if (bittern_rows(&l, ids, 3, out.data()) || !bittern_rows(&l, wrong, 1, out.data()) || !bittern_rows(&l, wrong + 1, 1, out.data()))
    fail("rows of an embedding");
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < columns; ++k) {
      int code = 0;
      for (int b = 0; b < bits; ++b) {
        const int bit = k * bits + b;
        code |= (codes[size_t(ids[i] * row_bytes + bit / 8)] >> (bit % 8) & 1) << b;
      }
      volatile float value = float(code * 2 - 3) * scale[by_row ? ids[i] : 0];
      if (out[size_t(i * columns + k)] != (l.offset ? value + offset[by_row ? ids[i] : 0] : value)) fail("value of an embedding");
    }
  const int count = pick(0, 9);
  const std::vector<float> x = floats(size_t(count * columns)), bias = floats(size_t(rows));
  std::vector<float> product(size_t(count * rows), NAN), row(static_cast<size_t>(columns));
  if (bittern_multiply_floats(&l, x.data(), count, bias.data(), threads, product.data())) fail("a product with floats");
  for (int64_t r = 0; r < rows; ++r) {
    bittern_rows(&l, &r, 1, row.data());
    for (int i = 0; i < count; ++i) {
      double sum = bias[size_t(r)], most = std::abs(sum);
      for (int k = 0; k < columns; ++k) {
        const double term = double(x[size_t(i * columns + k)]) * row[size_t(k)];
        sum += term, most += std::abs(term);
      }
      if (!(std::abs(product[size_t(i * rows + r)] - sum) <= 1e-4 * most)) fail("value of a product with floats");
    }
  }
}

// A layer with weights of exactly their size.
struct Weights {
  std::vector<uint8_t> panels;
  std::vector<float> scale, bias;
  std::vector<int32_t> sums;
  Layer layer;

  Weights(int inputs, int outputs)
      : scale(up(outputs, 16), 0.1f), bias(scale.size(), 0.5f), sums(scale.size(), 0) {
    const int bits = 1 << pick(1, 3), top = bits == 2 ? 2 : (1 << bits) - 1, zero = pick(0, top);
    std::vector<uint8_t> codes(size_t(outputs) * inputs);
    for (uint8_t& c : codes) c = uint8_t(pick(0, top));
    for (int n = 0; n < outputs; ++n)
      for (int k = 0; k < inputs; ++k) sums[n] += int(codes[size_t(n) * inputs + k]) - zero;
    panels.resize(panel_bytes(outputs, inputs, bits));
    bittern_pack(codes.data(), outputs, inputs, bits, panels.data());
    layer = Layer{panels.data(), scale.data(), bias.data(), sums.data(), inputs, outputs, bits, top, zero,
                  any_format(false, false)};
  }
};

// A block by one call for each of its parts.
std::vector<float> parts(const Block& b, const std::vector<float>& x, int batch, int tokens, const float* mask, int threads) {
  const int rows = batch * tokens, hidden = b.query.inputs, values = b.heads * b.value_dim;
  const auto run = [&](const Layer& layer, const std::vector<float>& from, int activation) {
    std::vector<int8_t> codes(size_t(up(rows, 16)) * up(layer.inputs, 64));
    std::vector<float> scale(rows), offset(rows), to(size_t(rows) * layer.outputs);
    std::vector<int32_t> sums(rows);
    const Codes view{codes.data(), scale.data(), offset.data(), sums.data(), rows};
    if (bittern_quantize(from.data(), layer.inputs, &layer.input, threads, &view)) fail("finite values are not finite");
    if (bittern_linear(&view, &layer, activation, threads, to.data())) fail("linear failed");
    return to;
  };
  const auto normed = [&](const std::vector<float>& from, int i) {
    std::vector<float> to(from.size());
    bittern_norm(from.data(), rows, hidden, b.norms[i].weight, b.norms[i].bias, b.norms[i].epsilon, threads, to.data());
    return to;
  };
  const auto plus = [](std::vector<float> to, const std::vector<float>& more) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += more[i];
    return to;
  };
  const std::vector<float> read = b.pre_norm ? normed(x, 0) : x;
  const std::vector<float> q = run(b.query, read, 0), k = run(b.key, read, 0), v = run(b.value, read, 0);
  std::vector<float> map(size_t(batch) * b.heads * tokens * up(tokens, 16)), context(size_t(rows) * values);
  const int64_t wide = b.query.outputs, narrow = b.key.outputs, third = b.value.outputs;
  const Attention a{q.data(), k.data(), v.data(), mask, map.data(), context.data(),
                    {tokens * wide, b.dim, wide}, {tokens * narrow, b.dim, narrow}, {tokens * third, b.value_dim, third},
                    {0, 0, tokens}, batch, b.heads, b.key_heads, tokens, tokens, b.dim, b.value_dim, b.scaling,
                    b.query_format, b.key_format, b.value_format, b.map_format};
  if (bittern_attention(&a, threads)) fail("attention failed");
  const std::vector<float> sum = plus(run(b.output, context, 0), x), middle = normed(sum, b.pre_norm ? 1 : 0);
  const std::vector<float> down = run(b.down, run(b.up, middle, b.activation), 0);
  return b.pre_norm ? plus(down, sum) : normed(plus(down, middle), 1);
}

void block(int threads) {
  const int batch = pick(1, 2), tokens = pick(1, 40), key_heads = pick(1, 2), heads = key_heads * pick(1, 2);
  const int dim = pick(1, 20), value_dim = pick(1, 20), hidden = pick(1, 90), wide = pick(1, 90);
  const Weights query(hidden, heads * dim), key(hidden, key_heads * dim), value(hidden, key_heads * value_dim);
  const Weights output(heads * value_dim, hidden), up(hidden, wide), down(wide, hidden);
  const std::vector<float> x = floats(size_t(batch) * tokens * hidden), weight = floats(hidden), bias = floats(hidden);
  const std::vector<float> mask = floats(size_t(tokens) * tokens);
  std::vector<float> first(x.size()), out(x.size());
  const Norm norm{weight.data(), bias.data(), 1e-5f};
  const Block b{query.layer, key.layer, value.layer, output.layer, up.layer, down.layer, {norm, norm}, pick(0, 1),
                pick(0, 4), heads, key_heads, dim, value_dim, 0.2f, any_format(true, false), any_format(true, false),
                any_format(true, false), any_format(true, true)};
  const int64_t strides[3] = {0, 0, tokens};
  const float* masked = pick(0, 1) ? mask.data() : nullptr;
  const Block* const blocks[2] = {&b, &b};
  float* const outs[2] = {first.data(), out.data()};
  if (bittern_blocks(blocks, 2, x.data(), batch, tokens, masked, strides, threads, outs)) fail("blocks failed");
  std::vector<float> again(x.size());
  float* const alone = again.data();
  if (bittern_blocks(blocks, 1, first.data(), batch, tokens, masked, strides, threads, &alone)) fail("block failed");
  if (again != out) fail("two blocks in one call differ from one after the other");
  for (const float v : out)
    if (!std::isfinite(v)) fail("a block gave what is not finite");
  if (parts(b, x, batch, tokens, masked, threads) != first) fail("a block differs from its parts");
  const size_t rows = size_t(batch) * tokens;
  std::vector<float> q(rows * heads * dim), k(rows * key_heads * dim), v(rows * key_heads * value_dim);
  if (bittern_project(&b, x.data(), batch, tokens, threads, q.data(), k.data(), v.data())) fail("a projection failed");
  const auto by_head = [&](const std::vector<float>& from, int size) {
    std::vector<float> to;
    for (int i = 0; i < batch * key_heads * tokens; ++i) {
      const int t = i % tokens, head = i / tokens % key_heads, row = i / tokens / key_heads * tokens + t;
      const auto start = from.begin() + (row * key_heads + head) * size;
      to.insert(to.end(), start, start + size);
    }
    return to;
  };
  const std::vector<float> keys = by_head(k, dim), of_keys = by_head(v, value_dim);
  if (bittern_finish(&b, x.data(), batch, tokens, q.data(), keys.data(), of_keys.data(), tokens, masked, strides, threads,
                     out.data()))
    fail("the rest of a block failed");
  if (out != first) fail("a block in two calls differs from one");
}

// A convolution against the product of patches that plain loops gather.
void convolution(int threads) {
  Convolution v{pick(1, 2), pick(1, 14), pick(1, 14), pick(0, 3) ? pick(1, 20) : pick(60, 70), pick(0, 2), pick(0, 2), 0, 0, 0, 0,
                pick(1, 4), pick(1, 4), pick(1, 3), pick(1, 3), pick(1, 2), pick(1, 2)};
  v.high = std::max(v.top + v.height + pick(0, 2), (v.kernel_height - 1) * v.dilation_y + 1);
  v.wide = std::max(v.left + v.width + pick(0, 2), (v.kernel_width - 1) * v.dilation_x + 1);
  v.out_height = (v.high - (v.kernel_height - 1) * v.dilation_y - 1) / v.stride_y + 1;
  v.out_width = (v.wide - (v.kernel_width - 1) * v.dilation_x - 1) / v.stride_x + 1;
  Weights weights(v.kernel_height * v.kernel_width * v.channels, pick(1, 80));
  Format& f = weights.layer.input;
  f.mode = f.mode == 2 || f.scheme == 2 ? 0 : f.mode;  // so that a code stands for zero
  if (f.scheme == 2) f.scale = 1.5f / float(f.high / 2), f.offset = -f.scale * float(f.high / 2);
  const int8_t zero = int8_t((f.scheme == 2 ? f.high / 2 : 0) - f.shift);
  const int pixels = v.batch * v.height * v.width, rows = v.batch * v.out_height * v.out_width, wide = up(v.channels, 64);
  const std::vector<float> x = floats(size_t(pixels) * v.channels);
  std::vector<int8_t> codes(size_t(up(pixels, 16)) * wide);
  std::vector<float> scale(std::max(pixels, rows)), offset(scale.size());
  std::vector<int32_t> sums(scale.size());
  const Codes image{codes.data(), scale.data(), offset.data(), sums.data(), pixels};
  if (bittern_quantize(x.data(), v.channels, &f, threads, &image)) fail("finite values are not finite");
  const int width = up(weights.layer.inputs, 64);
  std::vector<int8_t> patches(size_t(up(rows, 16)) * width);
  for (int r = 0; r < rows; ++r) {
    int8_t* to = &patches[size_t(r) * width];
    const int b = r / v.out_width / v.out_height, y0 = r / v.out_width % v.out_height * v.stride_y - v.top;
    const int x0 = r % v.out_width * v.stride_x - v.left;
    for (int i = 0; i < v.kernel_height; ++i)
      for (int j = 0; j < v.kernel_width; ++j)
        for (int c = 0; c < v.channels; ++c) {
          const int at_y = y0 + i * v.dilation_y, at_x = x0 + j * v.dilation_x;
          const bool inside = at_y >= 0 && at_y < v.height && at_x >= 0 && at_x < v.width;
          *to++ = inside ? codes[size_t((b * v.height + at_y) * v.width + at_x) * wide + c] : zero;
        }
  }
  std::fill(scale.begin(), scale.end(), scale[0]), std::fill(offset.begin(), offset.end(), offset[0]);
  for (int r = 0; r < rows; ++r) sums[r] = sum_of(&patches[size_t(r) * width], weights.layer.inputs);
  std::vector<float> out(size_t(rows) * weights.layer.outputs, NAN), expected(out.size());
  const Codes gathered{patches.data(), scale.data(), offset.data(), sums.data(), rows};
  if (bittern_linear(&gathered, &weights.layer, 0, threads, expected.data())) fail("linear failed");
  if (bittern_convolve(x.data(), &v, &weights.layer, threads, out.data())) fail("a convolution failed");
  if (out != expected) fail("a convolution differs from the product of its patches");
  f.offset = f.scheme == 2 ? f.offset + f.scale / 3 : f.offset;
  if (f.scheme == 2 && (v.high > v.height || v.wide > v.width) &&
      !bittern_convolve(x.data(), &v, &weights.layer, threads, out.data()))
    fail("padded by a code that is not zero");
  std::vector<float> broken = x;
  broken[size_t(pick(0, int(x.size()) - 1))] = pick(0, 1) ? NAN : -INFINITY;
  if (!bittern_convolve(broken.data(), &v, &weights.layer, threads, out.data())) fail("what is not finite was convolved");
}

// Each chunk once, by a thread of the job.
void chunks(int threads) {
  const int count = pick(0, 40);
  std::vector<std::atomic<int>> times(size_t(count) + 1);
  parallel(count, threads, [&](int chunk, int slot) {
    if (slot < 0 || slot >= threads) fail("a thread that has no memory");
    if (chunk % 3 == slot) std::this_thread::yield();
    times[size_t(chunk)]++;
  });
  for (int i = 0; i < count; ++i)
    if (times[size_t(i)] != 1) fail("a chunk that was not taken once");
}

void everything() {
  chunks(pick(1, 4));
  convolution(pick(1, 4));
  linear(pick(1, pick(0, 3) ? 20 : 300), pick(1, pick(0, 3) ? 150 : 1700), pick(1, 80), pick(1, 4));
  attention(pick(1, 4));
  rows(pick(1, 4));
  look_up(1);
  rounding(pick(1, 4));
  losses(pick(1, 4));
  block(pick(1, 4));
}

}  // namespace

int main(int, char** arguments) {
  generator.seed(unsigned(std::stoi(arguments[1])));
  if (bittern_start(GOMP_parallel)) fail("the system does not grant AMX");
  linear(0, 5, 7, 1), linear(1, 1, 1, 1), linear(300, 800, 40, 2), linear(600, 70, 1024, 3);
  for (int i = 0; i < std::stoi(arguments[2]); ++i) with_team(pick(1, 3), everything);
  if (borrowed == 0) fail("no threads were borrowed");
  std::vector<std::thread> callers;  // several at once
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([i, rounds = std::stoi(arguments[2]) / 10] {
      generator.seed(unsigned(i));
      std::vector<float> x(40000, 1.0f), y(x.size());
      for (int r = 0; r < 50; ++r) bittern_activate(x.data(), int64_t(x.size()), kRelu, 3, y.data());
      if (y != x) fail("several callers at once");
      for (int r = 0; r < rounds; ++r) everything();
    });
  for (std::thread& caller : callers) caller.join();
  if (const pid_t child = fork(); child == 0) {
    linear(64, 128, 64, 3);
    _exit(0);
  } else {
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail("after fork");
  }
  std::puts("ok");
}
