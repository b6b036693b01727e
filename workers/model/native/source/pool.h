// Threads that share the tasks of one loop. Which thread takes a task never decides what the task computes.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "instructions.h"

namespace baton {

class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this, i] { help(i); });
  }
  ~Pool() {
    stopping_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }
  Pool(const Pool&) = delete;

  int num_threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Calls task(index, thread) for every index below `count`, and returns when all are done.
  //
  // Neighbours go to one thread, a few at a time, so that what it fetches beyond one task's memory is for the next one.
  template <class Task> void run(int64_t count, Task&& task) {
    if (helpers_.empty() || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    context_ = &task;
    call_ = [](void* context, int64_t index, int thread) {
      (*static_cast<std::remove_reference_t<Task>*>(context))(index, thread);
    };
    count_ = count;
    run_ = std::clamp<int64_t>(count / (num_threads() * kRunsPerThread), 1, kLongestRun);
    next_.store(0, std::memory_order_relaxed);
    is_open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    work(0);
    // A helper that has not come by now is not waited for: its core may be busy with something else.
    is_open_.store(false);
    for (int spins = 0; busy_.load() != 0; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 20000;  // some tens of microseconds: longer than the serial parts of a step
  static constexpr int64_t kLongestRun = 4, kRunsPerThread = 4;  // so that a thread that is held up leaves little to wait for

  void work(int thread) {
    for (int64_t first; (first = next_.fetch_add(run_, std::memory_order_relaxed)) < count_;)
      for (int64_t i = first; i < std::min(count_, first + run_); ++i) call_(context_, i, thread);
  }

  void help(int thread) {
    const FlushDenormals flush;
    for (uint32_t seen = 0;;) {
      for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) pause_briefly();
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (stopping_) return;
      busy_.fetch_add(1);  // before the look at is_open_, as the owner closes before it looks at busy_
      if (is_open_.load()) work(thread);
      busy_.fetch_sub(1);
    }
  }

  std::vector<std::thread> helpers_;
  std::atomic<uint32_t> round_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> is_open_{false}, stopping_{false};
  int64_t count_ = 0, run_ = 1;
  void* context_ = nullptr;
  void (*call_)(void*, int64_t, int) = nullptr;
};

}  // namespace baton
