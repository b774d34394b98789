// What the kernels borrow threads of, and the size of what they pack weights into, for programs without PyTorch.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

static std::atomic<int> borrowed{0};

static void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  borrowed += int(threads) - 1;
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

static size_t panel_bytes(int outputs, int inputs, int bits) {
  return size_t(up(outputs, kPanel)) * size_t(up(inputs, kAlign)) * size_t(bits) / 8;
}
