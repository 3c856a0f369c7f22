// Splits independent work over threads.
//
// torch keeps a pool of OpenMP threads that spin for a while after every parallel region. A thread
// of our own would wait behind one of them for its core, a scheduler tick of milliseconds; so the
// work goes to that pool, through the one entry point that GCC's OpenMP runtime and LLVM's share.
// It is looked up in the running process: linking a runtime would bring a second pool. Where there
// is none, plain std::thread does it.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace interlace {

// The entry point: runs body(data) on num_threads threads of the pool, and waits for them; 0 are as
// many as torch has. GCC's pool ends the threads that a smaller team leaves over and starts them
// anew for a larger one, so it is always 0.
using RunOnPool = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

inline RunOnPool find_pool() {
  static const auto found = reinterpret_cast<RunOnPool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Runs body() on num_threads threads, or as many as there are.
template <class Body>
void run_on_threads(int num_threads, const Body& body) {
  if (const RunOnPool run = find_pool()) {
    run([](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body), 0, 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads);
  try {
    for (int i = 1; i < num_threads; ++i) helpers.emplace_back(body);
  } catch (const std::system_error&) {
    // the system grants no more threads: those that run, and this one, do the work
  }
  body();
  for (std::thread& helper : helpers) helper.join();
}

// Calls work(worker, begin, end) on blocks of at most `block` that together cover 0..count.
//
// worker is 0..num_threads-1, and no two calls with the same worker run at once. Blocks go to
// workers in any order, so what is computed must not depend on the worker.
template <class Work>
void parallel_for(int64_t count, int64_t block, int num_threads, const Work& work) {
  const int64_t num_blocks = (count + block - 1) / block;
  std::atomic<int64_t> next{0};
  const int num_workers = static_cast<int>(std::min<int64_t>(num_threads, num_blocks));
  std::atomic<int> next_worker{0};
  std::exception_ptr failure;
  std::mutex failure_guard;
  const auto serve = [&] {
    const int worker = next_worker++;
    // a thread of the pool that this work is too small for
    if (worker >= num_workers) return;
    try {
      for (int64_t i = next++; i < num_blocks; i = next++) {
        work(worker, i * block, std::min(count, (i + 1) * block));
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_guard);
      failure = std::current_exception();
      next = num_blocks;
    }
  };
  if (num_workers > 1) {
    run_on_threads(num_workers, serve);
  } else {
    serve();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace interlace
