// Shares tasks among threads: those of the OpenMP runtime that the caller's other kernels run on, or new ones.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// A second pool of threads would compete for the cores with OpenMP's, which spin for milliseconds after each
// of their own loops. Linking OpenMP could bring in a second runtime, so the caller gives the address of
// GOMP_parallel, the entry that GCC's, LLVM's and Intel's runtimes share, in the runtime that is loaded.
class Team {
 public:
  Team(std::uintptr_t gomp_parallel, int threads)
      : fork_(reinterpret_cast<Fork>(gomp_parallel)), threads_(threads < 1 ? 1 : threads) {}

  // How many threads work on so many tasks.
  int workers(long tasks) const { return static_cast<int>(tasks < threads_ ? tasks : threads_); }

  // Calls body(worker, next), where next() gives the numbers 0 to tasks - 1, each to one worker only, and
  // then -1. Workers are 0 to workers(tasks) - 1.
  template <typename Body>
  void run(long tasks, const Body& body) const {
    Job<Body> job{body, tasks};
    const int count = workers(tasks);
    if (count <= 1) {
      job.work();
    } else if (fork_ != nullptr) {
      fork_(Job<Body>::enter, &job, static_cast<unsigned>(count), 0);
    } else {
      std::vector<std::thread> others;
      for (int i = 1; i < count; ++i) others.emplace_back([&job] { job.work(); });
      job.work();
      for (auto& other : others) other.join();
    }
  }

 private:
  using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

  template <typename Body>
  struct Job {
    const Body& body;
    const long tasks;
    std::atomic<long> next_task{0};
    std::atomic<int> next_worker{0};

    void work() {
      body(next_worker.fetch_add(1), [this] {
        const long task = next_task.fetch_add(1);
        return task < tasks ? task : -1;
      });
    }
    static void enter(void* job) { static_cast<Job*>(job)->work(); }
  };

  Fork fork_;
  int threads_;
};
