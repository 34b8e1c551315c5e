// Rows of tensors, of any of their types, as float32.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using kvant::DType;
using kvant::Tensor;

constexpr int padded(int dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

KVANT_INLINE F load_as(DType type, const void* p) {
    if (type == DType::f32) return load(static_cast<const float*>(p));
    const auto* half = static_cast<const uint16_t*>(p);
    return type == DType::bf16 ? load_bf16(half) : load_f16(half);
}
KVANT_INLINE void store_as(DType type, void* p, F x) {
    if (type == DType::f32) return store(static_cast<float*>(p), x);
    auto* half = static_cast<uint16_t*>(p);
    type == DType::bf16 ? store_bf16(half, x) : store_f16(half, x);
}
KVANT_INLINE char* address(const Tensor& x, int64_t row, int head) {
    const int size = x.type == DType::f32 ? 4 : 2;
    return static_cast<char*>(x.data) + (row * x.row_stride + head * x.head_stride) * size;
}

// One vector of `x [rows, heads, dim]`, filled up with zeros to a multiple of 16.
KVANT_INLINE void read_row(const Tensor& x, int64_t row, int head, int dim, float* to) {
    const int size = x.type == DType::f32 ? 4 : 2;
    const char* from = address(x, row, head);
    for (int d = 0; d < dim; d += kLanes) {
        alignas(64) char rest[64] = {};
        const void* at = from + d * size;
        if (dim - d < kLanes) at = std::memcpy(rest, at, (dim - d) * size);
        store(to + d, load_as(x.type, at));
    }
}
KVANT_INLINE void write_row(const Tensor& x, int64_t row, int head, int dim, const float* from) {
    const int size = x.type == DType::f32 ? 4 : 2;
    char* to = address(x, row, head);
    for (int d = 0; d < dim; d += kLanes) {
        alignas(64) char rest[64];
        const bool whole = dim - d >= kLanes;
        store_as(x.type, whole ? to + d * size : rest, load(from + d));
        if (!whole) std::memcpy(to + d * size, rest, (dim - d) * size);
    }
}

}  // namespace
