// Sixteen lanes of float32 or int32, whatever the processor: the only file that knows intrinsics.
//
// It is compiled once per instruction set (kernels.cpp), selected by KVANT_ISA_* (none: scalar), and everything in
// it has internal linkage: a function that several objects share under one name would be linked
// once, from any of them, and could run AVX-512 on a processor without it.
//
//   F      16 x float32          I      16 x int32          M      a mask of 16 lanes
//
// Sums and maxima over lanes are trees of a fixed shape, so each lane order is the same everywhere.
// `fma` is fused except in the scalar set; nothing else is ever contracted (-ffp-contract=off).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(KVANT_ISA_AVX512) || defined(KVANT_ISA_AVX2)
#include <immintrin.h>
#endif

#define KVANT_INLINE [[gnu::always_inline]] static inline

namespace {

constexpr int kLanes = 16;

// ------------------------------------------------------------------------------------------------
#if defined(KVANT_ISA_AVX512)

using F = __m512;
using I = __m512i;
using M = __mmask16;

constexpr int kRows = 6;    // rows of A that a tile of matrix product holds in registers
constexpr int kBlocks = 4;  // blocks of 16 columns of B beside them

KVANT_INLINE F zero() { return _mm512_setzero_ps(); }
KVANT_INLINE F set(float x) { return _mm512_set1_ps(x); }
KVANT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
KVANT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
KVANT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
KVANT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
KVANT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
KVANT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
KVANT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
// The second operand if either is NaN.
KVANT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
KVANT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
KVANT_INLINE F abs(F a) { return _mm512_abs_ps(a); }
KVANT_INLINE F rint(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KVANT_INLINE F floor(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

KVANT_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
KVANT_INLINE M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
KVANT_INLINE M mask_of(uint32_t bits) { return static_cast<M>(bits); }
KVANT_INLINE bool any(M m) { return m != 0; }
KVANT_INLINE F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

KVANT_INLINE I izero() { return _mm512_setzero_si512(); }
KVANT_INLINE I iset(int32_t x) { return _mm512_set1_epi32(x); }
KVANT_INLINE I iload(const void* p) { return _mm512_loadu_si512(p); }
KVANT_INLINE void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
KVANT_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
KVANT_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
KVANT_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
template <int n> KVANT_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, n); }
template <int n> KVANT_INLINE I shift_right(I a) { return _mm512_srai_epi32(a, n); }
KVANT_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
KVANT_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }  // to nearest even
KVANT_INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }
KVANT_INLINE I as_int(F a) { return _mm512_castps_si512(a); }

