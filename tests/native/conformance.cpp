// The kernels against the cases of cases.py, which stand for the simulated model: every integer is compared. Needs no
// Python, so that it runs on any CPU or under an emulator. Arguments: the file of cases and the number of threads.
#include "kernels.cpp"
#include "openmp.h"

#include <cstdio>
#include <string>
#include <vector>

namespace {

enum Name { kQuantize, kLinear, kTernary, kAttention, kNorm, kActivate, kLosses, kConvolve };

int number = 0, name = 0;  // of the case

void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "case %d of sort %d: %s\n", number, name, what);
  std::exit(1);
}

// The arrays of a case, in the order of cases.py.
struct Case {
  std::vector<std::vector<char>> arrays;
  template <typename T>
  const T* at(size_t i) const {
    require(i < arrays.size(), "too few arrays");
    return reinterpret_cast<const T*>(arrays[i].data());
  }
  template <typename T>
  std::vector<T> padded(size_t i, int n) const {  // with zeros
    std::vector<T> v(at<T>(i), at<T>(i) + arrays[i].size() / sizeof(T));
    v.resize(size_t(n));
    return v;
  }
};

bool read(FILE* file, Case* to) {
  int32_t head[2];
  if (std::fread(head, 4, 2, file) != 2) return false;
  name = head[0];
  to->arrays.resize(size_t(head[1]));
  for (auto& array : to->arrays) {
    int64_t bytes = 0;
    require(std::fread(&bytes, 8, 1, file) == 1, "the file is cut short");
    array.resize(size_t(bytes));
    require(std::fread(array.data(), 1, array.size(), file) == array.size(), "the file is cut short");
  }
  return true;
}

void near(const float* found, const float* expected, const float* bound, size_t n, const char* what) {
  for (size_t i = 0; i < n; ++i) require(std::fabs(found[i] - expected[i]) <= bound[i], what);
}

// Rows of codes, with room for whole panels.
struct Rows {
  std::vector<int8_t> codes;
  std::vector<float> scale, offset;
  std::vector<int32_t> sums;
  Codes view;
  Rows(int rows, int columns)
      : codes(size_t(up(rows, 16)) * up(columns, 64)), scale(size_t(up(rows, 16))), offset(scale), sums(scale.size()),
        view{codes.data(), scale.data(), offset.data(), sums.data(), rows} {}
};

void quantize(const Case& c, int threads) {
  const int rows = c.at<int32_t>(0)[0], columns = c.at<int32_t>(0)[1];
  Rows made(rows, columns);
  require(bittern_quantize(c.at<float>(2), columns, c.at<Format>(1), threads, &made.view) == 0, "not finite");
  std::vector<float> values(size_t(rows) * columns);
  require(bittern_round(c.at<float>(2), int64_t(values.size()), columns, c.at<Format>(1), threads, values.data()) == 0, "round");
  require(memcmp(values.data(), c.at<float>(6), values.size() * 4) == 0, "rounded values");
  for (int r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int k = 0; k < columns; ++k) {
      const int8_t code = made.codes[size_t(r) * up(columns, 64) + k];
      require(code == c.at<int8_t>(3)[size_t(r) * columns + k], "code");
      sum += code;
    }
    require(made.sums[r] == sum, "sum of codes");
    require(made.scale[r] == c.at<float>(4)[r] && made.offset[r] == c.at<float>(5)[r], "scale or offset");
  }
}

void linear(const Case& c, int threads) {
  const int32_t* h = c.at<int32_t>(0);
  const int rows = h[0], inputs = h[1], outputs = h[2], bits = h[3], top = h[4], zero = h[5], wide = up(outputs, 16);
  const auto* codes = c.at<uint8_t>(3);
  std::vector<uint8_t> panels(panel_bytes(outputs, inputs, bits)), again(size_t(outputs) * inputs);
  bittern_pack(codes, outputs, inputs, bits, panels.data());
  bittern_unpack(panels.data(), outputs, inputs, bits, again.data());
  require(memcmp(again.data(), codes, again.size()) == 0, "unpacked codes");
  std::vector<int32_t> sums(size_t(wide), 0);
  for (int n = 0; n < outputs; ++n)
    for (int k = 0; k < inputs; ++k) sums[n] += codes[size_t(n) * inputs + k] - zero;
  const std::vector<float> scale = c.padded<float>(4, wide), bias = c.padded<float>(5, wide), ones(size_t(wide), 1.0f), none(size_t(wide), 0.0f);
  Layer layer{panels.data(), scale.data(), bias.data(), sums.data(), inputs, outputs, bits, top, zero, *c.at<Format>(1)};
  Rows x(rows, inputs);
  require(bittern_quantize(c.at<float>(2), inputs, &layer.input, threads, &x.view) == 0, "not finite");
  std::vector<float> out(size_t(rows) * outputs);
  require(bittern_linear(&x.view, &layer, 0, threads, out.data()) == 0, "linear");
  near(out.data(), c.at<float>(7), c.at<float>(8), out.size(), "product with its scales");
  layer.scale = ones.data(), layer.bias = none.data();
  x.scale.assign(x.scale.size(), 1), x.offset.assign(x.offset.size(), 0);
  require(bittern_linear(&x.view, &layer, 0, threads, out.data()) == 0, "linear");
  for (size_t i = 0; i < out.size(); ++i) require(out[i] == float(c.at<int32_t>(6)[i]), "integer product");
}

