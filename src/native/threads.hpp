// Threads are those of OpenMP, which torch uses too: the process has one pool of them, and its matrix
// products and these kernels take turns on it.
#pragma once

#include <omp.h>

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
// to end a parallel region, a team takes a tenth of that to hand out a piece. Who comes late, as its
// core does something else, finds a piece closed and is not waited for.
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
            current_ = this;
            try {
                lead();
            } catch (...) {
                failure = std::current_exception();
            }
            current_ = nullptr;
            open({});
        } else {
            follow(omp_get_thread_num());
        }
        if (failure) std::rethrow_exception(failure);
    }

    // Run work(thread), which must not throw, on this thread and on others that come in time: it
    // takes what there is to do from a common list until that is empty.
    template <typename Work> void share(const Work& work) {
        open({[](const void* what, int thread) { (*static_cast<const Work*>(what))(thread); },
              &work});
        work(0);
        state_.fetch_and(~kOpen, std::memory_order_acq_rel);
        await([](uint32_t state) { return (state & kActive) == 0; });
    }

   private:
    struct Piece {
        void (*call)(const void*, int);  // null: the end
        const void* work;
    };
    // state_: the number of the piece, whether one may still begin with it, and how many are at it.
    static constexpr uint32_t kActive = (1 << 10) - 1, kOpen = 1 << 10, kNumber = ~(2 * kOpen - 1);

    // Nobody is at a piece when this is called.
    void open(Piece piece) {
        piece_ = piece;
        const uint32_t before = state_.load(std::memory_order_relaxed);
        state_.store(((before & kNumber) + 2 * kOpen) | kOpen, std::memory_order_release);
        state_.notify_all();
    }
    void follow(int thread) {
        for (uint32_t seen = 0;;) {
            uint32_t state = await([&](uint32_t now) { return (now & kNumber) != seen; });
            seen = state & kNumber;
            while ((state & kOpen) && (state & kNumber) == seen)
                if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
                    if (!piece_.call) return;
                    piece_.call(piece_.work, thread);
                    state_.fetch_sub(1, std::memory_order_acq_rel);
                    state_.notify_all();
                    break;
                }
        }
    }
    // The state once it is `ready`; turns for some 20 microseconds, then sleeps.
    template <typename Ready> uint32_t await(const Ready& ready) {
        for (int turns = 0;; ++turns) {
            const uint32_t state = state_.load(std::memory_order_acquire);
            if (ready(state)) return state;
            if (turns > 1000) {
                state_.wait(state, std::memory_order_acquire);
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
    int threads_;
    Piece piece_{};
    alignas(64) std::atomic<uint32_t> state_{0};
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
