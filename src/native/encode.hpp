// Vectors as the bytes of their formats, and back: formats/*.py, bit for bit.
//
// A vector is a row of `padded(dim)` floats. It is encoded by itself into the bytes of its token,
// or with the 64 rows of a page if its format is by page. Nothing here may be fused.
#pragma once

#include <cfloat>

#include "kernels.hpp"
#include "rotate.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace {

using namespace kvant;

// ------------------------------------------------------------------------------------------------
// base.py: where the elements of a token are in a plane.

template <int kSize, bool kWrite> KVANT_INLINE void move(uint8_t* there, uint8_t* here) {
    kWrite ? std::memcpy(there, here, kSize) : std::memcpy(here, there, kSize);
}

// Move the row of one token, `columns` elements of kSize bytes, into or out of a plane.
template <int kSize, bool kWrite>
void move_row(uint8_t* plane, Side side, int columns, int token, uint8_t* row) {
    if (side == Side::k) {
        const int words = columns * kSize / 4;
        uint8_t* at = plane + token / 16 * words * 64 + token % 16 * 4;
        for (int word = 0; word < words; ++word) move<4, kWrite>(at + word * 64, row + word * 4);
        return;
    }
    const int line = kSize == 1 ? token / 16 * 4 + token % 8 / 2 : token * kSize / 4;
    const int place = kSize == 1 ? token / 8 % 2 * 2 + token % 2 : token % (4 / kSize);
    const int power = columns & -columns, block = power < 16 ? power : 16;
    uint8_t* at = plane + line * block * 4 + place * kSize;
    for (int c = 0; c < columns; c += block, at += kPageTokens * block * kSize)
        for (int i = 0; i < block; ++i) move<kSize, kWrite>(at + i * 4, row + (c + i) * kSize);
}

KVANT_INLINE void put_f16(uint8_t* plane, int token, F same) {
    uint16_t halves[kLanes];
    store_f16(halves, same);
    std::memcpy(plane + 2 * token, halves, 2);
}
KVANT_INLINE F get_f16(const uint8_t* plane, int token) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, plane + 2 * token, 2);
    return set(sum(load_f16(halves)));  // the others are zeros
}

// ------------------------------------------------------------------------------------------------
// packing.py: codes of 2 to 8 bits as bytes, in words of four.

constexpr int kMaxWords = kMaxHeadDim / 4;

// Codes of a row, zeros behind the last one.
struct Codes {
    alignas(64) uint32_t words[kMaxWords];
};

constexpr int plane_words(int width, int dim) { return (dim * width + 31) / 32; }

// A plane's fields of `kWidth` bits; `shift` is where they are in a code.
template <int kWidth>
void pack(const Codes& codes, int shift, int count, uint32_t* packed) {
    constexpr uint32_t mask = ((1u << kWidth) - 1) * 0x01010101u;
    for (int c = 0; c < count; ++c) {
        uint32_t word = 0;
        for (int j = 0; j < 8 / kWidth; ++j)
            word |= (codes.words[j * count + c] >> shift & mask) << (j * kWidth);
        packed[c] = word;
    }
}
template <int kWidth>
void unpack(const uint32_t* packed, int shift, int count, Codes& codes) {
    constexpr uint32_t mask = ((1u << kWidth) - 1) * 0x01010101u;
    for (int j = 0; j < 8 / kWidth; ++j)
        for (int c = 0; c < count; ++c)
            codes.words[j * count + c] |= (packed[c] >> (j * kWidth) & mask) << shift;
}

