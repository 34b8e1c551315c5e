// The small operations between a model's matrix products, a row at a time. Rows are independent of
// each other, and each is computed in one order, in float32, whatever its type.
#pragma once

#include "kernels.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace {

using namespace kvant;

// The same rows from dimension d on.
KVANT_INLINE Tensor from(const Tensor& x, int d) {
    return {address(x, 0, 0) + d * size_of(x), x.type, x.row_stride, x.head_stride};
}

// out = x / sqrt(mean(x^2) + eps) * weight
static void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t row, int dim,
                     float eps) {
    F squares = zero();
    for (int d = 0; d < dim; d += kLanes) {
        const F each = read_part(x, row, 0, d, dim);
        squares = fma(each, each, squares);
    }
    const F scale = set(1 / std::sqrt(sum(squares) / dim + eps));
    for (int d = 0; d < dim; d += kLanes) {
        const F each = mul(read_part(x, row, 0, d, dim), scale);
        write_part(out, row, 0, d, dim, mul(each, read_part(weight, 0, 0, d, dim)));
    }
}

// Rotate pairs (d, d + half) of one head by the angles of a row: cos, sin [rows, half], float32.
static void rope(const Tensor& x, const float* cos, const float* sin, const Tensor& out,
                 int64_t row, int head, int half) {
    const Tensor angles_cos{const_cast<float*>(cos), DType::f32, half, 0};
    const Tensor angles_sin{const_cast<float*>(sin), DType::f32, half, 0};
    const Tensor x2 = from(x, half), out2 = from(out, half);
    for (int d = 0; d < half; d += kLanes) {
        const F a = read_part(x, row, head, d, half), b = read_part(x2, row, head, d, half);
        const F c = read_part(angles_cos, row, 0, d, half);
        const F s = read_part(angles_sin, row, 0, d, half);
        write_part(out, row, head, d, half, sub(mul(a, c), mul(b, s)));
        write_part(out2, row, head, d, half, add(mul(b, c), mul(a, s)));
    }
}

// out = silu(gate) * up of x [rows, 2 dim], gate first.
static void silu_mul(const Tensor& x, const Tensor& out, int64_t row, int dim) {
    const Tensor up = from(x, dim);
    for (int d = 0; d < dim; d += kLanes) {
        const F gate = read_part(x, row, 0, d, dim);
        // 2^126 stays finite; what a gate of -87 or less gives then is too small to matter
        const F grown = exp2(min(mul(gate, set(-1.44269504f)), set(126.0f)));
        const F silu = div(gate, add(set(1.0f), grown));
        write_part(out, row, 0, d, dim, mul(silu, read_part(up, row, 0, d, dim)));
    }
}

}  // namespace