void ternary(const Case& c, int threads) {
  const int32_t* h = c.at<int32_t>(0);
  std::vector<float> out(size_t(h[0]), 0.0f);
  require(bittern_round_ternary(c.at<float>(2), h[0], h[1], c.at<float>(1)[0], c.at<float>(1)[1], threads, out.data()) == 0, "ternary");
  require(memcmp(out.data(), c.at<float>(3), out.size() * 4) == 0, "ternary values");
}

void attention(const Case& c, int threads) {
  const int32_t* h = c.at<int32_t>(0);
  const int64_t batch = h[0], heads = h[1], key_heads = h[2], queries = h[3], keys = h[4], dim = h[5], value_dim = h[6];
  const int64_t wide = up(int(keys), 16);
  std::vector<float> map(size_t(batch * heads * queries * wide)), context(size_t(batch * queries * heads * value_dim));
  const Attention a{c.at<float>(6), c.at<float>(7), c.at<float>(8), h[7] ? c.at<float>(9) : nullptr, map.data(), context.data(),
                    {queries * heads * dim, dim, heads * dim}, {keys * key_heads * dim, dim, key_heads * dim},
                    {keys * key_heads * value_dim, value_dim, key_heads * value_dim},
                    {heads * queries * keys, queries * keys, keys}, h[0], h[1], h[2], h[3], h[4], h[5], h[6],
                    c.at<float>(5)[0], *c.at<Format>(1), *c.at<Format>(2), *c.at<Format>(3), *c.at<Format>(4)};
  require(bittern_attention(&a, threads) == 0, "attention");
  float scale = a.map_format.scale, most = 0;
  for (const float p : map) most = p > most ? p : most;
  if (a.map_format.mode != 0) scale = (most < a.map_format.clip ? most : a.map_format.clip) / float(a.map_format.high);
  const double unit = double(scale * c.at<float>(5)[1]);
  for (int64_t row = 0; row < batch * heads * queries; ++row) {
    const int64_t b = row / (heads * queries), head = row / queries % heads, q = row % queries, group = head / (heads / key_heads);
    std::vector<int64_t> sums(size_t(value_dim), 0);
    for (int64_t k = 0; k < keys; ++k) {
      const float p = map[size_t(row * wide + k)], expected = c.at<float>(11)[row * keys + k];
      require(std::fabs(p - expected) <= 2e-6f * expected + 1e-7f, "probability");
      const float code = std::nearbyint(p / scale), top = float(a.map_format.high);
      for (int64_t i = 0; i < value_dim; ++i)
        sums[size_t(i)] += int64_t(code < top ? code : top) * c.at<int8_t>(10)[((b * keys + k) * key_heads + group) * value_dim + i];
    }
    for (int64_t i = 0; i < value_dim; ++i) {
      const double found = double(context[size_t(((b * queries + q) * heads + head) * value_dim + i)]) / unit;
      require(std::fabs(found - double(sums[size_t(i)])) < 0.25, "integer product of map and values");
    }
  }
}

void norm(const Case& c, int threads) {
  const int rows = c.at<int32_t>(0)[0], columns = c.at<int32_t>(0)[1];
  std::vector<float> out(size_t(rows) * columns);
  bittern_norm(c.at<float>(1), rows, columns, c.at<float>(2), c.at<float>(3), 1e-5f, threads, out.data());
  near(out.data(), c.at<float>(4), c.at<float>(5), out.size(), "norm");
}

