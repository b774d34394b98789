// Products of quantized activations and packed weights, and what stands between them in a Transformer, for CPUs.
//
// A plain C interface without any framework: the caller owns all memory and has checked sizes (see __init__.py).
// The file is compiled once for each kind of CPU; the library that suits the machine is chosen when it is loaded.
// Floats must be finite: functions that read unchecked ones return 1 if they are not, and the caller does without us.

#include "attention.h"
#include "gemm.h"
#include "math.h"
#include "pool.h"
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
  bool offsets;
};

// Outputs of some rows and of `count` panels from their integer sums, with the activation. A row of the output is
// written in one go: rows lie far apart, and each visit costs a look-up of its page.
template <bool offsets>
inline void finish(const Linear& l, int row0, int rows, int output, int count, const int32_t* sums, size_t next_sums) {
  const int wide = count * kPanel, real = l.outputs - output < wide ? l.outputs - output : wide;
  float weight_scale[kPair * kPanel], bias[kPair * kPanel], values[kPair * kPanel];
  int32_t weight_sums[kPair * kPanel];
  memcpy(weight_scale, l.weight_scale + output, sizeof(float) * size_t(wide));
  memcpy(bias, l.bias + output, sizeof(float) * size_t(wide));
  memcpy(weight_sums, l.weight_sums + output, sizeof(int32_t) * size_t(wide));
  for (int r = 0; r < rows; ++r, sums += kPanel) {
    const float scale = l.scale[row0 + r], offset = l.offset[row0 + r];
    const int32_t zero = l.zero * l.sums[row0 + r];
    for (int p = 0; p < count; ++p) {
      const int32_t* sum = sums + p * next_sums;
#pragma omp simd
      for (int i = 0; i < kPanel; ++i) {
        const int at = p * kPanel + i;
        if (offsets) {
          const int32_t exact = sum[i] - zero + l.shift * weight_sums[at];
          values[at] = weight_scale[at] * (scale * float(exact) + offset * float(weight_sums[at])) + bias[at];
        } else {
          values[at] = weight_scale[at] * scale * float(sum[i] - zero) + bias[at];
        }
      }
    }
    if (l.activation != kNone) activate(values, wide, l.activation);
    float* out = l.out + size_t(row0 + r) * l.outputs + output;
    if (real == kPair * kPanel) memcpy(out, values, sizeof(values));
    else memcpy(out, values, sizeof(float) * size_t(real));
  }
}

void multiply_panels(const Linear& l, int pair, int row0, int rows, uint8_t* panel, int32_t* sums) {
  const int width = up(l.columns, kAlign), first = pair * kPair;
  const int all = up(l.outputs, kPanel) / kPanel, count = all - first < kPair ? all - first : kPair;
  const size_t packed = size_t(width) * kPanel * l.bits / 8, next = size_t(kBlock) * kPanel * planes(l.bits);
  const size_t next_sums = size_t(kTile) * kPanel;
  for (int at = 0; at < width; at += kBlock) {
    const int groups = (width - at < kBlock ? width - at : kBlock) / 4;
    for (int p = 0; p < count; ++p)
      expand(l.panels + (first + p) * packed + size_t(at) * kPanel * l.bits / 8, groups, l.bits, panel + p * next);
    for (int r = 0; r < rows; r += kTile) {
      const int some = rows - r < kTile ? rows - r : kTile;
      int32_t* mine = width <= kBlock ? sums : sums + size_t(r) * kPanel * kPair;
      multiply(panel, next, count, l.a + size_t(row0 + r) * width + at, size_t(width), some, groups, l.bits, l.top, mine,
               next_sums, at > 0);
      if (at + kBlock >= width)
        (l.offsets ? finish<true> : finish<false>)(l, row0 + r, some, first * kPanel, count, mine, next_sums);
    }
  }
}

}  // namespace

