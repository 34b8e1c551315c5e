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
KVANT_INLINE int size_of(const Tensor& x) { return x.type == DType::f32 ? 4 : 2; }
KVANT_INLINE char* address(const Tensor& x, int64_t row, int head) {
    return static_cast<char*>(x.data) + (row * x.row_stride + head * x.head_stride) * size_of(x);
}

// Dimensions [d, d + 16) of one vector of `x [rows, heads, dim]`; zeros stand for missing ones.
KVANT_INLINE F read_part(const Tensor& x, int64_t row, int head, int d, int dim) {
    alignas(64) char rest[64] = {};
    const void* at = address(x, row, head) + d * size_of(x);
    if (dim - d < kLanes) at = std::memcpy(rest, at, (dim - d) * size_of(x));
    return load_as(x.type, at);
}
KVANT_INLINE void write_part(const Tensor& x, int64_t row, int head, int d, int dim, F value) {
    alignas(64) char rest[64];
    char* at = address(x, row, head) + d * size_of(x);
    if (dim - d >= kLanes) return store_as(x.type, at, value);
    store_as(x.type, rest, value);
    std::memcpy(at, rest, (dim - d) * size_of(x));
}

// A whole vector, filled up with zeros to a multiple of 16.
KVANT_INLINE void read_row(const Tensor& x, int64_t row, int head, int dim, float* to) {
    for (int d = 0; d < dim; d += kLanes) store(to + d, read_part(x, row, head, d, dim));
}
KVANT_INLINE void write_row(const Tensor& x, int64_t row, int head, int dim, const float* from) {
    for (int d = 0; d < dim; d += kLanes) write_part(x, row, head, d, dim, load(from + d));
}

}  // namespace
