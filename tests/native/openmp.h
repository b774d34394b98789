// What the kernels borrow threads of, for programs without PyTorch.
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
