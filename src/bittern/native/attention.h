// Attention whose two products are of integers: queries x keys and map x values, with a float softmax between them.
#pragma once

#include "quantize.h"

extern "C" {

// Tensors (batch, heads, tokens, dim) with strides in elements and a contiguous last dimension; fewer key heads serve
// groups of query heads. mask: added to the scores, null or strided with 0 where it is shared, its keys contiguous.
// Outputs: context (batch, queries, heads, value dim), contiguous, and map (batch, heads, queries, keys), whose rows have
// room for a multiple of 16 keys and hold zeros there; it may be null if its scale is static.
struct Attention {
  const float *query, *key, *value, *mask;
  float *map, *context;
  int64_t query_strides[3], key_strides[3], value_strides[3], mask_strides[3];
  int32_t batch, heads, key_heads, queries, keys, dim, value_dim;
  float scaling;
  Format query_format, key_format, value_format, map_format;
};

}

namespace {

// Codes in rows `stride` bytes apart.
struct CodeRows {
  const int8_t* codes;
  size_t stride;
};

// What stands in the place of floats between products: codes of rows of all heads side by side, with static scales. There
// must be memory for 16 more rows. Null: there are floats.
struct Coded {
  CodeRows query, key, value;
  int8_t* context;
  size_t context_stride;
  Format context_format;
  float* factors;  // of each row of the map, which then holds exponentials; null: it holds probabilities
};

constexpr int kQueries = 32;  // rows of the map that are worked on at a time: they stay in the first cache
constexpr int kZero = kSigned ? 0 : 128;  // what stands for 0 in panels of signed bytes

// Four inputs, from `k` on, of an output of a panel, whose high halves are `high` bytes behind.
inline void put(uint8_t* panel, size_t output, size_t k, size_t high, uint32_t word) {
  panel += k / kStep * kLine + output * kStep + k % kStep;
  const uint32_t halves[2] = {kPlanes == 1 ? word : word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu};
  for (int plane = 0; plane < kPlanes; ++plane) memcpy(panel + plane * high, &halves[plane], 4);
}

// Rows of codes (outputs of the product) as expanded panels. Rows beyond the last are whatever `from` holds there.
inline void panels_of_rows(const CodeRows& from, int rows, int width, uint8_t* panels) {
  const size_t high = size_t(width) * kPanel;
  for (int r = 0; r < up(rows, kPanel); ++r) {
    uint8_t* panel = panels + size_t(r / kPanel) * high * kPlanes;
    for (int k = 0; k < width; k += 4) {
      const auto word = load<uint32_t>(from.codes + size_t(r) * from.stride + k) ^ kZero * 0x01010101u;
      put(panel, size_t(r % kPanel), size_t(k), high, word);
    }
  }
}

// Columns of codes (outputs of the product) as expanded panels: `rows`, a multiple of 4, are what is summed over; those
// beyond `real` are zeros. Columns up to a multiple of 16 are read.
inline void panels_of_columns(const CodeRows& codes, int real, int rows, int columns, uint8_t* panels) {
  const size_t high = size_t(rows) * kPanel;
  for (int c = 0; c < columns; c += kPanel)
    for (int r = 0; r < rows; r += 4) {
      uint8_t* panel = panels + size_t(c / kPanel) * high * kPlanes;
      Sixteen from[4], out[4];
      for (int i = 0; i < 4; ++i)
        from[i] = (r + i < real ? load<Sixteen>(codes.codes + size_t(r + i) * codes.stride + c) : Sixteen{}) ^ uint8_t(kZero);
      columns_of(from, out);
      if (kStep != 4) {
        for (int i = 0; i < kPanel; ++i) put(panel, size_t(i), size_t(r), high, load<uint32_t>(reinterpret_cast<uint8_t*>(out) + 4 * i));
        continue;
      }
      for (int i = 0; i < 4; ++i) {
        const Sixteen halves[2] = {kPlanes == 1 ? out[i] : out[i] & uint8_t(15), out[i] >> 4};
        for (int plane = 0; plane < kPlanes; ++plane) store(panel + plane * high + r * kPanel + 16 * i, halves[plane]);
      }
    }
}

// Scores to their exponentials, of `width` values of which the largest is `most`. Returns the factor that makes
// probabilities of them, which is that of the largest score.
inline float exponentials(const float* x, float most, int width, float* to) {
  Floats sum = {};
  for (int i = 0; i < width; i += kLanes) {
    const Floats e = exp_negative(load(x + i) - most);
    sum += e;
    store(to + i, e);
  }
  return 1 / add_up(sum);
}

struct Buffers {
  int8_t *rows, *codes, *map;
  float* scores;
  uint8_t *keys, *values;
  int32_t *sums, *row_sums, *map_sums, *columns;
};

// What one thread needs of memory; `at` null only counts it.
inline size_t lay_out(const Attention& a, uint8_t* at, Buffers* b) {
  const int dim = up(a.dim, kDepth), keys = up(a.keys, kDepth), values = up(a.value_dim, kPanel);
  const int longest = up(a.queries > a.keys ? a.queries : a.keys, kPanel);
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* here = at == nullptr ? nullptr : at + used;
    used += (bytes + 127) / 64 * 64;
    return here;
  };
  b->rows = reinterpret_cast<int8_t*>(take(size_t(longest) * dim));
  b->codes = reinterpret_cast<int8_t*>(take(size_t(keys) * values));
  b->map = reinterpret_cast<int8_t*>(take(size_t(kQueries) * keys));
  b->scores = reinterpret_cast<float*>(take(size_t(kQueries) * up(a.keys, kPanel) * 4));
  b->keys = take(size_t(keys) * dim * kPlanes);
  b->values = take(size_t(values) * keys * kPlanes);
  b->sums = reinterpret_cast<int32_t*>(take(size_t(kQueries) * kPanel * kPair * 4));
  b->row_sums = reinterpret_cast<int32_t*>(take(size_t(longest) * 4));
  b->map_sums = reinterpret_cast<int32_t*>(take(size_t(kQueries) * 4));
  b->columns = reinterpret_cast<int32_t*>(take(size_t(values) * 4));
  return used;
}

