// What this machine's instructions give at most, in 1e9 operations a second, on one thread, best of some runs:
// c++ -O2 -march=x86-64-v3 peak.cpp -DKIND=...; KIND 0: float32 FMA, 1: AVX2 maddubs and 16-bit add, 2: vpdpbusd, 3: tdpbsud
// (0 with -march=x86-64-v4 uses 512 bits, as float engines do where they can).
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#define EACH(f) f("1") f("2") f("3") f("4") f("5") f("6") f("7") f("8") f("9") f("10") f("11") f("12")
#define CLEAR(i) "vpxor %%xmm" i ",%%xmm" i ",%%xmm" i "\n"
#define LOOP(body) asm volatile("vpxor %%xmm0,%%xmm0,%%xmm0\n" EACH(CLEAR) "mov %0,%%rcx\n1:\n" body "dec %%rcx\njnz 1b\n" ::"r"(n) : "rcx", "memory")

int main() {
  const long n = 2000000;
  double best = 0, operations = 0;
#if KIND == 3
  struct __attribute__((packed)) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
  asm volatile("ldtilecfg %0" ::"m"(config));
#endif
  for (int run = 0; run < 15; ++run) {
    const double start = now();
#if KIND == 0 && defined(__AVX512F__)
#define STEP(i) "vfmadd231ps %%zmm0,%%zmm0,%%zmm" i "\n"
    LOOP(EACH(STEP));
    operations = 12.0 * 32;
#elif KIND == 0
#define STEP(i) "vfmadd231ps %%ymm0,%%ymm0,%%ymm" i "\n"
    LOOP(EACH(STEP));
    operations = 12.0 * 16;
#elif KIND == 1
#define STEP(i) "vpmaddubsw %%ymm0,%%ymm0,%%ymm13\nvpaddw %%ymm13,%%ymm" i ",%%ymm" i "\n"
    LOOP(EACH(STEP));
    operations = 12.0 * 64;
#elif KIND == 2
#define STEP(i) "vpdpbusd %%zmm0,%%zmm0,%%zmm" i "\n"
    LOOP(EACH(STEP));
    operations = 12.0 * 128;
#else
    LOOP("tdpbsud %%tmm6,%%tmm7,%%tmm0\ntdpbsud %%tmm6,%%tmm7,%%tmm1\ntdpbsud %%tmm6,%%tmm7,%%tmm2\n");
    operations = 3.0 * 16 * 16 * 64 * 2;
#endif
    const double rate = double(n) * operations / (now() - start) / 1e9;
    best = rate > best ? rate : best;
  }
  std::printf("%.1f\n", best);
}