void put_codes(uint8_t* page, const Part& part, Side side, int dim, int token,
               const Codes& codes) {
    alignas(64) uint32_t packed[kMaxWords];
    for (int i = 0, shift = 0; i < 2 && part.widths[i]; shift += part.widths[i++]) {
        const int count = plane_words(part.widths[i], dim);
        switch (part.widths[i]) {
            case 8: pack<8>(codes, shift, count, packed); break;
            case 4: pack<4>(codes, shift, count, packed); break;
            case 2: pack<2>(codes, shift, count, packed); break;
            default: pack<1>(codes, shift, count, packed);
        }
        move_row<1, true>(page + part.codes[i], side, 4 * count, token,
                          reinterpret_cast<uint8_t*>(packed));
    }
}
void get_codes(uint8_t* page, const Part& part, Side side, int dim, int token, Codes& codes) {
    alignas(64) uint32_t packed[kMaxWords];
    std::memset(codes.words, 0, sizeof codes.words);
    for (int i = 0, shift = 0; i < 2 && part.widths[i]; shift += part.widths[i++]) {
        const int count = plane_words(part.widths[i], dim);
        move_row<1, false>(page + part.codes[i], side, 4 * count, token,
                           reinterpret_cast<uint8_t*>(packed));
        switch (part.widths[i]) {
            case 8: unpack<8>(packed, shift, count, codes); break;
            case 4: unpack<4>(packed, shift, count, codes); break;
            case 2: unpack<2>(packed, shift, count, codes); break;
            default: unpack<1>(packed, shift, count, codes);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// plain.py

constexpr float kF16Max = 65504.0f;

KVANT_INLINE F clip(F x, float low, float high) { return min(max(x, set(low)), set(high)); }
KVANT_INLINE F infinity() { return set(__builtin_inff()); }
KVANT_INLINE F nan() { return set(__builtin_nanf("")); }

void put_plain(uint8_t* page, const Part& part, Side side, int dim, int token, float* x) {
    if (part.dtype == DType::f32) {
        move_row<4, true>(page, side, dim, token, reinterpret_cast<uint8_t*>(x));
        return;
    }
    alignas(64) uint16_t halves[kMaxHeadDim];
    for (int d = 0; d < dim; d += kLanes) {
        const F value = load(x + d);
        if (part.dtype == DType::bf16) {
            store_bf16(halves + d, value);
        } else {
            const F broken = select(is_nan(value), nan(), value);
            const M finite = less(abs(value), infinity());
            store_f16(halves + d, select(finite, clip(value, -kF16Max, kF16Max), broken));
        }
    }
    move_row<2, true>(page, side, dim, token, reinterpret_cast<uint8_t*>(halves));
}
void get_plain(uint8_t* page, const Part& part, Side side, int dim, int token, float* x) {
    if (part.dtype == DType::f32) {
        move_row<4, false>(page, side, dim, token, reinterpret_cast<uint8_t*>(x));
        return;
    }
    alignas(64) uint16_t halves[kMaxHeadDim];
    move_row<2, false>(page, side, dim, token, reinterpret_cast<uint8_t*>(halves));
    for (int d = 0; d < dim; d += kLanes) store(x + d, load_as(part.dtype, halves + d));
}

// ------------------------------------------------------------------------------------------------
// affine.py

// What the scales of some groups depend on; a group is a lane, or all lanes of a row.
struct Range {
    F low = infinity();
    F high = sub(zero(), infinity());
    F broken = zero();  // NaN if an element is not finite
};

KVANT_INLINE void include(Range& range, F x) {
    range.low = min(x, range.low);  // a NaN is passed over
    range.high = max(x, range.high);
    range.broken = add(range.broken, mul(x, zero()));
}

struct Grid {
    M broken;
    F zero, scale, divisor;
};

KVANT_INLINE Grid grid_of(const Range& range, float levels) {
    Grid grid;
    grid.broken = is_nan(range.broken);
    // A negative zero becomes positive by adding zero.
    grid.zero = add(down_f16(clip(range.low, -kF16Max, kF16Max)), zero());
    const F span = max(sub(range.high, grid.zero), zero());
    const F negative = div(sub(zero(), span), set(levels));  // rounded down: the scale goes up
    grid.scale = sub(zero(), down_f16(clip(negative, -kF16Max, kF16Max)));
    grid.divisor = select(less(zero(), grid.scale), grid.scale, set(1.0f));
    grid.zero = select(grid.broken, zero(), grid.zero);
    grid.scale = select(grid.broken, nan(), grid.scale);
    return grid;
}
KVANT_INLINE I codes_of(const Grid& grid, F x, float levels) {
    const F steps = clip(div(sub(x, grid.zero), grid.divisor), 0.0f, levels);
    return to_int(select(grid.broken, zero(), steps));
}

KVANT_INLINE uint8_t* bytes_of(Codes& codes) { return reinterpret_cast<uint8_t*>(codes.words); }

// Fields without a dimension are 0.
KVANT_INLINE void end_codes(Codes& codes, int dim) {
    std::memset(bytes_of(codes) + dim, 0, sizeof codes.words - dim);
}

void put_affine(uint8_t* page, const Part& part, Side side, int dim, int token, const float* x) {
    const float levels = static_cast<float>((1 << part.bits) - 1);
    Range lanes, row;
    for (int d = 0; d < dim; d += kLanes) include(lanes, load(x + d));
    row.low = set(-highest(sub(zero(), lanes.low)));
    row.high = set(highest(lanes.high));
    row.broken = set(sum(lanes.broken));
    const Grid grid = grid_of(row, levels);
    put_f16(page + part.scale, token, grid.scale);
    put_f16(page + part.zero, token, grid.zero);
    Codes codes;
    for (int d = 0; d < dim; d += kLanes)
        store_bytes(bytes_of(codes) + d, codes_of(grid, load(x + d), levels));
    end_codes(codes, dim);
    put_codes(page, part, side, dim, token, codes);
}

// A whole page of a format by page: x [64][padded dim]; `codes` [64] is scratch.
void put_page(uint8_t* page, const Part& part, Side side, int dim, const float* x, Codes* codes) {
    const float levels = static_cast<float>((1 << part.bits) - 1);
    const int stride = padded(dim);
    alignas(64) uint16_t scales[kMaxHeadDim] = {}, zeros[kMaxHeadDim] = {};
    for (int d = 0; d < dim; d += kLanes) {
        Range range;
        for (int t = 0; t < kPageTokens; ++t) include(range, load(x + t * stride + d));
        const Grid grid = grid_of(range, levels);
        store_f16(scales + d, grid.scale);
        store_f16(zeros + d, grid.zero);
        for (int t = 0; t < kPageTokens; ++t)
            store_bytes(bytes_of(codes[t]) + d, codes_of(grid, load(x + t * stride + d), levels));
    }
    const int nbytes = (2 * dim + 63) / 64 * 64;  // zeros fill them up
    std::memset(scales + dim, 0, nbytes - 2 * dim);
    std::memset(zeros + dim, 0, nbytes - 2 * dim);
    std::memcpy(page + part.scale, scales, nbytes);
    std::memcpy(page + part.zero, zeros, nbytes);
    for (int t = 0; t < kPageTokens; ++t) {
        end_codes(codes[t], dim);
        put_codes(page, part, side, dim, t, codes[t]);
    }
}

void get_affine(uint8_t* page, const Part& part, Side side, int dim, int token, float* x) {
    const F scale = get_f16(page + part.scale, token), zero = get_f16(page + part.zero, token);
    Codes codes;
    get_codes(page, part, side, dim, token, codes);
    for (int d = 0; d < dim; d += kLanes) {
        const F code = to_float(load_bytes(bytes_of(codes) + d));
        store(x + d, add(mul(code, scale), zero));
    }
}

// ------------------------------------------------------------------------------------------------
// midpoint.py

alignas(64) constexpr float kClips[kLanes] = {
    16 / 16.f, 15 / 16.f, 14 / 16.f, 13 / 16.f, 12 / 16.f, 11 / 16.f, 10 / 16.f, 9 / 16.f,
    16 / 16.f, 15 / 16.f, 14 / 16.f, 13 / 16.f, 12 / 16.f, 11 / 16.f, 10 / 16.f, 9 / 16.f,
};

KVANT_INLINE F scales_of(F clips, float largest, float half) {
    const F scale = div(mul(clips, set(largest)), set(half));
    return nearest_f16(min(scale, set(kF16Max)));
}
KVANT_INLINE F levels_of(F x, F scale, float half) {  // from -half
    const F divisor = select(less(zero(), scale), scale, set(1.0f));
    return clip(floor(div(x, divisor)), -half, half - 1);
}

// The clip factor with the least error. Lanes c and 8 + c have factor c: lower ones for dimension d
// and upper ones for d + odd, which are the last to be folded together.
float best_clip(const float* x, int dim, float largest, float half) {
    const F scale = scales_of(load(kClips), largest, half);
    const int block = dim & -dim, odd = dim / block;
    F errors[kMaxHeadDim / 2];
    for (int b = 0; b < block / 2; ++b) {
        for (int i = 0; i < odd; ++i) {
            const float* at = x + 2 * b * odd + i;
            const F value = select(first_lanes(8), set(at[0]), set(at[odd]));
            const F level = levels_of(value, scale, half);
            const F error = sub(mul(scale, add(level, set(0.5f))), value);
            errors[b * odd + i] = mul(error, error);
        }
    }
    for (int count = dim / 4; count >= odd; count /= 2)
        for (int i = 0; i < count; ++i) errors[i] = add(errors[i], errors[i + count]);
    F total = add(errors[0], partner<8>(errors[0]));
    for (int i = 1; i < odd; ++i) total = add(total, add(errors[i], partner<8>(errors[i])));
    float by_clip[kLanes];
    store(by_clip, total);
    int best = 0;
    for (int c = 1; c < 8; ++c)
        if (by_clip[c] < by_clip[best]) best = c;
    return kClips[best];
}

// The largest magnitude of a row; NaN if an element is not finite.
float largest_of(const float* x, int dim) {
    F most = zero(), broken = zero();
    for (int d = 0; d < dim; d += kLanes) {
        most = max(abs(load(x + d)), most);
        broken = add(broken, mul(load(x + d), zero()));
    }
    return any(is_nan(broken)) ? __builtin_nanf("") : highest(most);
}

void put_midpoint(uint8_t* page, const Part& part, Side side, int dim, int token, const float* x) {
    const float half = static_cast<float>(1 << (part.bits - 1));
    const float largest = largest_of(x, dim);
    Codes codes;
    F scale = nan();
    if (largest != largest) {
        end_codes(codes, 0);
    } else {
        scale = scales_of(set(best_clip(x, dim, largest, half)), largest, half);
        for (int d = 0; d < dim; d += kLanes) {
            const F level = levels_of(load(x + d), scale, half);
            store_bytes(bytes_of(codes) + d, to_int(add(level, set(half))));
        }
        end_codes(codes, dim);
    }
    put_f16(page + part.scale, token, scale);
    put_codes(page, part, side, dim, token, codes);
}
void get_midpoint(uint8_t* page, const Part& part, Side side, int dim, int token, float* x) {
    const F scale = get_f16(page + part.scale, token);
    const F centre = set(static_cast<float>(1 << (part.bits - 1)) - 0.5f);
    Codes codes;
    get_codes(page, part, side, dim, token, codes);
    for (int d = 0; d < dim; d += kLanes) {
        const F level = to_float(load_bytes(bytes_of(codes) + d));
        store(x + d, mul(scale, sub(level, centre)));
    }
}

// ------------------------------------------------------------------------------------------------
// float8.py

constexpr float kE4M3Max = 448.0f;

void put_float8(uint8_t* page, const Part& part, Side side, int dim, int token, const float* x) {
    const float largest = largest_of(x, dim);
    Codes codes;
    F scale = nan();
    if (largest != largest) {
        end_codes(codes, 0);
    } else {
        const F negative = div(set(-largest), set(kE4M3Max));  // rounded down: the scale goes up
        scale = sub(zero(), down_f16(max(negative, set(-kF16Max))));
        const F divisor = select(less(zero(), scale), scale, set(1.0f));
        for (int d = 0; d < dim; d += kLanes) {
            const F value = clip(div(load(x + d), divisor), -kE4M3Max, kE4M3Max);
            store_bytes(bytes_of(codes) + d, to_e4m3(value));
        }
        end_codes(codes, dim);
    }
    put_f16(page + part.scale, token, scale);
    put_codes(page, part, side, dim, token, codes);
}
void get_float8(uint8_t* page, const Part& part, Side side, int dim, int token, float* x) {
    const F scale = mul(get_f16(page + part.scale, token), set(256.0f));
    Codes codes;
    get_codes(page, part, side, dim, token, codes);
    for (int d = 0; d < dim; d += kLanes)
        store(x + d, mul(scale, e4m3_at<0>(load_bytes(bytes_of(codes) + d))));
}

// ------------------------------------------------------------------------------------------------
// Any format. `page` is the part of a head in a page.

KVANT_INLINE void rotate_for(const Part& part, const Store& store, float* x) {
    if (part.rotated) rotate(x, store.head_dim, store.signs);
}

void put_token(const Store& store, uint8_t* page, const Part& part, Side side, int token,
               float* x) {
    const int dim = store.head_dim;
    rotate_for(part, store, x);
    // Lanes behind the last dimension repeat others, which changes no minimum or maximum.
    if (padded(dim) > dim) std::memcpy(x + dim, x, (padded(dim) - dim) * sizeof(float));
    switch (part.family) {
        case Family::plain: return put_plain(page, part, side, dim, token, x);
        case Family::affine: return put_affine(page, part, side, dim, token, x);
        case Family::midpoint: return put_midpoint(page, part, side, dim, token, x);
        default: return put_float8(page, part, side, dim, token, x);
    }
}

// The vector in the original domain.
void get_token(const Store& store, uint8_t* page, const Part& part, Side side, int token,
               float* x) {
    const int dim = store.head_dim;
    switch (part.family) {
        case Family::plain: get_plain(page, part, side, dim, token, x); break;
        case Family::affine: get_affine(page, part, side, dim, token, x); break;
        case Family::midpoint: get_midpoint(page, part, side, dim, token, x); break;
        default: get_float8(page, part, side, dim, token, x);
    }
    if (part.rotated) unrotate(x, dim, store.signs);
}

// ------------------------------------------------------------------------------------------------
// ReferenceBackend.write, for one KV head and one group of a sequence.

uint8_t* head_page(const Pool& pool, int64_t page, const Layer& layer, int kv_head) {
    return pool.data + page * pool.page_bytes + layer.offset +
           kv_head * (layer.k.nbytes + layer.v.nbytes);
}

// Encode a whole page again, from the fine one: x [64][padded dim] and codes [64] are scratch.
void refill(const Store& store, uint8_t* fine_page, const Part& fine, uint8_t* page,
            const Part& part, Side side, float* x, Codes* codes) {
    for (int t = 0; t < kPageTokens; ++t) {
        float* row = x + t * padded(store.head_dim);
        get_token(store, fine_page, fine, side, t, row);
        part.by_page ? rotate_for(part, store, row) : put_token(store, page, part, side, t, row);
    }
    if (part.by_page) put_page(page, part, side, store.head_dim, x, codes);
}

size_t write_scratch(int head_dim) {
    return kPageTokens * (padded(head_dim) * sizeof(float) + sizeof(Codes));
}

void write_group(const WriteCall& call, const Sequence& seq, int kv_head, int64_t group,
                 uint8_t* scratch) {
    const Store& store = *call.store;
    auto* codes = reinterpret_cast<Codes*>(scratch);
    auto* x = reinterpret_cast<float*>(codes + kPageTokens);

    const Pool* pool = &store.base;
    const Layer* layer = &call.base;
    int64_t page;
    if (!store.has_recent) {
        page = seq.pages[group];
    } else {
        page = seq.fine_pages[group - seq.start / kPageTokens];
        const bool recent = page < store.num_recent;
        pool = recent ? &store.recent : &store.scratch;
        layer = recent ? &call.fine : &call.scratch;
        if (!recent) page -= store.num_recent;
    }
    const int64_t origin = group * kPageTokens;
    const int64_t first = seq.start > origin ? seq.start : origin;
    const int64_t last = seq.end < origin + kPageTokens ? seq.end : origin + kPageTokens;
    uint8_t* keys = head_page(*pool, page, *layer, kv_head);
    uint8_t* values = keys + layer->k.nbytes;
    for (int64_t position = first; position < last; ++position) {
        const int64_t row = seq.row + position - seq.start;
        const int token = static_cast<int>(position - origin);
        read_row(call.k, row, kv_head, store.head_dim, x);
        put_token(store, keys, layer->k, Side::k, token, x);
        read_row(call.v, row, kv_head, store.head_dim, x);
        put_token(store, values, layer->v, Side::v, token, x);
    }

    const bool full = group < seq.end / kPageTokens;
    if (!store.has_recent || !full || group < store.num_sink) return;
    uint8_t* base = head_page(store.base, seq.pages[group], call.base, kv_head);
    refill(store, keys, layer->k, base, call.base.k, Side::k, x, codes);
    base += call.base.k.nbytes;
    refill(store, values, layer->v, base, call.base.v, Side::v, x, codes);
}

}  // namespace