// rows x all panels; each(panel, sums) takes the sums (rows, 16) of one panel.
template <typename Each>
void all_panels(const CodeRows& rows, int count, int width, const uint8_t* panels, int outputs, int32_t* sums, Each each) {
  const size_t next = size_t(width) * kPanel * kPlanes, next_sums = size_t(kQueries) * kPanel;
  const int all = up(outputs, kPanel) / kPanel;
  const Tiles tiles;
  for (int p = 0; p < all; p += kPair) {
    const int pair = all - p < kPair ? all - p : kPair;
    multiply(panels + p * next, next, pair, rows.codes, rows.stride, count, width / 4, 8, 8, 255, sums, next_sums, false,
             {panels, 0, 0});
    for (int i = 0; i < pair; ++i) each(p + i, sums + i * next_sums);
  }
}

// One head of attention, step by step.
struct Head {
  const Attention& a;
  const Coded& coded;
  Buffers b;
  const int batch, head, group, depth, keys, values;

  Head(const Attention& all, const Coded& coded, int number, uint8_t* memory)
      : a(all), coded(coded), batch(number / a.heads), head(number % a.heads),
        group(head / (a.heads / a.key_heads)), depth(up(a.dim, kDepth)), keys(up(a.keys, kDepth)),
        values(up(a.value_dim, kPanel)) {
    lay_out(a, memory, &b);
  }

  // This head's part of rows of all heads.
  CodeRows part(const CodeRows& all, int tokens, int number, int dim) const {
    return {all.codes + size_t(batch) * size_t(tokens) * all.stride + size_t(number) * size_t(dim), all.stride};
  }

  // Codes of keys, as panels, and of queries.
  CodeRows read_scores(const Coding& query, const Coding& key) const {
    const CodeRows mine{b.rows, size_t(depth)};
    if (coded.key.codes != nullptr) {
      panels_of_rows(part(coded.key, a.keys, group, a.dim), a.keys, depth, b.keys);  // beyond dim, queries are zeros
    } else {
      const float* k = a.key + batch * a.key_strides[0] + group * a.key_strides[1];
      for (int t = 0; t < a.keys; ++t) to_codes(k + t * a.key_strides[2], a.dim, key, b.rows + size_t(t) * depth, depth);
      panels_of_rows(mine, a.keys, depth, b.keys);
    }
    if (coded.query.codes == nullptr) {
      const float* q = a.query + batch * a.query_strides[0] + head * a.query_strides[1];
      for (int t = 0; t < a.queries; ++t)
        b.row_sums[t] = to_codes(q + t * a.query_strides[2], a.dim, query, b.rows + size_t(t) * depth, depth);
      return mine;
    }
    const CodeRows all = part(coded.query, a.queries, head, a.dim);
    for (int t = 0; t < a.queries; ++t) {
      const int8_t* row = all.codes + size_t(t) * all.stride;
      b.row_sums[t] = sum_of(row, a.dim);
      if (a.dim == depth) continue;
      memcpy(b.rows + size_t(t) * depth, row, size_t(a.dim));
      memset(b.rows + size_t(t) * depth + a.dim, 0, size_t(depth - a.dim));
    }
    return a.dim == depth ? all : mine;
  }

