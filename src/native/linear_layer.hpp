// A linear layer on all threads.
#pragma once

#include "kernels.hpp"

namespace kvant {

class LinearLayer {
   public:
    // `weights` has addresses of memory that must stay.
    LinearLayer(const Kernels* kernels, const LinearWeights& weights, int threads)
        : kernels_(kernels), weights_(weights), threads_(threads) {}

    // `rows` rows of x to as many of out; see LinearCall.
    void forward(const Tensor& x, const Tensor& out, int64_t rows, const float* norm, float eps,
                 bool add) const;
    int outputs() const { return weights_.outputs; }

   private:
    // Threads have rows of their own, or all rows and outputs of their own.
    void by_rows(const LinearCall& call, int64_t rows) const;
    void by_outputs(const LinearCall& call, int rows) const;

    const Kernels* kernels_;
    LinearWeights weights_;
    int threads_;
};

}  // namespace kvant
