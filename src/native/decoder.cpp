#include "decoder.hpp"

#include <cstring>

namespace kvant {

namespace {

size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

Tensor dense(Scratch& memory, DType type, int64_t rows, int64_t width, int64_t head_dim) {
    return {memory.reserve(rows * width * size_of(type)), type, width, head_dim};
}
// Heads from `first` on.
Tensor heads_from(Tensor x, int64_t first) {
    x.data = static_cast<char*>(x.data) + first * x.head_stride * size_of(x.type);
    return x;
}
// Rows `chosen`, which are in order, of x to the beginning of `to`, which may be x.
void gather(const Tensor& x, const int64_t* chosen, int64_t count, const Tensor& to) {
    const size_t bytes = x.row_stride * size_of(x.type);
    for (int64_t i = 0; i < count; ++i)
        std::memmove(static_cast<char*>(to.data) + i * bytes,
                     static_cast<const char*>(x.data) + chosen[i] * bytes, bytes);
}

}  // namespace

void Decoder::forward(Backend& backend, Plan& plan, const Tensor& x, const float* cos,
                      const float* sin, int64_t rows, const int64_t* chosen, int64_t count,
                      const Tensor& out) {
    Team(threads_).run([&] { run(backend, plan, x, cos, sin, rows, chosen, count, out); });
}

void Decoder::run(Backend& backend, Plan& plan, const Tensor& x, const float* cos,
                  const float* sin, int64_t rows, const int64_t* chosen, int64_t count,
                  const Tensor& out) {
    const int rotated_heads = heads_ + kv_heads_, d = head_dim_;
    const Tensor qkv = dense(qkv_, x.type, rows, (rotated_heads + kv_heads_) * d, d);
    const Tensor rotated = dense(rotated_, DType::f32, rows, rotated_heads * d, d);
    const Tensor attended = dense(attended_, DType::f32, rows, heads_ * d, d);
    Tensor state = x;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        const Block& block = blocks_[i];
        block.qkv->forward(state, qkv, rows, block.attention_norm, block.eps, false);
        rotary_.forward(qkv, cos, sin, rotated, rows, rotated_heads, d);
        const int layer = static_cast<int>(i);
        backend.write(plan, layer, heads_from(rotated, heads_), heads_from(qkv, rotated_heads));
        backend.attend(plan, layer, rotated, attended, heads_, scale_, block.window, 0.0f, nullptr);
        if (i + 1 == blocks_.size()) {  // the other rows have no further use
            gather(state, chosen, count, out);
            gather(attended, chosen, count, attended);
            state = out;
            rows = count;
        }
        block.output->forward(attended, state, rows, nullptr, 0.0f, true);
        const Tensor inner = dense(inner_, x.type, rows, block.gate_up->outputs(), 0);
        block.gate_up->forward(state, inner, rows, block.mlp_norm, block.eps, false);
        block.down->forward(inner, state, rows, nullptr, 0.0f, true);
    }
}

}  // namespace kvant
