// A pool of threads that take small chunks of a job from a counter.
//
// There is no barrier: the caller works too, and when it finds no chunk left it waits only for threads that are inside
// one. A thread that the system has taken off its core delays a job by at most the chunk it holds.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "vectors.h"

namespace {

// What a job calls: chunk counts from 0, slot tells threads of one job apart (0 is the caller).
using Work = void (*)(void* context, int chunk, int slot);

class Pool {
 public:
  static constexpr int kMost = 64;

  // Runs all chunks on up to `threads` threads. A second caller at the same time does its own job alone.
  void run(int chunks, int threads, Work work, void* context) {
    threads = threads < kMost ? threads : kMost;
    if (threads < 2 || chunks < 2 || busy_.exchange(true)) {
      for (int chunk = 0; chunk < chunks; ++chunk) work(context, chunk, 0);
      return;
    }
    grow(threads - 1);
    work_ = work, context_ = context, chunks_ = chunks, helpers_ = threads - 1;
    next_.store(0);
    open_.store(true);
    job_.fetch_add(1);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      pthread_cond_broadcast(&wake_);
    }
    take(0);
    open_.store(false);
    for (int spins = 0; inside_.load() > 0; ++spins) {
      if (spins < 4000) pause();
      else std::this_thread::yield();
    }
    busy_.store(false);
  }

 private:
  void take(int slot) {
    for (int chunk; (chunk = next_.fetch_add(1)) < chunks_;) work_(context_, chunk, slot);
  }

  void grow(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread(&Pool::help, this, started_ + 1).detach();
      } catch (...) {  // no more threads to be had: the job goes on with those there are
        return;
      }
    }
  }

  void help(int slot) {
    unsigned seen = 0;
    for (;;) {
      const auto start = std::chrono::steady_clock::now();
      while (job_.load() == seen) {
        for (int i = 0; i < 32 && job_.load() == seen; ++i) pause();
        if (std::chrono::steady_clock::now() - start > std::chrono::microseconds(100)) {
          std::unique_lock<std::mutex> lock(sleep_);
          sleeping_.fetch_add(1);
          while (job_.load() == seen) pthread_cond_wait(&wake_, sleep_.native_handle());
          sleeping_.fetch_sub(1);
        }
      }
      seen = job_.load();
      inside_.fetch_add(1);  // before the look at open_: the caller sees it, or this thread sees that the job is over
      if (open_.load() && slot <= helpers_) take(slot);
      inside_.fetch_sub(1);
    }
  }

  // std::condition_variable and try_lock would need a newer C++ and C library than wheels for all Linux systems may.
  std::mutex sleep_;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
  std::atomic<unsigned> job_{0};
  std::atomic<int> next_{0}, inside_{0}, sleeping_{0};
  std::atomic<bool> busy_{false}, open_{false};
  int started_ = 0, chunks_ = 0, helpers_ = 0;
  Work work_ = nullptr;
  void* context_ = nullptr;
};

// Never destroyed, as its threads never end; a child of fork() gets a new one, since it has none of the threads.
inline Pool*& pool() {
  static Pool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return instance;
}

template <typename F>
void parallel(int chunks, int threads, F&& body) {
  pool()->run(chunks, threads, [](void* f, int chunk, int slot) { (*static_cast<F*>(f))(chunk, slot); }, &body);
}

// Memory that a calling thread keeps for its next call, aligned to cache lines. Null if there is none to be had.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = bytes + bytes / 4;
      data_ = aligned_alloc(64, (size_ + 63) / 64 * 64);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }
  // Gives back what is too large to keep.
  void trim(size_t most) {
    if (size_ <= most) return;
    free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
