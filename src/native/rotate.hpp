// The randomized Hadamard rotation of head vectors (formats/hadamard.py), in registers.
//
// Its float32 arithmetic is part of the formats: signs, butterflies with strides 1, 2, 4 ..., one
// product with 1 / sqrt(block). A product with +-1 is exact, so that `fma` with it rounds as the
// sum or the difference does.
#pragma once

#include "simd.hpp"

namespace {

// +1 in the lanes i with i & stride == 0, else -1; for strides 1, 2, 4, 8.
alignas(64) constexpr float kTurns[4][kLanes] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

// Block by block of `kBlock` dimensions, but at least a vector at a time: two blocks of 8.
template <int kBlock, bool kInverse>
KVANT_INLINE void rotate_block(float* x, const float* signs) {
    constexpr int n = kBlock < kLanes ? 1 : kBlock / kLanes;
    F v[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        v[i] = load(x + i * kLanes);
        if (!kInverse) v[i] = mul(v[i], load(signs + i * kLanes));
        v[i] = fma(v[i], load(kTurns[0]), partner<1>(v[i]));
        v[i] = fma(v[i], load(kTurns[1]), partner<2>(v[i]));
        v[i] = fma(v[i], load(kTurns[2]), partner<4>(v[i]));
        if (kBlock > 8) v[i] = fma(v[i], load(kTurns[3]), partner<8>(v[i]));
    }
#pragma GCC unroll 4
    for (int stride = 1; stride < n; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
            if (i & stride) continue;
            const F a = v[i], b = v[i + stride];
            v[i] = add(a, b);
            v[i + stride] = sub(a, b);
        }
    const F factor = set(static_cast<float>(1 / __builtin_sqrt(kBlock)));
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        v[i] = mul(v[i], factor);
        if (kInverse) v[i] = mul(v[i], load(signs + i * kLanes));
        store(x + i * kLanes, v[i]);
    }
}

template <int kBlock, bool kInverse> void rotate_blocks(float* x, int dim, const float* signs) {
    constexpr int step = kBlock < kLanes ? kLanes : kBlock;
    int d = 0;
    for (; d + step <= dim; d += step) rotate_block<kBlock, kInverse>(x + d, signs + d);
    if (kBlock < kLanes && d < dim) {
        float rest[2][kLanes] = {};
        std::memcpy(rest[0], x + d, 8 * sizeof(float));
        std::memcpy(rest[1], signs + d, 8 * sizeof(float));
        rotate_block<kBlock, kInverse>(rest[0], rest[1]);
        std::memcpy(x + d, rest[0], 8 * sizeof(float));
    }
}

template <bool kInverse> void rotate_any(float* x, int dim, const float* signs, int block) {
    switch (block) {
        case 8: return rotate_blocks<8, kInverse>(x, dim, signs);
        case 16: return rotate_blocks<16, kInverse>(x, dim, signs);
        case 32: return rotate_blocks<32, kInverse>(x, dim, signs);
        case 64: return rotate_blocks<64, kInverse>(x, dim, signs);
        case 128: return rotate_blocks<128, kInverse>(x, dim, signs);
        default: return rotate_blocks<256, kInverse>(x, dim, signs);
    }
}

// x [dim] in place; `dim` is a multiple of 8, at most 256.
void rotate(float* x, int dim, const float* signs) {
    rotate_any<false>(x, dim, signs, dim & -dim);
}
void unrotate(float* x, int dim, const float* signs) {
    rotate_any<true>(x, dim, signs, dim & -dim);
}

}  // namespace
