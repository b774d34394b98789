// Steps on registers of aarch64: NEON, which all of them have.
#pragma once
#include <arm_neon.h>

#include "vectors.h"

namespace {

inline void pause() { asm volatile("yield"); }

// See x86.h; there is nothing to be won here.
inline void stream(float* to, const Floats& v) { store(to, v); }

inline void drain() {}

// 8 codes of `bits` bits, counted from the lowest, one in each byte.
inline uint64_t spread(uint64_t x, int bits) {
  // halves are moved apart, three times: of 8 codes, of 4 and of 2
  for (int half = 4, place = 32; half > 0; half /= 2, place /= 2) {
    const uint64_t low = ((uint64_t(1) << half * bits) - 1) * (~uint64_t(0) / ((uint64_t(1) << (2 * place - 1) << 1) - 1));
    x = (x & low) | (x << (place - half * bits) & low << place);
  }
  return x;
}

inline float add_up(const Floats& v) { return vaddvq_f32(float32x4_t(v)); }
inline int32_t add_up(const Ints& v) { return vaddvq_s32(int32x4_t(v)); }
inline float largest(const Floats& v) { return vmaxvq_f32(float32x4_t(v)); }

// Not fmin and fmax, for which zeros differ by their sign: x86-64 gives b if neither is smaller.
inline Floats smaller(const Floats& a, const Floats& b) { return a < b ? a : b; }

inline Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }

// The nearest whole numbers, of two the even one.
inline Floats whole(const Floats& v) { return Floats(vrndnq_f32(float32x4_t(v))); }

inline bool any_above(const Floats& v, float limit) {
  return vmaxvq_u32(vcgtq_f32(float32x4_t(v), vdupq_n_f32(limit))) != 0;
}

// v, of which the compiler then does not know that it is a product: it would make one operation of product and sum.
inline Floats rounded(Floats v) {
  asm("" : "+w"(v));
  return v;
}

// n values, fewer than kLanes, and zeros.
inline Floats load_first(const float* from, int n) {
  Floats v = {};
  for (int i = 0; i < n; ++i) v[i] = from[i];
  return v;
}

inline void store_first(float* to, const Floats& v, int n) {
  for (int i = 0; i < n; ++i) to[i] = v[i];
}

// Bytes from 0 to 255 as floats.
inline Floats load_bytes(const uint8_t* from) {
  uint32_t four;
  memcpy(&four, from, 4);
  return Floats(vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))))));
}

// The lowest bytes of integers.
inline void store_bytes(int8_t* to, const Ints& v) {
  const int16x4_t words = vmovn_s32(int32x4_t(v));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  memcpy(to, &bytes, 4);
}

inline void store_first_bytes(int8_t* to, const Ints& v, int n) {
  for (int i = 0; i < n; ++i) to[i] = int8_t(v[i]);
}

// Four rows of 16 bytes, column by column.
inline void columns_of(const Sixteen* rows, Sixteen* out) {
  const uint8x16_t a = uint8x16_t(rows[0]), b = uint8x16_t(rows[1]), c = uint8x16_t(rows[2]), d = uint8x16_t(rows[3]);
  const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(a, b)), high0 = vreinterpretq_u16_u8(vzip2q_u8(a, b));
  const uint16x8_t low1 = vreinterpretq_u16_u8(vzip1q_u8(c, d)), high1 = vreinterpretq_u16_u8(vzip2q_u8(c, d));
  out[0] = Sixteen(vzip1q_u16(low0, low1)), out[1] = Sixteen(vzip2q_u16(low0, low1));
  out[2] = Sixteen(vzip1q_u16(high0, high1)), out[3] = Sixteen(vzip2q_u16(high0, high1));
}

}  // namespace