  // Codes of values, as panels, and what the shift of the map's codes adds to their sums.
  void read_values(const Coding& value, const Coding& map) const {
    CodeRows from{b.codes, size_t(values)};
    if (coded.value.codes != nullptr) {
      from = part(coded.value, a.keys, group, a.value_dim);
    } else {
      const float* v = a.value + batch * a.value_strides[0] + group * a.value_strides[1];
      for (int t = 0; t < a.keys; ++t)
        to_codes(v + t * a.value_strides[2], a.value_dim, value, b.codes + size_t(t) * values, values);
    }
    panels_of_columns(from, a.keys, keys, a.value_dim, b.values);
    memset(b.columns, 0, sizeof(int32_t) * size_t(values));
    if (map.shift == 0) return;
    memset(b.map, 0, size_t(keys)), memset(b.map, -map.shift, size_t(a.keys));
    all_panels({b.map, size_t(keys)}, 1, keys, b.values, a.value_dim, b.sums, [&](int p, const int32_t* sums) {
      for (int i = 0; i < kPanel; ++i) b.columns[p * kPanel + i] = -kZero * map.shift * a.keys - sums[i];
    });
  }

  // Probabilities of `count` queries, in rows of a multiple of 16, still to be multiplied by the factor of each row if
  // they are not to be `whole`. Returns the largest.
  float probabilities(const CodeRows& queries, int first, int count, float unit, bool whole, float* out,
                      float* factors) const {
    const int width = up(a.keys, kPanel);
    const float* mask = a.mask == nullptr ? nullptr : a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1];
    Floats most[kQueries];
    for (Floats& m : most) m = Floats{} - INFINITY;
    const CodeRows from{queries.codes + size_t(first) * queries.stride, queries.stride};
    all_panels(from, count, depth, b.keys, a.keys, b.sums, [&](int p, const int32_t* sums) {
      const int real = a.keys - p * kPanel < kPanel ? a.keys - p * kPanel : kPanel;
      for (int r = 0; r < count; ++r, sums += kPanel) {
        const int32_t zero = kZero * b.row_sums[first + r];
        const float* added = mask == nullptr ? nullptr : mask + (first + r) * a.mask_strides[2] + p * kPanel;
        float* to = b.scores + size_t(r) * width + p * kPanel;
        float padded[kPanel] = {};
        if (real < kPanel) {  // beyond the last key
          for (int i = 0; i < kPanel; ++i) padded[i] = i >= real ? -INFINITY : added == nullptr ? 0 : added[i];
          added = padded;
        }
        for (int i = 0; i < kPanel; i += kLanes) {
          Floats score = __builtin_convertvector(load<Ints>(sums + i) - zero, Floats) * unit;
          if (added != nullptr) score += load(added + i);
          most[r] = larger(most[r], score);
          store(to + i, score);
        }
      }
    });
    float largest = 0;
    for (int r = 0; r < count; ++r) {
      float* row = out + size_t(r) * width;
      const float found = factors[r] = exponentials(b.scores + size_t(r) * width, ::largest(most[r]), width, row);
      largest = found > largest || found != found ? found : largest;
      for (int i = 0; i < width && whole; i += kLanes) store(row + i, load(row + i) * found);
    }
    return largest;
  }

  // What `count` queries get of the values. factors: null if the map holds probabilities.
  void context(int first, int count, const float* map, const float* factors, const Coding& coding, float unit) const {
    const Rounder round(coding);
    for (int r = 0; r < count; ++r) {
      const float factor = factors == nullptr ? 1 : factors[r];
      const auto probability = [=](const Floats& v) { return rounded(v * factor); };
      const float* row = map + size_t(r) * up(a.keys, kPanel);
      b.map_sums[r] = to_codes(row, a.keys, probability, round, b.map + size_t(r) * keys, keys);
    }
    all_panels({b.map, size_t(keys)}, count, keys, b.values, a.value_dim, b.sums, [&](int p, const int32_t* sums) {
      constexpr int kRegisters = kPanel / kLanes;
      const Rounder next(::coding(coded.context_format, Range{}));  // not in memory, which bytes that are written could be
      for (int r = 0; r < count; ++r, sums += kPanel) {
        const int32_t zero = kZero * b.map_sums[r];
        Floats value[kRegisters];
        Ints bits[kRegisters];
        for (int i = 0; i < kRegisters; ++i) {
          const Ints sum = load<Ints>(sums + i * kLanes) - zero + load<Ints>(b.columns + p * kPanel + i * kLanes);
          value[i] = __builtin_convertvector(sum, Floats) * unit;
        }
        const size_t row = size_t(batch) * size_t(a.queries) + size_t(first + r), at = size_t(head * a.value_dim + p * kPanel);
        if (coded.context != nullptr) next.bits<kRegisters>(value, bits);
        for (int i = 0; i < kRegisters; ++i) {
          const int left = a.value_dim - p * kPanel - i * kLanes;
          const size_t here = at + size_t(i * kLanes);
          if (coded.context != nullptr) store_some(coded.context + row * coded.context_stride + here, bits[i], left);
          else store_some(a.context + row * size_t(a.heads * a.value_dim) + here, value[i], left);
        }
      }
    });
  }
};