extern "C" {

// Lets this process use the AMX tiles, which Linux grants on request; 0 if they are granted or not needed.
int bittern_start() {
#if defined(__AMX_INT8__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 0 : 1;
#else
  return 0;
#endif
}

int64_t bittern_panel_bytes(int rows, int columns, int bits) {
  return int64_t(up(rows, kPanel)) * up(columns, kAlign) * bits / 8;
}

void bittern_pack(const uint8_t* codes, int rows, int columns, int bits, uint8_t* panels) {
  pack(codes, rows, columns, bits, panels);
}

void bittern_unpack(const uint8_t* panels, int rows, int columns, int bits, uint8_t* codes) {
  unpack(panels, rows, columns, bits, codes);
}

// Rows of floats to bytes (rows up to a multiple of 16, columns up to one of 64), with scale, offset and sum of each row.
int bittern_quantize(const float* x, int rows, int columns, const Format* format, int threads, int8_t* out,
                     float* scale, float* offset, int32_t* sums) {
  return quantize_rows(x, rows, columns, *format, threads, out, scale, offset, sums);
}

// out (rows, outputs) = quantized rows x packed weights + bias, then the activation. top: the largest code; zero: the
// code that stands for 0; weight_sums: of the weights' codes less zero, for each output; shift: what was taken from the
// rows' codes. weight_scale, bias and weight_sums are padded to a multiple of 16.
int bittern_linear(const int8_t* a, const float* scale, const float* offset, const int32_t* sums, int rows, int columns,
                   const uint8_t* panels, const float* weight_scale, const float* bias, const int32_t* weight_sums,
                   int outputs, int bits, int top, int zero, int shift, int offsets, int activation, int threads,
                   float* out) {
  if (rows == 0 || outputs == 0) return kOk;
  const Linear l{a, scale, offset, sums, panels, weight_scale, bias, weight_sums, out, rows, columns, outputs, bits,
                 top, zero, shift, activation, offsets != 0};
  const int pairs = up(up(outputs, kPanel) / kPanel, kPair) / kPair;
  const int pieces = up(rows, kRows) / kRows, each = up(up(rows, pieces) / pieces, 16);
  threads = worth(double(rows) * columns * outputs / 64, threads);
  const size_t panel = size_t(kBlock) * kPanel * kPlanes * kPair, all = panel + size_t(kRows) * kPanel * kPair * 4;
  auto* memory = static_cast<uint8_t*>(scratch.get(all * size_t(threads)));
  if (memory == nullptr) return kNoMemory;
  // some pairs at a time, so that a piece of work outweighs taking it, but enough pieces to go round
  const int few = pairs / (4 * threads), step = few < 1 ? 1 : few < 4 ? few : 4, steps = up(pairs, step) / step;
  parallel(steps * pieces, threads, [&](int chunk, int slot) {
    const int row0 = chunk / steps * each, count = rows - row0 < each ? rows - row0 : each;
    uint8_t* mine = memory + all * size_t(slot);
    const Tiles tiles;
    for (int pair = chunk % steps * step; pair < pairs && pair < (chunk % steps + 1) * step && count > 0; ++pair)
      multiply_panels(l, pair, row0, count, mine, reinterpret_cast<int32_t*>(mine + panel));
  });
  return kOk;
}

// out = (x - mean) / deviation of each row, times weight, plus bias.
int bittern_norm(const float* x, int rows, int columns, const float* weight, const float* bias, float epsilon,
                 int threads, float* out) {
  const int piece = 16;
  parallel(up(rows, piece) / piece, worth(double(rows) * columns, threads), [&](int chunk, int) {
    for (int r = chunk * piece; r < rows && r < (chunk + 1) * piece; ++r) {
      const float* from = x + size_t(r) * columns;
      float* to = out + size_t(r) * columns;
      float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
      for (int i = 0; i < columns; ++i) mean += from[i];
      mean /= float(columns);
#pragma omp simd reduction(+ : square)
      for (int i = 0; i < columns; ++i) square += (from[i] - mean) * (from[i] - mean);
      const float factor = 1 / sqrtf(square / float(columns) + epsilon);
#pragma omp simd
      for (int i = 0; i < columns; ++i) to[i] = (from[i] - mean) * factor * weight[i] + bias[i];
    }
  });
  return kOk;
}

int bittern_activate(const float* x, int64_t count, int activation, int threads, float* out) {
  const int piece = 8192, chunks = int((count + piece - 1) / piece);
  parallel(chunks, worth(double(count) * 4, threads), [&](int chunk, int) {
    const int64_t first = int64_t(chunk) * piece;
    const int n = int(count - first < piece ? count - first : piece);
    if (x != out) memcpy(out + first, x + first, sizeof(float) * size_t(n));
    activate(out + first, n, activation);
  });
  return kOk;
}

// Attention with quantized queries, keys, values and map; see attention.h.
int bittern_attention(const Attention* attention, int threads) { return attend(*attention, threads); }

}  // extern "C"
