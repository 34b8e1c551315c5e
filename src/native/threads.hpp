// Threads are those of OpenMP, which torch uses too: the process has one pool of them, and its matrix
// products and these kernels take turns on it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kvant {

// Work of a thread that is worth waking it up: about 20 microseconds, in units of
// Division::cost.
constexpr int64_t kThreadCost = 10000;

// All threads, or one if `count` items of together `cost` are not worth waking another. Never some of
// them: libgomp ends the threads that a smaller team leaves over, and torch would start them again.
inline int useful_threads(int64_t count, int64_t cost, int threads) {
    return std::min(count, cost / kThreadCost) > 1 ? threads : 1;
}

// Run body(index, thread) for all indices below `count`, in the order of their numbers.
template <typename Body> void parallel(int64_t count, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(i, thread);
    };
    if (threads == 1) return work(0);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
}

}  // namespace kvant
