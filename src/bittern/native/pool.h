// Threads that take small chunks of a job, each first those of its own part of the job, then those of others.
//
// Parts lie alike in each job, so that a thread mostly reads what it wrote itself, as rows of a matrix. What cores must give
// each other takes its time, and between cores that share no cache more than the arithmetic.
//
// They are PyTorch's own, those of OpenMP: after each operation of PyTorch these spin for some milliseconds, and threads
// beside them would only take turns with them. A caller with many jobs borrows them once for all. Within there is no
// barrier: the caller works too, and when it finds no chunk left it waits only for threads that are inside one.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <thread>

#include "vectors.h"

namespace {

// What a job calls: chunk counts from 0, slot tells threads of one job apart (0 is the caller).
using Work = void (*)(const void* context, int chunk, int slot);

#if defined(__linux__)
inline int core() { return sched_getcpu(); }

// Linux often wakes a thread on the core of the one that calls it, and leaves both there for milliseconds.
inline void leave(int core) {
  cpu_set_t all;
  if (sched_getcpu() != core || sched_getaffinity(0, sizeof(all), &all) != 0) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof(others), &others) == 0) sched_setaffinity(0, sizeof(all), &all);
}
#else
inline int core() { return 0; }
inline void leave(int) {}
#endif

// The caller of some jobs, one after the other, and those who help it until they are over.
class Team {
 public:
  void run(int chunks, int threads, Work work, const void* context) {
    work_ = work, context_ = context, threads_ = threads < kMost ? threads : kMost;
    for (int i = 0, from = 0; i < threads_; from = parts_[i++].end) {
      const int end = int((int64_t(chunks) * (i + 1) + threads_ - 1) / threads_);
      parts_[i].next.store(from), parts_[i].end_for_others.store(end), parts_[i].end = end;
    }
    open_.store(true);
    job_.fetch_add(1);
    take(0);
    open_.store(false);
    for (int spins = 0; inside_.load() > 0;) rest(&spins);
  }

  void end() { over_.store(true); }
  // Waits a little for helpers, and gives way once to those that Linux woke on this core.
  void gather(int helpers) {
    for (int i = 0; i < 100 && helpers_.load() < helpers; ++i) pause();
    if (helpers_.load() < helpers) std::this_thread::yield();
  }

  void help(int core) {
    const int slot = ++helpers_;
    if (slot >= kMost) return;  // so many would only wait for each other
    leave(core);
    for (int seen = 0; !over_.load();) {
      for (int spins = 0; job_.load() == seen && !over_.load();) rest(&spins);
      seen = job_.load();
      inside_.fetch_add(1);  // before the look at open_: the caller sees it, or this thread sees that the job is over
      if (open_.load() && slot < threads_) take(slot);
      inside_.fetch_sub(1);
    }
  }

 private:
  static void rest(int* spins) { ++*spins < 4000 ? pause() : std::this_thread::yield(); }

  static constexpr int kMost = 64;

  // Chunks of a job that lie side by side, of which the last is left to the part's own thread if that is there.
  struct alignas(64) Part {
    std::atomic<int> next{0}, end_for_others{0};
    int end = 0;
  };

  void take(int slot) {
    parts_[slot].end_for_others.store(parts_[slot].end - 1);
    for (int i = 0; i < threads_; ++i)
      for (Part& part = parts_[(slot + i) % threads_]; part.next.load() < (i == 0 ? part.end : part.end_for_others.load());)
        if (const int chunk = part.next.fetch_add(1); chunk < part.end) work_(context_, chunk, slot);
  }

  Part parts_[kMost];
  std::atomic<int> job_{0}, inside_{0}, helpers_{0};
  std::atomic<bool> open_{false}, over_{false};
  int threads_ = 0;
  Work work_ = nullptr;
  const void* context_ = nullptr;
};

// How OpenMP calls its threads, GOMP_parallel, and whether they are taken: for good where there are none, as after fork().
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel borrow = nullptr;
std::atomic<bool> taken{true};

inline void lend(Parallel openmp) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { taken.store(true); });
  if (borrow == nullptr && openmp != nullptr && registered == 0) borrow = openmp, taken.store(false);
}

thread_local Team* team = nullptr;  // that of this thread, while it has one

// Calls body with a team of up to `threads`, as many as PyTorch uses (OpenMP ends those above), who must all come back in the
// end. A second caller at the same time works alone, and asks again at its next job. Work must not call `parallel`.
template <typename F>
void with_team(int threads, F&& body) {
  if (threads < 2 || team != nullptr || taken.exchange(true)) return body();
  struct All {
    F& body;
    const int threads, from = core();
    Team team = {};
  } all{body, threads};
  const auto each = [](void* data) {
    All& all = *static_cast<All*>(data);
    if (team == &all.team) all.team.gather(all.threads - 1), all.body(), all.team.end();
    else all.team.help(all.from);
  };
  team = &all.team;
  borrow(each, &all, unsigned(threads), 0);
  team = nullptr;
  taken.store(false);
}

// A function of its own: where work is inlined here, loops inside are compiled less well.
__attribute__((noinline)) void run(int chunks, int threads, Work work, const void* context) {
  with_team(chunks < 2 ? 1 : threads, [=] {
    if (chunks > 1 && threads > 1 && team != nullptr) return team->run(chunks, threads, work, context);
    for (int chunk = 0; chunk < chunks; ++chunk) work(context, chunk, 0);
  });
}

// All chunks, on up to `threads` threads.
template <typename F>
void parallel(int chunks, int threads, const F& body) {
  run(chunks, threads, [](const void* f, int chunk, int slot) { (*static_cast<const F*>(f))(chunk, slot); }, &body);
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
