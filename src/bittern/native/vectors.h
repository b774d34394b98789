// One register of floats, of integers or of bytes. Sums, products and comparisons are the compiler's; the few steps that it
// lacks are in one file for each processor.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Bytes = uint8_t __attribute__((vector_size(kLanes * 4)));
using Sixteen = uint8_t __attribute__((vector_size(16)));

template <typename V = Floats, typename T>
inline V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store(T* to, const V& v) {
  memcpy(to, &v, sizeof(v));
}

// -1 in the first n places, 0 in the others.
inline Ints first(int n) {
  Ints place;
  for (int i = 0; i < kLanes; ++i) place[i] = i;
  return place < n;
}

}  // namespace

#if defined(__aarch64__)
#include "arm.h"
#else
#include "x86.h"
#endif
