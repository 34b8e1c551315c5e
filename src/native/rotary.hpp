// Rotary embedding on all threads.
#pragma once

#include <algorithm>

#include "kernels.hpp"
#include "threads.hpp"

namespace kvant {

class Rotary {
   public:
    Rotary(const Kernels* kernels, int threads) : kernels_(kernels), threads_(threads) {}

    // Rows of `heads` heads; cos, sin [rows, head_dim / 2].
    void forward(const Tensor& x, const float* cos, const float* sin, const Tensor& out,
                 int64_t rows, int heads, int head_dim) const {
        constexpr int64_t kTogether = 16;
        const int64_t items = (rows + kTogether - 1) / kTogether;
        const int64_t cost = rows * heads * head_dim / 8;  // in units of Division::cost
        parallel(items, useful_threads(items, cost, threads_), [&](int64_t i, int) {
            const int64_t end = std::min(rows, (i + 1) * kTogether);
            for (int64_t row = i * kTogether; row < end; ++row)
                for (int head = 0; head < heads; ++head)
                    kernels_->rope(x, cos, sin, out, row, head, head_dim / 2);
        });
    }

   private:
    const Kernels* kernels_;
    int threads_;
};

}  // namespace kvant
