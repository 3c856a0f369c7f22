// Splits independent work over threads.
//
// Plain std::thread, not OpenMP: torch brings an OpenMP runtime of its own, and a second one in the
// same process would double the number of busy threads; Apple's compiler has none at all. A call
// lasts milliseconds, starting a thread takes some ten microseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace interlace {

// Calls work(worker, begin, end) on blocks of at most `block` that together cover 0..count.
//
// worker is 0..num_threads-1, and no two calls with the same worker run at once. Blocks go to
// workers in any order, so what is computed must not depend on the worker.
template <class Work>
void parallel_for(int64_t count, int64_t block, int num_threads, const Work& work) {
  const int64_t num_blocks = (count + block - 1) / block;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_guard;
  const auto serve = [&](int worker) {
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
  std::vector<std::thread> helpers;
  const int num_workers = static_cast<int>(std::min<int64_t>(num_threads, num_blocks));
  helpers.reserve(num_workers);
  try {
    for (int worker = 1; worker < num_workers; ++worker) helpers.emplace_back(serve, worker);
  } catch (const std::system_error&) {
    // the system grants no more threads: those that run, and this one, do the work
  }
  serve(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace interlace
