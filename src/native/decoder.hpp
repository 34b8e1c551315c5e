// All blocks of a decoder in one call: Decoder._run in models/decoder.py without Python between the
// parts, and the same bits.
#pragma once

#include <utility>
#include <vector>

#include "backend.hpp"
#include "linear_layer.hpp"
#include "rotary.hpp"

namespace kvant {

// One block; what it points to must stay.
struct Block {
    const LinearLayer *qkv, *output, *gate_up, *down;
    const float *attention_norm, *mlp_norm;
    float eps;
    int64_t window;  // 0: none
};

class Decoder {
   public:
    Decoder(const Rotary& rotary, std::vector<Block> blocks, int heads, int kv_heads, int head_dim,
            float scale, int threads)
        : rotary_(rotary), blocks_(std::move(blocks)), heads_(heads), kv_heads_(kv_heads),
          head_dim_(head_dim), scale_(scale), threads_(threads) {}

    // x [rows, hidden], dense, is used up; out [count, hidden] are the results of `chosen` rows.
    void forward(Backend& backend, Plan& plan, const Tensor& x, const float* cos, const float* sin,
                 int64_t rows, const int64_t* chosen, int64_t count, const Tensor& out);

   private:
    void run(Backend& backend, Plan& plan, const Tensor& x, const float* cos, const float* sin,
             int64_t rows, const int64_t* chosen, int64_t count, const Tensor& out);

    Rotary rotary_;
    std::vector<Block> blocks_;
    int heads_, kv_heads_, head_dim_;
    float scale_;
    int threads_;
    Scratch qkv_, rotated_, attended_, inner_;
};

}  // namespace kvant