inline Range range_of(const float* x, const int64_t* strides, int batch, int heads, int tokens, int dim, const Format& f,
                      int threads) {
  if (x == nullptr) return {};  // there are codes
  if (strides[1] == dim)  // rows of all heads side by side
    return find_range(batch * tokens, heads * dim, f, threads,
                      [=](int r) { return x + r / tokens * strides[0] + r % tokens * strides[2]; });
  return find_range(batch * heads * tokens, dim, f, threads, [=](int r) {
    return x + r / tokens / heads * strides[0] + r / tokens % heads * strides[1] + r % tokens * strides[2];
  });
}

inline int attend(const Attention& a, const Coded& coded, int threads) {
  if (a.batch == 0 || a.queries == 0 || a.keys == 0) return kOk;
  const Range query = range_of(a.query, a.query_strides, a.batch, a.heads, a.queries, a.dim, a.query_format, threads);
  const Range key = range_of(a.key, a.key_strides, a.batch, a.key_heads, a.keys, a.dim, a.key_format, threads);
  const Range value = range_of(a.value, a.value_strides, a.batch, a.key_heads, a.keys, a.value_dim, a.value_format, threads);
  if (!query.finite() || !key.finite() || !value.finite()) return kNotFinite;
  const Coding q = coding(a.query_format, query), k = coding(a.key_format, key), v = coding(a.value_format, value);
  const int all = a.batch * a.heads;
  threads = worth(double(all) * a.queries * a.keys * a.dim / 16, threads);
  Buffers none;
  const size_t each = lay_out(a, nullptr, &none);
  auto* memory = static_cast<uint8_t*>(scratch.get(each * size_t(threads)));
  if (memory == nullptr) return kNoMemory;
  const float score_unit = q.scale * k.scale * a.scaling;
  const auto too_large = [&](const Coding& map) {  // for codes: a sum of integers could be infinite
    return coded.context != nullptr && !(map.scale * v.scale <= FLT_MAX / 0x1p31f);
  };
  const auto tiles = [&](auto each) {
    for (int first = 0; first < a.queries; first += kQueries)
      each(first, a.queries - first < kQueries ? a.queries - first : kQueries);
  };
  // With a static scale of the map each tile of queries goes all the way; else the largest probability must be known first.
  std::atomic<int32_t> most{0};
  const bool at_once = a.map_format.mode == 0, whole = a.map != nullptr && coded.factors == nullptr;
  const size_t width = size_t(up(a.keys, kPanel));
  const auto row_of = [&](int number, int first) { return size_t(number) * size_t(a.queries) + size_t(first); };
  if (at_once && too_large(coding(a.map_format, Range{}))) return kNotFinite;
  parallel(all, threads, [&](int number, int slot) {
    const Head head(a, coded, number, memory + each * size_t(slot));
    const Coding map = coding(a.map_format, Range{});
    const CodeRows queries = head.read_scores(q, k);
    if (at_once) head.read_values(v, map);
    tiles([&](int first, int count) {
      float on_stack[kQueries], *to = a.map != nullptr ? a.map + row_of(number, first) * width : head.b.scores;
      float* factors = coded.factors != nullptr ? coded.factors + row_of(number, first) : on_stack;
      const int32_t mine = bits_of(head.probabilities(queries, first, count, score_unit, whole, to, factors)) & 0x7fffffff;
      for (int32_t seen = most.load(); seen < mine && !most.compare_exchange_weak(seen, mine);) {}
      if (at_once && mine < kInfinity) head.context(first, count, to, whole ? nullptr : factors, map, map.scale * v.scale);
    });
  });
  if (most.load() >= kInfinity) return kNotFinite;
  if (at_once) return kOk;
  const Coding map = coding(a.map_format, Range{0, float_of(most.load()), most.load()});
  if (too_large(map)) return kNotFinite;
  parallel(all, threads, [&](int number, int slot) {
    const Head head(a, coded, number, memory + each * size_t(slot));
    head.read_values(v, map);
    tiles([&](int first, int count) {
      const float* factors = whole ? nullptr : coded.factors + row_of(number, first);
      head.context(first, count, a.map + row_of(number, first) * width, factors, map, map.scale * v.scale);
    });
  });
  return kOk;
}

}  // namespace
