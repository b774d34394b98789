// Products by AMX tiles, and by AVX-512 VNNI for few rows.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "dot_avx512.h"

namespace {

constexpr int kVectors = 4;  // rows that are better multiplied without tiles

// Lets this process use the tiles, which Linux grants on request.
inline bool start() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// A thread's tiles, ready to use while this lives.
struct Tiles {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Tiles() {
    static const Config config;  // in memory as a whole: GCC's intrinsic says that it reads 8 bytes
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Tiles of 16 rows x 16 outputs; `a` must have memory for a multiple of 16 rows, and sums too.
template <int R, int P>
inline void tile_amx(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int groups, int32_t* sums,
                     size_t next_sums, bool add) {
  constexpr int ld = kPanel * 4;
  if (add) {
    _tile_loadd(0, sums, ld);
    if (P > 1) _tile_loadd(1, sums + next_sums, ld);
    if (R > 1) _tile_loadd(2, sums + 16 * kPanel, ld);
    if (R > 1 && P > 1) _tile_loadd(3, sums + next_sums + 16 * kPanel, ld);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (int g = 0; g < groups; g += 16) {
    _tile_loadd(4, a + g * 4, stride);
    _tile_loadd(6, panel + g * 64, 64);
    _tile_dpbsud(0, 4, 6);
    if (P > 1) {
      _tile_loadd(7, panel + next + g * 64, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, a + 16 * stride + g * 4, stride);
      _tile_dpbsud(2, 5, 6);
      if (P > 1) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, ld);
  if (P > 1) _tile_stored(1, sums + next_sums, ld);
  if (R > 1) _tile_stored(2, sums + 16 * kPanel, ld);
  if (R > 1 && P > 1) _tile_stored(3, sums + next_sums + 16 * kPanel, ld);
}

template <int P>
void rows_amx(const uint8_t* panel, size_t next, const int8_t* a, size_t stride, int rows, int groups, int32_t* sums,
              size_t next_sums, bool add) {
  int r = 0;
  for (; r + 16 < rows; r += 32)
    tile_amx<2, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
  if (r < rows) tile_amx<1, P>(panel, next, a + r * stride, stride, groups, sums + r * kPanel, next_sums, add);
}

inline void multiply(const uint8_t* panel, size_t next, int count, const int8_t* a, size_t stride, int rows, int groups,
                     int field, int, int, int32_t* sums, size_t next_sums, bool add, const Ahead& ahead) {
  if (rows <= kVectors) return multiply_vectors(panel, next, count, a, stride, rows, groups, field, sums, next_sums, add, ahead);
  if (count == 2) rows_amx<2>(panel, next, a, stride, rows, groups, sums, next_sums, add);
  else rows_amx<1>(panel, next, a, stride, rows, groups, sums, next_sums, add);
}

}  // namespace
