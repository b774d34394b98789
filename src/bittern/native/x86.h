// Steps on registers of x86-64: AVX2, or AVX-512 where the kind has it.
#pragma once
#include <immintrin.h>

#include "vectors.h"

namespace {

inline void pause() { _mm_pause(); }

// Values past the caches: a line that is written as a whole need not be fetched first. `drain` after the last.
inline void stream(float* to, const Floats& v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, __m512(v));
#else
  _mm256_stream_ps(to, __m256(v));
#endif
}

inline void drain() { _mm_sfence(); }

// 8 codes of `bits` bits, counted from the lowest, one in each byte.
inline uint64_t spread(uint64_t x, int bits) {
  return _pdep_u64(x, ((uint64_t(1) << bits) - 1) * 0x0101010101010101);
}

#if defined(__AVX512F__)
inline float add_up(const Floats& v) { return _mm512_reduce_add_ps(__m512(v)); }
inline float largest(const Floats& v) { return _mm512_reduce_max_ps(__m512(v)); }
inline __m256i halves(const Ints& v) {  // added; unmasked, GCC 12 would warn of its own header
  const __m256i low = _mm512_maskz_extracti64x4_epi64(0xff, __m512i(v), 0);
  return _mm256_add_epi32(low, _mm512_maskz_extracti64x4_epi64(0xff, __m512i(v), 1));
}
#else
inline __m256i halves(const Ints& v) { return __m256i(v); }

inline float add_up(const Floats& v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(const Floats& v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

inline int32_t add_up(const Ints& v) {
  const __m256i eight = halves(v);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

inline Floats smaller(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return Floats(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
#else
  return Floats(_mm256_min_ps(__m256(a), __m256(b)));
#endif
}

inline Floats larger(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return Floats(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
#else
  return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#endif
}

// The nearest whole numbers, of two the even one.
inline Floats whole(const Floats& v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  return Floats(_mm512_maskz_roundscale_ps(0xffff, __m512(v), nearest));
#else
  return Floats(_mm256_round_ps(__m256(v), nearest));
#endif
}

inline bool any_above(const Floats& v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(v), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return _mm256_movemask_ps(_mm256_cmp_ps(__m256(v), _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#endif
}

// v, of which the compiler then does not know that it is a product: it would make one operation of product and sum.
inline Floats rounded(Floats v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
  return v;
}

// n values, fewer than kLanes, and zeros.
inline Floats load_first(const float* from, int n) {
#if defined(__AVX512F__)
  return Floats(_mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), from));
#else
  return Floats(_mm256_maskload_ps(from, __m256i(first(n))));
#endif
}

inline void store_first(float* to, const Floats& v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1 << n) - 1), __m512(v));
#else
  _mm256_maskstore_ps(to, __m256i(first(n)), __m256(v));
#endif
}

// Bytes from 0 to 255 as floats.
inline Floats load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#else
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#endif
}

// The lowest bytes of integers.
inline void store_bytes(int8_t* to, const Ints& v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(v)));
#else
  const __m256i fours = _mm256_shuffle_epi8(__m256i(v), _mm256_set1_epi32(0x0c080400));
  const __m128i low = _mm256_castsi256_si128(fours), high = _mm256_extracti128_si256(fours, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low, high));
#endif
}

inline void store_first_bytes(int8_t* to, const Ints& v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi8(to, __mmask16((1 << n) - 1), __m512i(v));
#else
  int8_t bytes[kLanes];
  store_bytes(bytes, v);
  memcpy(to, bytes, size_t(n));
#endif
}

// Four rows of 16 bytes, column by column.
inline void columns_of(const Sixteen* rows, Sixteen* out) {
  const __m128i a = __m128i(rows[0]), b = __m128i(rows[1]), c = __m128i(rows[2]), d = __m128i(rows[3]);
  const __m128i low0 = _mm_unpacklo_epi8(a, b), high0 = _mm_unpackhi_epi8(a, b);
  const __m128i low1 = _mm_unpacklo_epi8(c, d), high1 = _mm_unpackhi_epi8(c, d);
  out[0] = Sixteen(_mm_unpacklo_epi16(low0, low1)), out[1] = Sixteen(_mm_unpackhi_epi16(low0, low1));
  out[2] = Sixteen(_mm_unpacklo_epi16(high0, high1)), out[3] = Sixteen(_mm_unpackhi_epi16(high0, high1));
}

}  // namespace