// The low bytes of 16 lanes.
KVANT_INLINE __m128i low_bytes(I a) { return _mm512_cvtepi32_epi8(a); }
KVANT_INLINE F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KVANT_INLINE void store_f16(uint16_t* p, F x) {  // to nearest even
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
KVANT_INLINE void store_low_halves(uint16_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
KVANT_INLINE I load_halves(const uint16_t* p) {  // zero-extended
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KVANT_INLINE I load_bytes(const uint8_t* p) {  // zero-extended
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 16 words of two float16 each: the low and the high ones.
KVANT_INLINE F low_f16(I words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
KVANT_INLINE F high_f16(I words) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
}

// To the nearest float16, and to the largest one that is not above; |x| <= 65504.
KVANT_INLINE F nearest_f16(F x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
KVANT_INLINE F down_f16(F x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

// Lane i ^ stride in lane i.
template <int stride> KVANT_INLINE F partner(F x) {
    if constexpr (stride == 1) return _mm512_permute_ps(x, 0xb1);
    if constexpr (stride == 2) return _mm512_permute_ps(x, 0x4e);
    if constexpr (stride == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (stride == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
}

// acc + products of 16 x 4 bytes: unsigned ones of `u`, signed ones of `s`, summed by fours.
// (In assembly, because GCC 12 copies the accumulators of the intrinsic around.)
KVANT_INLINE I dot(I acc, I u, I s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
    return acc;
}

KVANT_INLINE float sum(F x) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
KVANT_INLINE float highest(F x) {
    __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
KVANT_INLINE int32_t isum(I x) { return _mm512_reduce_add_epi32(x); }

// ------------------------------------------------------------------------------------------------
#elif defined(KVANT_ISA_AVX2)

struct F {
    __m256 lo, hi;
};
struct I {
    __m256i lo, hi;
};
struct M {
    __m256 lo, hi;  // all bits of a lane or none
};

constexpr int kRows = 2;
constexpr int kBlocks = 2;

KVANT_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KVANT_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KVANT_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KVANT_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
KVANT_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
KVANT_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
KVANT_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
KVANT_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
KVANT_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
KVANT_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
KVANT_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
KVANT_INLINE F abs(F a) {
    const __m256 rest = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.lo, rest), _mm256_and_ps(a.hi, rest)};
}
KVANT_INLINE F rint(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
KVANT_INLINE F floor(F a) {
    constexpr int mode = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

KVANT_INLINE M less(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
KVANT_INLINE M is_nan(F a) {
    return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
KVANT_INLINE M mask_of(uint32_t bits) {
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(bits));
    const __m256i lo = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i hi = _mm256_slli_epi32(lo, 8);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lo), lo)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, hi), hi))};
}
KVANT_INLINE bool any(M m) { return _mm256_movemask_ps(_mm256_or_ps(m.lo, m.hi)) != 0; }
KVANT_INLINE F select(M m, F yes, F no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

KVANT_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
KVANT_INLINE I iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
KVANT_INLINE I iload(const void* p) {
    const auto* lines = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(lines), _mm256_loadu_si256(lines + 1)};
}
KVANT_INLINE void istore(void* p, I x) {
    auto* lines = static_cast<__m256i*>(p);
    _mm256_storeu_si256(lines, x.lo);
    _mm256_storeu_si256(lines + 1, x.hi);
}
KVANT_INLINE I iadd(I a, I b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
KVANT_INLINE I isub(I a, I b) {
    return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
KVANT_INLINE I iand(I a, I b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int n> KVANT_INLINE I shift_left(I a) {
    return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
template <int n> KVANT_INLINE I shift_right(I a) {
    return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}
KVANT_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
KVANT_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
KVANT_INLINE F as_float(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
KVANT_INLINE I as_int(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

// 16 words below 65536 as 16 halves; packs work in both 128-bit parts apart.
KVANT_INLINE __m256i narrow(I a) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
}
KVANT_INLINE __m256i low_halves(I a) { return narrow(iand(a, iset(0xffff))); }
KVANT_INLINE __m128i low_bytes(I a) {
    const __m256i halves = narrow(iand(a, iset(0xff)));
    return _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
KVANT_INLINE F from_f16(__m256i halves) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
KVANT_INLINE F load_f16(const uint16_t* p) {
    return from_f16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KVANT_INLINE void store_f16(uint16_t* p, F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    auto* out = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(out, _mm256_cvtps_ph(x.lo, mode));
    _mm_storeu_si128(out + 1, _mm256_cvtps_ph(x.hi, mode));
}
KVANT_INLINE void store_low_halves(uint16_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low_halves(x));
}
KVANT_INLINE I load_halves(const uint16_t* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))};
}
KVANT_INLINE I load_bytes(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
KVANT_INLINE F low_f16(I words) { return from_f16(low_halves(words)); }
KVANT_INLINE F high_f16(I words) {
    return from_f16(narrow({_mm256_srli_epi32(words.lo, 16), _mm256_srli_epi32(words.hi, 16)}));
}

KVANT_INLINE F nearest_f16(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.lo, mode)),
            _mm256_cvtph_ps(_mm256_cvtps_ph(x.hi, mode))};
}
KVANT_INLINE F down_f16(F x) {
    constexpr int mode = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.lo, mode)),
            _mm256_cvtph_ps(_mm256_cvtps_ph(x.hi, mode))};
}

template <int stride> KVANT_INLINE F partner(F x) {
    if constexpr (stride == 8) return {x.hi, x.lo};
    if constexpr (stride == 4)
        return {_mm256_permute2f128_ps(x.lo, x.lo, 1), _mm256_permute2f128_ps(x.hi, x.hi, 1)};
    constexpr int order = stride == 1 ? 0xb1 : 0x4e;
    return {_mm256_permute_ps(x.lo, order), _mm256_permute_ps(x.hi, order)};
}

KVANT_INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) {
#if defined(KVANT_ISA_AVXVNNI)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else  // products of the even bytes and of the odd ones, by pairs; vpmaddubsw would saturate
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
KVANT_INLINE I dot(I acc, I u, I s) {
    return {dot(acc.lo, u.lo, s.lo), dot(acc.hi, u.hi, s.hi)};
}

KVANT_INLINE float sum(F x) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
KVANT_INLINE float highest(F x) {
    const __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
KVANT_INLINE int32_t isum(I x) {
    const __m256i a = _mm256_add_epi32(x.lo, x.hi);
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}

// ------------------------------------------------------------------------------------------------
#else

struct F {
    float at[kLanes];
};
struct I {
    int32_t at[kLanes];
};
struct M {
    bool at[kLanes];
};

constexpr int kRows = 2;
constexpr int kBlocks = 1;

#define KVANT_LANES(type, expression)                  \
    type out;                                          \
    for (int i = 0; i < kLanes; ++i) out.at[i] = expression; \
    return out

KVANT_INLINE F set(float x) { KVANT_LANES(F, x); }
KVANT_INLINE F zero() { return set(0.0f); }
KVANT_INLINE F load(const float* p) { KVANT_LANES(F, p[i]); }
KVANT_INLINE void store(float* p, F x) { std::memcpy(p, x.at, sizeof x); }
KVANT_INLINE F add(F a, F b) { KVANT_LANES(F, a.at[i] + b.at[i]); }
KVANT_INLINE F sub(F a, F b) { KVANT_LANES(F, a.at[i] - b.at[i]); }
KVANT_INLINE F mul(F a, F b) { KVANT_LANES(F, a.at[i] * b.at[i]); }
KVANT_INLINE F div(F a, F b) { KVANT_LANES(F, a.at[i] / b.at[i]); }
KVANT_INLINE F fma(F a, F b, F c) { KVANT_LANES(F, a.at[i] * b.at[i] + c.at[i]); }
KVANT_INLINE F max(F a, F b) { KVANT_LANES(F, a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
KVANT_INLINE F min(F a, F b) { KVANT_LANES(F, a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
KVANT_INLINE F abs(F a) { KVANT_LANES(F, __builtin_fabsf(a.at[i])); }
KVANT_INLINE F rint(F a) { KVANT_LANES(F, __builtin_rintf(a.at[i])); }
KVANT_INLINE F floor(F a) { KVANT_LANES(F, __builtin_floorf(a.at[i])); }

KVANT_INLINE M less(F a, F b) { KVANT_LANES(M, a.at[i] < b.at[i]); }
KVANT_INLINE M is_nan(F a) { KVANT_LANES(M, a.at[i] != a.at[i]); }
KVANT_INLINE M mask_of(uint32_t bits) { KVANT_LANES(M, (bits >> i & 1) != 0); }
KVANT_INLINE bool any(M m) {
    bool found = false;
    for (bool each : m.at) found |= each;
    return found;
}
KVANT_INLINE F select(M m, F yes, F no) { KVANT_LANES(F, m.at[i] ? yes.at[i] : no.at[i]); }

KVANT_INLINE I iset(int32_t x) { KVANT_LANES(I, x); }
KVANT_INLINE I izero() { return iset(0); }
KVANT_INLINE I iload(const void* p) {
    I out;
    std::memcpy(out.at, p, sizeof out);
    return out;
}
KVANT_INLINE void istore(void* p, I x) { std::memcpy(p, x.at, sizeof x); }
// Integer arithmetic wraps, so it goes through unsigned numbers.
KVANT_INLINE I iadd(I a, I b) {
    KVANT_LANES(I, int32_t(uint32_t(a.at[i]) + uint32_t(b.at[i])));
}
KVANT_INLINE I isub(I a, I b) {
    KVANT_LANES(I, int32_t(uint32_t(a.at[i]) - uint32_t(b.at[i])));
}
KVANT_INLINE I iand(I a, I b) { KVANT_LANES(I, a.at[i] & b.at[i]); }
template <int n> KVANT_INLINE I shift_left(I a) { KVANT_LANES(I, int32_t(uint32_t(a.at[i]) << n)); }
template <int n> KVANT_INLINE I shift_right(I a) { KVANT_LANES(I, a.at[i] >> n); }
KVANT_INLINE F to_float(I a) { KVANT_LANES(F, static_cast<float>(a.at[i])); }
KVANT_INLINE I to_int(F a) {  // out of range and NaN: the lowest integer, as on x86
    KVANT_LANES(I, a.at[i] >= -2147483648.0f && a.at[i] < 2147483648.0f
                       ? static_cast<int32_t>(__builtin_rintf(a.at[i]))
                       : INT32_MIN);
}
KVANT_INLINE F as_float(I a) {
    F out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}
KVANT_INLINE I as_int(F a) {
    I out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}

struct Bytes16 {
    uint8_t at[16];
};
KVANT_INLINE Bytes16 low_bytes(I a) { KVANT_LANES(Bytes16, static_cast<uint8_t>(a.at[i])); }

KVANT_INLINE float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = rest << 13 | 0x7f800000 | (rest > 0x7c00 ? 0x400000 : 0);
    } else if (rest >= 0x400) {
        bits = (rest << 13) + (112u << 23);
    } else {  // subnormal or zero: exact in float32
        const float value = static_cast<float>(rest) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
KVANT_INLINE uint16_t to_f16(float x) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x1ff);
    if (bits >= 0x47800000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal in float16: the addition rounds at its last place
        float value;
        std::memcpy(&value, &bits, 4);
        value += 0.5f;
        std::memcpy(&bits, &value, 4);
        return sign | static_cast<uint16_t>(bits - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}
KVANT_INLINE F load_f16(const uint16_t* p) { KVANT_LANES(F, from_f16(p[i])); }
KVANT_INLINE void store_f16(uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_f16(x.at[i]);
}
KVANT_INLINE void store_low_halves(uint16_t* p, I x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(x.at[i]);
}
KVANT_INLINE I load_halves(const uint16_t* p) { KVANT_LANES(I, p[i]); }
KVANT_INLINE I load_bytes(const uint8_t* p) { KVANT_LANES(I, p[i]); }
KVANT_INLINE F low_f16(I words) { KVANT_LANES(F, from_f16(words.at[i] & 0xffff)); }
KVANT_INLINE F high_f16(I words) { KVANT_LANES(F, from_f16(uint32_t(words.at[i]) >> 16)); }

KVANT_INLINE F nearest_f16(F x) { KVANT_LANES(F, from_f16(to_f16(x.at[i]))); }
KVANT_INLINE float down_f16(float x) {
    const uint16_t half = to_f16(x);
    if (from_f16(half) <= x) return from_f16(half);
    if ((half & 0x7fff) == 0) return -0x1p-24f;
    return from_f16(half & 0x8000 ? half + 1 : half - 1);
}
KVANT_INLINE F down_f16(F x) { KVANT_LANES(F, down_f16(x.at[i])); }

template <int stride> KVANT_INLINE F partner(F x) { KVANT_LANES(F, x.at[i ^ stride]); }

KVANT_INLINE I dot(I acc, I u, I s) {
    uint8_t a[64];
    int8_t b[64];
    std::memcpy(a, &u, 64);
    std::memcpy(b, &s, 64);
    for (int i = 0; i < kLanes; ++i) {
        int32_t total = 0;
        for (int j = 0; j < 4; ++j) total += a[4 * i + j] * b[4 * i + j];
        acc.at[i] = int32_t(uint32_t(acc.at[i]) + uint32_t(total));
    }
    return acc;
}

KVANT_INLINE float sum(F x) {
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
    return x.at[0];
}
KVANT_INLINE float highest(F x) {
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i)
            x.at[i] = x.at[i] > x.at[i + half] ? x.at[i] : x.at[i + half];
    return x.at[0];
}
KVANT_INLINE int32_t isum(I x) {
    uint32_t total = 0;
    for (int32_t each : x.at) total += uint32_t(each);
    return int32_t(total);
}
#undef KVANT_LANES
#endif

// ------------------------------------------------------------------------------------------------
// For all instruction sets.

// acc + products of 16 x 2 bfloat16, summed by twos.
#if defined(KVANT_ISA_AVX512BF16)
constexpr bool kDotsBF16 = true;
KVANT_INLINE F dot_bf16(F acc, I a, I b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
#else
constexpr bool kDotsBF16 = false;
KVANT_INLINE F dot_bf16(F acc, I, I) { return acc; }
#endif

// To the second cache, which has room for more lines on their way: of scattered blocks of 26 kB two
// cores read 26 GB/s so, 21 GB/s with prefetches to the first.
KVANT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

KVANT_INLINE F load_bf16(const uint16_t* p) { return as_float(shift_left<16>(load_halves(p))); }
KVANT_INLINE F low_bf16(I words) { return as_float(shift_left<16>(words)); }
KVANT_INLINE F high_bf16(I words) { return as_float(iand(words, iset(int32_t(0xffff0000)))); }

KVANT_INLINE void store_bf16(uint16_t* p, F x) {  // to nearest even; NaN becomes 0x7fc0
    const I bits = as_int(x);
    const I odd = iand(shift_right<16>(bits), iset(1));
    const I rounded = shift_right<16>(iadd(bits, iadd(odd, iset(0x7fff))));
    store_low_halves(p, as_int(select(is_nan(x), as_float(iset(0x7fc0)), as_float(rounded))));
}

// e4m3 in byte kPlace of 16 words, divided by 256: its bits are upper ones of a float16 then.
template <int kPlace> KVANT_INLINE F e4m3_at(I words) {
    const I high = kPlace ? shift_right<kPlace ? 8 * kPlace - 8 : 0>(words) : shift_left<8>(words);
    return low_f16(iadd(iand(high, iset(0x8000)), iand(shift_right<1>(high), iset(0x3f80))));
}
// To nearest even; |x| <= 448.
KVANT_INLINE I to_e4m3(F x) {
    const F size = abs(x);
    const I bits = as_int(size), odd = iand(shift_right<20>(bits), iset(1));
    const I rounded = shift_right<20>(iadd(bits, iadd(odd, iset(0x7ffff))));
    const F normal = as_float(isub(rounded, iset(120 << 3)));
    const F subnormal = as_float(to_int(mul(size, set(512.0f))));
    const I sign = iand(shift_right<24>(as_int(x)), iset(0x80));
    return iadd(sign, as_int(select(less(size, set(0x1p-6f)), subnormal, normal)));
}

// Keep a line in its register: GCC 12 would load it again for each use.
KVANT_INLINE void hold([[maybe_unused]] I& line) {
#if defined(KVANT_ISA_AVX512)
    asm("" : "+v"(line));
#endif
}

// Lanes i < n.
KVANT_INLINE M first_lanes(int n) { return mask_of(n >= kLanes ? 0xffffu : (1u << n) - 1); }

// The low bytes of 16 lanes.
KVANT_INLINE void store_bytes(uint8_t* p, I x) {
    const auto bytes = low_bytes(x);
    std::memcpy(p, &bytes, 16);
}
// The low bytes of 64 lanes that are between -128 and 127.
KVANT_INLINE void store_bytes(uint8_t* p, const I (&x)[4]) {
#if defined(KVANT_ISA_AVX512)
    const I bytes = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]),
                                       _mm512_packs_epi32(x[2], x[3]));
    alignas(64) static constexpr uint32_t kQuads[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                        2, 6, 10, 14, 3, 7, 11, 15};
    istore(p, _mm512_permutexvar_epi32(iload(kQuads), bytes));
#else
    for (int i = 0; i < 4; ++i) store_bytes(p + 16 * i, x[i]);
#endif
}
// The same of numbers from 0 to 255, as values put 64 tokens: word j of 16 of them has tokens 2j,
// 2j + 1, 2j + 8, 2j + 9 (formats/base.py).
KVANT_INLINE void store_tokens(uint8_t* p, const I (&x)[4]) {
#if defined(KVANT_ISA_AVX512)
    const I bytes = _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]),
                                        _mm512_packs_epi32(x[2], x[3]));
    // Lane l of 128 bits has tokens 16 g + 4 l to 16 g + 4 l + 3 of all g, in pairs.
    alignas(64) static constexpr uint16_t kPairs[32] = {
        0, 16, 1, 17, 8,  24, 9,  25, 2, 18, 3, 19, 10, 26, 11, 27,
        4, 20, 5, 21, 12, 28, 13, 29, 6, 22, 7, 23, 14, 30, 15, 31};
    istore(p, _mm512_permutexvar_epi16(iload(kPairs), bytes));
#else
    for (int g = 0; g < 4; ++g) {
        uint8_t bytes[16];
        store_bytes(bytes, x[g]);
        for (int i = 0; i < 16; i += 2)
            std::memcpy(p + 16 * g + i, bytes + i / 4 * 2 + i / 2 % 2 * 8, 2);
    }
#endif
}

// (2^x - 1) / x for |x| <= 1/2: a polynomial.
KVANT_INLINE F exp2_slope(F x) {
    F y = set(1.535336196e-04f);
    y = fma(y, x, set(1.339887385e-03f));
    y = fma(y, x, set(9.618436918e-03f));
    y = fma(y, x, set(5.550332367e-02f));
    y = fma(y, x, set(2.402264774e-01f));
    return fma(y, x, set(6.931471825e-01f));
}
// The same with a relative error of 3e-6 of 2^x.
KVANT_INLINE F rough_exp2_slope(F x) {
    F y = set(9.582852945e-03f);
    y = fma(y, x, set(5.590642616e-02f));
    y = fma(y, x, set(2.402409911e-01f));
    return fma(y, x, set(6.931241751e-01f));
}
// 2^whole for -127 < whole < 128, and x times it: 0 for x > 0 and any smaller exponent, below the
// least normal number at the latest.
KVANT_INLINE F power_of_2(F whole) {
    return as_float(shift_left<23>(iadd(to_int(whole), iset(127))));
}
KVANT_INLINE F times_power_of_2(F x, F whole) {
#if defined(KVANT_ISA_AVX512)
    return _mm512_scalef_ps(x, whole);
#else
    return select(less(whole, set(-126.0f)), zero(), mul(x, power_of_2(whole)));
#endif
}
// 2^x for x < 128; 0 for -Inf.
KVANT_INLINE F exp2(F x) {
    x = max(set(-1000.0f), x);  // no Inf - Inf
    const F whole = rint(x), part = sub(x, whole);
    return times_power_of_2(fma(exp2_slope(part), part, set(1.0f)), whole);
}
KVANT_INLINE F rough_exp2(F x) {
    x = max(set(-1000.0f), x);
    const F whole = rint(x), part = sub(x, whole);
    return times_power_of_2(fma(rough_exp2_slope(part), part, set(1.0f)), whole);
}
// x / (1 + exp(-x))
KVANT_INLINE F silu(F x) {
    // 2^126 stays finite; what an x of -87 or less gives then is too small to matter
    const F grown = exp2(min(mul(x, set(-1.44269504f)), set(126.0f)));
    return div(x, add(set(1.0f), grown));
}
// 2^x - 1 for 0 <= x < 128, precise near 0.
KVANT_INLINE F exp2_minus_1(F x) {
    const F whole = rint(x), part = sub(x, whole), power = power_of_2(whole);
    return fma(mul(exp2_slope(part), part), power, sub(power, set(1.0f)));
}

}  // namespace
