// Threads are those of OpenMP, which torch uses too: the process has one pool of them, and its matrix
// products and these kernels take turns on it.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace kvant {

// Work of a thread that is worth waking it up: about 10 microseconds, in units of
// Division::cost.
constexpr int64_t kThreadCost = 5000;

// All threads, or one if `count` items of together `cost` are not worth waking another. Never some of
// them: libgomp ends the threads that a smaller team leaves over, and torch would start them again.
inline int useful_threads(int64_t count, int64_t cost, int threads) {
    return std::min(count, cost / kThreadCost) > 1 ? threads : 1;
}

// Threads that stay together for many short pieces of work: OpenMP takes microseconds to begin and
// to end a parallel region, a team takes a tenth of that to hand out a piece.
class Team {
   public:
    explicit Team(int threads) : threads_(threads) {}
    Team(const Team&) = delete;

    // The team that runs on this thread and has as many threads, if any.
    static Team* here(int threads) {
        return current_ && current_->threads_ == threads ? current_ : nullptr;
    }

    // Run lead(), whose calls of `parallel` are shared by the team.
    template <typename Lead> void run(const Lead& lead) {
        if (threads_ == 1) return lead();
        std::exception_ptr failure;
#pragma omp parallel num_threads(threads_)
        if (omp_get_thread_num() == 0) {
            size_ = omp_get_num_threads();  // OpenMP may give fewer than it is asked for
            current_ = this;
            try {
                lead();
            } catch (...) {
                failure = std::current_exception();
            }
            current_ = nullptr;
            hand_out({});
        } else {
            follow(omp_get_thread_num());
        }
        if (failure) std::rethrow_exception(failure);
    }

    // Run work(thread), which must not throw, on each thread.
    template <typename Work> void share(const Work& work) {
        busy_.store(size_ - 1, std::memory_order_relaxed);
        hand_out({[](const void* what, int thread) { (*static_cast<const Work*>(what))(thread); },
                  &work});
        work(0);
        wait([&] { return busy_.load(std::memory_order_acquire) == 0; });
    }

   private:
    struct Piece {
        void (*call)(const void*, int);  // null: the end
        const void* work;
    };

    void hand_out(Piece piece) {
        piece_ = piece;
        number_.fetch_add(1, std::memory_order_release);
    }
    void follow(int thread) {
        for (int64_t seen = 0;; ++seen) {
            wait([&] { return number_.load(std::memory_order_acquire) != seen; });
            if (!piece_.call) return;
            piece_.call(piece_.work, thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }
    // Turn for some 20 microseconds, then let others have the core.
    template <typename Ready> static void wait(const Ready& ready) {
        for (int turns = 0; !ready(); ++turns) {
            if (turns > 1000) {
                sched_yield();
            } else {
                pause();
            }
        }
    }
    static void pause() {
#if defined(KVANT_X86)
        __builtin_ia32_pause();
#endif
    }

    static inline thread_local Team* current_ = nullptr;
    int threads_, size_ = 1;
    Piece piece_{};
    alignas(64) std::atomic<int64_t> number_{0};
    alignas(64) std::atomic<int> busy_{0};
};

// Run body(index, thread) for all indices below `count`, in the order of their numbers.
template <typename Body> void parallel(int64_t count, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(i, thread);
    };
    if (threads == 1) return work(0);
    if (Team* team = Team::here(threads)) return team->share(work);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
}

}  // namespace kvant
