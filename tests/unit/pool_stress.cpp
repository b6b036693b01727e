// Runs thousands of loops of every size on the kernels' thread pool and checks that each task ran once, and that what
// tasks wrote is there afterwards; prints "ok". Compiled with a thread sanitizer by test_native_pool.py.

#include "pool.h"

#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {
  const int num_threads = std::atoi(arguments[1]), num_loops = std::atoi(arguments[2]);
  int64_t total = 0;
  for (int pools = 0; pools < 3; ++pools) {  // a pool also ends while its helpers spin or sleep
    baton::Pool pool(num_threads);
    std::vector<int64_t> written(300), seen(num_threads);
    for (int loop = 0; loop < num_loops; ++loop) {
      const int64_t count = loop * 7919 % 300;
      pool.run(count, [&](int64_t i, int thread) {
        written[i] += i + 1;  // no atomic: a task that ran twice at once, or unseen by the owner, is a race
        seen[thread] += 1;
        if (i % 64 == 63) std::this_thread::yield();
      });
      if (loop % 100 == 99) std::this_thread::sleep_for(std::chrono::microseconds(200));  // so that helpers fall asleep
      total += count;
      for (int64_t i = 0; i < count; ++i) {
        if (written[i] != i + 1) return std::printf("task %d of %d ran %d times\n", int(i), int(count), int(written[i])), 1;
        written[i] = 0;
      }
    }
    for (int64_t tasks : seen) total -= tasks;
  }
  if (total != 0) return std::printf("%d tasks are missing\n", int(total)), 1;
  return std::puts("ok"), 0;
}