void activation(const Case& c, int threads) {
  std::vector<float> out(c.arrays[1].size() / 4);
  bittern_activate(c.at<float>(1), int64_t(out.size()), c.at<int32_t>(0)[0], threads, out.data());
  near(out.data(), c.at<float>(2), c.at<float>(3), out.size(), "activation");
}

void losses(const Case& c, int threads) {
  const int32_t* h = c.at<int32_t>(0);
  std::vector<float> out(size_t(h[2]) * h[0]);
  const Losses l{c.at<float>(1), c.at<float>(2), c.at<float>(3), c.at<float>(4), c.at<float>(5), c.at<float>(6), out.data(),
                 h[0], h[1], h[2], h[3], -8, 7};
  bittern_losses(&l, threads);
  near(out.data(), c.at<float>(7), c.at<float>(8), out.size(), "loss");
}

void convolution(const Case& c, int threads) {
  const int32_t* h = c.at<int32_t>(0);
  const int inputs = h[0], outputs = h[1], bits = h[2], top = h[3], zero = h[4], wide = up(outputs, 16);
  Convolution v;
  memcpy(&v, c.at<int32_t>(2), sizeof(v));
  const auto* codes = c.at<uint8_t>(5);
  std::vector<uint8_t> panels(panel_bytes(outputs, inputs, bits));
  bittern_pack(codes, outputs, inputs, bits, panels.data());
  std::vector<int32_t> sums(size_t(wide), 0);
  for (int n = 0; n < outputs; ++n)
    for (int k = 0; k < inputs; ++k) sums[n] += codes[size_t(n) * inputs + k] - zero;
  const std::vector<float> scale = c.padded<float>(3, wide), none(size_t(wide), 0.0f);
  const Layer layer{panels.data(), scale.data(), none.data(), sums.data(), inputs, outputs, bits, top, zero, *c.at<Format>(1)};
  std::vector<float> out(size_t(v.batch) * v.out_height * v.out_width * outputs);
  require(bittern_convolve(c.at<float>(4), &v, &layer, threads, out.data()) == 0, "convolution");
  near(out.data(), c.at<float>(6), c.at<float>(7), out.size(), "convolution with its scales");
}

// The largest codes of both signs in the longest rows, whatever is summed in few bits on the way.
void extremes() {
  const int inputs = 32768, outputs = 17, rows = 5;
  for (const int bits : {2, 4, 8})
    for (const int weight : {-(1 << (bits - 1)), (1 << (bits - 1)) - 1})
      for (const float value : {-128.0f, 127.0f}) {
        const int zero = 1 << (bits - 1);
        const std::vector<uint8_t> codes(size_t(outputs) * inputs, uint8_t(weight + zero));
        std::vector<uint8_t> panels(panel_bytes(outputs, inputs, bits));
        bittern_pack(codes.data(), outputs, inputs, bits, panels.data());
        const std::vector<float> ones(32, 1.0f), none(32, 0.0f), x(size_t(rows) * inputs, value);
        const std::vector<int32_t> sums(32, weight * inputs);
        const Format f{1, 0, FLT_MAX, -128, 127, 0, 0, 0};
        Rows made(rows, inputs);
        bittern_quantize(x.data(), inputs, &f, 1, &made.view);
        for (const int some : {1, 2, rows}) {
          made.view.rows = some;
          const Layer layer{panels.data(), ones.data(), none.data(), sums.data(), inputs, outputs, bits, (1 << bits) - 1, zero, f};
          std::vector<float> out(size_t(some) * outputs);
          bittern_linear(&made.view, &layer, 0, 1, out.data());
          for (const float sum : out) require(sum == float(weight) * value * float(inputs), "extremes");
        }
      }
}

}  // namespace

int main(int, char** arguments) {
  require(bittern_start(GOMP_parallel) == 0, "the system does not grant AMX");
  extremes();
  FILE* file = std::fopen(arguments[1], "rb");
  require(file != nullptr, "no file of cases");
  const int threads = std::stoi(arguments[2]);
  constexpr void (*sorts[])(const Case&, int) = {quantize, linear, ternary, attention, norm, activation, losses, convolution};
  with_team(threads, [&] {
    for (Case c; read(file, &c); ++number) sorts[name](c, threads);
  });
  std::fclose(file);
  require(threads == 1 || borrowed > 0, "no threads were borrowed");
  std::printf("%d cases\n", number);
}
