// Threads that take small chunks of a job from a counter.
//
// They are PyTorch's own, those of OpenMP: after each operation of PyTorch these spin for some milliseconds, and threads
// beside them would only take turns with them. A caller with many jobs borrows them once for all. Within there is no
// barrier: the caller works too, and when it finds no chunk left it waits only for threads that are inside one.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "vectors.h"

namespace {

// What a job calls: chunk counts from 0, slot tells threads of one job apart (0 is the caller).
using Work = void (*)(const void* context, int chunk, int slot);

// The caller of some jobs, one after the other, and those who help it until they are over.
class Team {
 public:
  void run(int chunks, Work work, const void* context) {
    work_ = work, context_ = context, chunks_ = chunks;
    next_.store(0);
    open_.store(true);
    job_.fetch_add(1);
    take(0);
    open_.store(false);
    for (int spins = 0; inside_.load() > 0;) rest(&spins);
  }

  void end() { over_.store(true); }

  void help() {
    const int slot = ++helpers_;
    for (unsigned seen = 0; !over_.load();) {
      for (int spins = 0; job_.load() == seen && !over_.load();) rest(&spins);
      seen = job_.load();
      inside_.fetch_add(1);  // before the look at open_: the caller sees it, or this thread sees that the job is over
      if (open_.load()) take(slot);
      inside_.fetch_sub(1);
    }
  }

 private:
  static void rest(int* spins) {
    if (++*spins < 4000) pause();
    else std::this_thread::yield();
  }

  void take(int slot) {
    for (int chunk; (chunk = next_.fetch_add(1)) < chunks_;) work_(context_, chunk, slot);
  }

  std::atomic<unsigned> job_{0};
  std::atomic<int> next_{0}, inside_{0}, helpers_{0};
  std::atomic<bool> open_{false}, over_{false};
  int chunks_ = 0;
  Work work_ = nullptr;
  const void* context_ = nullptr;
};

// OpenMP's threads, as far as there are any: PyTorch has loaded it. A child of fork() has none of them.
struct Lender {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  std::atomic<bool> taken{parallel == nullptr};
  std::atomic<int> most{0}, late{0};  // threads until then; teams in succession that came late
  std::atomic<double> until{0};
};

inline Lender& lender() {
  static Lender instance;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { lender().taken.store(true); });
  return (void)registered, instance;
}

thread_local Team* team = nullptr;  // that of this thread, while it has one

inline double seconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

// Seconds that this thread was off its core, since some time.
inline double off_core() { return seconds(CLOCK_MONOTONIC) - seconds(CLOCK_THREAD_CPUTIME_ID); }

// Calls body with a team of up to `threads`. A second caller at the same time works alone. All must come back in the end:
// where one is off its core for long, time and again, others want these cores, and for a while there is one thread less.
template <typename F>
void with_team(int threads, F&& body) {
  if (threads < 2 || team != nullptr) return body();
  Lender& from = lender();
  if (from.most.load() < threads && seconds(CLOCK_MONOTONIC) < from.until.load()) threads = from.most.load();
  if (threads < 2 || from.taken.exchange(true)) return body();
  struct All {
    F& body;
    Team team = {};
    std::atomic<bool> late{false};
  } all{body};
  const auto each = [](void* data) {
    All& all = *static_cast<All*>(data);
    const double before = off_core(), start = seconds(CLOCK_MONOTONIC);
    if (team == &all.team) all.body(), all.team.end();
    else all.team.help();
    const double off = off_core() - before, took = seconds(CLOCK_MONOTONIC) - start;
    if (off > 500e-6 && off > took / 8) all.late.store(true);
  };
  team = &all.team;
  from.parallel(each, &all, unsigned(threads), 0);
  team = nullptr;
  from.late.store(all.late.load() ? from.late.load() + 1 : 0);
  if (from.late.load() > 2) from.most.store(threads - 1), from.until.store(seconds(CLOCK_MONOTONIC) + 0.25);
  from.taken.store(false);
}

// All chunks, on up to `threads` threads.
template <typename F>
void parallel(int chunks, int threads, const F& body) {
  if (chunks < 2) threads = 1;
  with_team(threads, [&] {
    if (threads > 1 && team != nullptr)
      return team->run(chunks, [](const void* f, int chunk, int slot) { (*static_cast<const F*>(f))(chunk, slot); }, &body);
    for (int chunk = 0; chunk < chunks; ++chunk) body(chunk, 0);
  });
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
