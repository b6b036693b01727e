// Threads that share the tasks of one loop. Which thread takes a task never decides what the task computes.
//
// Each thread begins with neighbouring tasks of its own, and takes half of what another has left when it is done. So a
// thread whose core is busy with something else holds up no more than the one task that it is in.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "amx.h"

namespace baton {

class Pool {
 public:
  // The helpers run on the processors that the calling thread may run on.
  explicit Pool(int num_threads) : seats_(num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) helpers_.emplace_back([this, i] { help(i); });
    } catch (...) {  // the system gives no more threads: those that began must end first
      end();
      throw;
    }
  }
  ~Pool() { end(); }
  Pool(const Pool&) = delete;

  int num_threads() const { return static_cast<int>(seats_.size()); }

  // Calls task(index, thread) for every index below `count`, and returns when all are done. A task must not throw.
  template <class Task> void run(int64_t count, Task&& task) {
    if (helpers_.empty() || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    if (count > UINT32_MAX) throw std::invalid_argument("a step has too many tasks");
    context_ = &task;
    call_ = [](void* context, int64_t index, int thread) {
      (*static_cast<std::remove_reference_t<Task>*>(context))(index, thread);
    };
    const int64_t threads = num_threads();
    for (int64_t i = 0; i < threads; ++i)
      seats_[i].left.store({static_cast<uint32_t>(count * i / threads), static_cast<uint32_t>(count * (i + 1) / threads)},
                           std::memory_order_relaxed);
    is_open_.store(true);
    round_.value.fetch_add(1);
    round_.value.notify_all();
    work(0);
    // A helper that has not come by now is not waited for: its core may be busy with something else.
    is_open_.store(false);
    for (uint32_t busy; (busy = busy_.value.load()) != 0;) wait_while(busy_.value, busy);
  }

 private:
  struct Range {
    uint32_t first, last;
    uint32_t size() const { return last - first; }
  };
  // What several threads write has a cache line of its own.
  struct alignas(64) Seat {
    std::atomic<Range> left{Range{0, 0}};
  };
  struct alignas(64) Counter {
    std::atomic<uint32_t> value{0};
  };
  static_assert(std::atomic<Range>::is_always_lock_free);

  // Longer than the serial parts of a step; about what going to sleep and being woken takes.
  static constexpr std::chrono::microseconds kSpin{50};

  // Returns when the value is another one. Spins first, then sleeps, so that its core is free for whoever is late.
  static void wait_while(std::atomic<uint32_t>& value, uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (value.load(std::memory_order_acquire) != seen) return;
        pause_briefly();
      }
    } while (std::chrono::steady_clock::now() < until);
    release_tiles();
    value.wait(seen, std::memory_order_acquire);
  }

  // The next task of the thread, -1 when none is left. Nobody but its thread fills a seat, and only when it is empty.
  int64_t take(int thread) {
    std::atomic<Range>& own = seats_[thread].left;
    Range mine = own.load(std::memory_order_relaxed);
    while (mine.size())
      if (own.compare_exchange_weak(mine, {mine.first + 1, mine.last}, std::memory_order_relaxed)) return mine.first;
    for (;;) {
      std::atomic<Range>* fullest = nullptr;
      Range most{0, 0};
      for (Seat& seat : seats_) {
        const Range left = seat.left.load(std::memory_order_relaxed);
        if (left.size() > most.size()) fullest = &seat.left, most = left;
      }
      if (!fullest) return -1;
      const uint32_t middle = most.first + most.size() / 2, last = most.last;
      if (!fullest->compare_exchange_strong(most, {most.first, middle}, std::memory_order_relaxed)) continue;
      own.store({middle + 1, last}, std::memory_order_relaxed);
      return middle;
    }
  }

  void work(int thread) {
    for (int64_t i; (i = take(thread)) >= 0;) call_(context_, i, thread);
  }

  void end() {
    stopping_ = true;
    round_.value.fetch_add(1);
    round_.value.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  void help(int thread) {
    const FlushDenormals flush;
    for (uint32_t seen = 0;;) {
      wait_while(round_.value, seen);
      seen = round_.value.load(std::memory_order_acquire);
      if (stopping_) return;
      busy_.value.fetch_add(1);  // before the look at is_open_, as the owner closes before it looks at busy_
      if (is_open_.load()) work(thread);
      if (busy_.value.fetch_sub(1) == 1) busy_.value.notify_one();
    }
  }

  std::vector<Seat> seats_;
  std::vector<std::thread> helpers_;
  Counter round_, busy_;
  alignas(64) std::atomic<bool> is_open_{false};
  std::atomic<bool> stopping_{false};
  void* context_ = nullptr;
  void (*call_)(void*, int64_t, int) = nullptr;
};

}  // namespace baton
