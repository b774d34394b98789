// Convolutions: codes of images are gathered to rows, a patch in each, and multiplied as those of a linear layer. Each value
// is rounded once; the rows that a thread gathers at a time stay in the second cache.
#pragma once
#include "block.h"

extern "C" {

// Images (batch, height, width, channels) and zeros around them: `top` lines and `left` columns of them come first, and
// together they are of high x wide. The layer's inputs are (kernel height, kernel width, channels).
struct Convolution {
  int32_t batch, height, width, channels, top, left, high, wide, out_height, out_width;
  int32_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x;

  size_t line() const { return size_t(wide) * size_t(channels); }
  size_t lines() const { return size_t(batch) * size_t(high); }
};

}

namespace {

constexpr int kPatches = 256 << 10;  // bytes that a thread gathers at a time

// Codes of all images, with the zeros, and the sum of those before each column of a line. False if a value is not finite.
inline bool read_images(const float* x, const Convolution& v, const Coding& c, int zero, int threads, int8_t* images,
                        int32_t* sums) {
  const Rounder round(c);
  const int values = v.width * v.channels, piece = 4, lines = int(v.lines());
  std::atomic<bool> finite{true};
  parallel(up(lines, piece) / piece, worth(double(lines) * values, threads), [&](int chunk, int) {
    for (int i = chunk * piece; i < lines && i < (chunk + 1) * piece; ++i) {
      const int y = i % v.high - v.top;
      int8_t* to = images + size_t(i) * v.line();
      memset(to, zero - c.shift, v.line());
      if (y >= 0 && y < v.height) {
        const float* from = x + (size_t(i / v.high) * size_t(v.height) + size_t(y)) * size_t(values);
        int8_t* inside = to + size_t(v.left) * size_t(v.channels);
        for (int some, at = 0; at < values; at += some) {  // as many as are still in the first cache
          some = values - at < 4096 ? values - at : 4096;
          if (largest(from + at, some) >= kInfinity) finite.store(false);
          to_codes(from + at, some, round, inside + at, some);
        }
      }
      int32_t* before = sums + size_t(i) * size_t(v.wide + 1);
      before[0] = 0;
      for (int j = 0; j < v.wide; ++j, to += v.channels) before[j + 1] = before[j] + sum_of(to, v.channels);
    }
  });
  return finite.load();
}

// `count` patches from `first` on, in rows of `width`, and the sum of each. Copies touch up to a register's width behind
// what they copy; what lies behind the columns of a row meets no weights.
inline void gather(const Convolution& v, const int8_t* images, const int32_t* sums, int first, int count, int width,
                   int8_t* to, int32_t* sum) {
  const int run = v.dilation_x == 1 ? v.kernel_width : 1, bytes = run * v.channels;  // columns that lie side by side
  for (int r = first; r < first + count;) {
    const int row = r / v.out_width, x = r % v.out_width, rest = first + count - r;
    const int end = r + (v.out_width - x < rest ? v.out_width - x : rest);
    size_t line = size_t(row / v.out_height) * size_t(v.high) + size_t(row % v.out_height) * size_t(v.stride_y);
    const int8_t* from = images + line * v.line() + size_t(x * v.stride_x) * size_t(v.channels);
    const int32_t* before = sums + line * size_t(v.wide + 1) + x * v.stride_x;
    for (; r < end; ++r, to += width, from += v.stride_x * v.channels, before += v.stride_x, ++sum) {
      int8_t* next = to;
      *sum = 0;
      for (int i = 0; i < v.kernel_height; ++i)
        for (int j = 0; j < v.kernel_width * v.dilation_x; j += run * v.dilation_x, next += bytes) {
          const size_t down = size_t(i * v.dilation_y);
          const int8_t* some = from + down * v.line() + size_t(j) * size_t(v.channels);
          for (int b = 0; b < bytes; b += int(sizeof(Bytes))) store(next + b, load<Bytes>(some + b));
          const int32_t* side = before + down * size_t(v.wide + 1) + j;
          *sum += side[run] - side[0];
        }
    }
  }
}

inline int convolve(const float* x, const Convolution& v, const Layer& layer, int threads, float* out) {
  const int rows = v.batch * v.out_height * v.out_width, outputs = layer.outputs, width = up(layer.inputs, kAlign);
  const auto line = [&](int i) { return x + size_t(i) * size_t(v.width) * size_t(v.channels); };
  Range whole;
  if (layer.input.mode != 0)
    whole = find_range(v.batch * v.height, v.width * v.channels, layer.input, threads, line);
  if (!whole.finite()) return kNotFinite;
  const Coding c = coding(layer.input, whole);
  const float zero = nearbyintf(-c.offset / c.scale), off = fabsf(zero * c.scale + c.offset);
  const bool exact = off <= 1e-6f * fabsf(c.offset) && zero >= float(c.low) && zero <= float(c.high);
  if (!exact && (v.high > v.height || v.wide > v.width)) return kNotFinite;  // padding needs a code, see quantizers.py
  threads = worth(steps(rows, layer), threads);
  const int fit = kPatches / width / 16 * 16, most = fit < kTile ? kTile : fit < kRows ? fit : kRows;
  const int pieces = up(up(rows, most) / most, threads), each = up(up(rows, pieces) / pieces, 16);
  // images and their sums, then of each thread: patches, sums, and what a product needs
  const auto whole_lines = [](size_t bytes) { return (bytes + 2 * 63) / 64 * 64; };
  const size_t images = whole_lines(v.lines() * v.line()), before = whole_lines(v.lines() * size_t(v.wide + 1) * 4);
  const size_t codes = whole_lines(size_t(each) * size_t(width)), panel = size_t(kBlock) * kPanel * kPlanes * kPair;
  const size_t own = codes + kRows * 4 + panel + size_t(kRows) * kPanel * kPair * 4;
  auto* memory = static_cast<int8_t*>(scratch.get(images + before + own * size_t(threads)));
  if (memory == nullptr) return kNoMemory;
  auto* const sums = reinterpret_cast<int32_t*>(memory + images);
  if (!read_images(x, v, c, exact ? int(zero) : 0, threads, memory, sums)) return kNotFinite;
  float scales[kRows], offsets[kRows];
  for (int r = 0; r < kRows; ++r) scales[r] = c.scale, offsets[r] = c.offset;
  parallel(pieces, threads, [&](int chunk, int slot) {
    const int first = chunk * each, count = rows - first < each ? rows - first : each;
    if (count <= 0) return;
    int8_t* mine = memory + images + before + own * size_t(slot);
    const Codes patches{mine, scales, offsets, reinterpret_cast<int32_t*>(mine + codes), count};
    auto* const unpacked = reinterpret_cast<uint8_t*>(mine + codes + kRows * 4);
    gather(v, memory, sums, first, count, width, mine, patches.sums);
    Linear l = product(patches, layer, kNone, kCached, out + size_t(first) * size_t(outputs));
    l.zero -= flip(l.bits);
    const Tiles tiles;
    for (int pair = 0; pair * kPair * kPanel < outputs; ++pair)
      multiply_panels(l, pair, 0, count, unpacked, reinterpret_cast<int32_t*>(unpacked + panel));
  });
  scratch.trim(64 << 20);
  return kOk;
}

}  // namespace
