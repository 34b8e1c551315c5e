// Rotary embedding, in float32 whatever the type.
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

}  // namespace
