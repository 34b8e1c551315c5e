// Linear layers: out = f(x) W^T, with what stands before and after the product in the same pass.
//
// Weights lie as the loop reads them: for each pair of blocks of 16 outputs all words of inputs, a
// word being 32 bits of one output (1 float32, 2 halves, 4 codes of 8 bits; 4-bit codes have two
// words in one line, low half of a byte first), and behind each group of codes its scales. So every
// kind of weight is one stream that is read once from front to back for each tile of rows:
//
//   [pair][group]{ [word][2 blocks][16 outputs], scale[32] f16, offset[32] f16 if there are any }
//
// Codes stand for factor * (scale * (code - middle) + offset). Rows of x, rotated if the weights are,
// are rounded to 8 bits with a scale for each group, and products of a group are summed as integers,
// exactly. Floats are summed in the order of inputs. A row's result is the same in any tile.
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include "kernels.hpp"
#include "rotate.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace {

using namespace kvant;

#if defined(KVANT_ISA_AVX512)
constexpr int kTileSizes[] = {1, 2, 4, 6, 8, 12};
#else
constexpr int kTileSizes[] = {1, 2};
#endif
constexpr int kLinearRows = kTileSizes[std::size(kTileSizes) - 1];

constexpr bool has_codes(WeightKind kind) {
    return kind == WeightKind::codes8 || kind == WeightKind::codes4;
}
// Whether two halves of a word are multiplied as they are, and not each as a float32.
constexpr bool dots_halves(WeightKind kind) { return kind == WeightKind::bf16 && kDotsBF16; }
// Rows of x are prepared by tiles: first all that meet the first unit of 32 bits of inputs, one row
// beside the other, and so on; then of codes for each group -middle * sum (what a dot product begins
// with), the scale, and the sum times the scale.
constexpr int units_per_word(WeightKind kind) {
    return kind == WeightKind::f16 || (kind == WeightKind::bf16 && !kDotsBF16) ? 2 : 1;
}
static int words_of(const LinearWeights& w) { return w.groups * w.group_words; }
static int units_of(const LinearWeights& w) { return words_of(w) * units_per_word(w.kind); }
// 32-bit numbers of a row.
static size_t prepared_size(const LinearWeights& w) {
    return units_of(w) + (has_codes(w.kind) ? 3 * w.groups : 0);
}

// Rows [first, first + count) of those that are prepared together: a tile with room for `size`.
struct RowTile {
    int first, count, size;
};
static RowTile tile_at(int rows, int tile) {
    const int first = tile * kLinearRows, count = std::min(rows - first, kLinearRows);
    int at = 0;
    while (kTileSizes[at] < count) ++at;
    return {first, count, kTileSizes[at]};
}
static int tiles_of(int rows) { return (rows + kLinearRows - 1) / kLinearRows; }
// Where a tile's numbers are: tiles are as if all had the largest size.
KVANT_INLINE uint32_t* tile_memory(const LinearWeights& w, uint8_t* prepared, int tile) {
    return reinterpret_cast<uint32_t*>(prepared) + tile * kLinearRows * prepared_size(w);
}
static size_t prepared_bytes(const LinearWeights& w, int rows) {
    return tiles_of(rows) * kLinearRows * prepared_size(w) * sizeof(uint32_t);
}
// Floats of one row with room behind them.
static int row_room(const LinearWeights& w) { return words_of(w) * 4 + 4 * kLanes; }
static size_t prepare_scratch(const LinearWeights& w) { return row_room(w) * (sizeof(float) + 1); }

// Inputs of one row, normalized if the call asks for it, as float32 with zeros behind them.
static void read_inputs(const LinearCall& call, int64_t row, float* to, int length) {
    const int dim = call.weights->inputs;
    F scale = set(1.0f);
    if (call.norm) {
        F squares = zero();
        for (int d = 0; d < dim; d += kLanes) {
            const F each = read_part(call.x, row, 0, d, dim);
            squares = fma(each, each, squares);
            store(to + d, each);
        }
        scale = set(1 / std::sqrt(sum(squares) / dim + call.eps));
    }
    const Tensor weight{const_cast<float*>(call.norm), DType::f32, 0, 0};
    for (int d = 0; d < dim; d += kLanes)
        store(to + d, call.norm ? mul(mul(load(to + d), scale), read_part(weight, 0, 0, d, dim))
                                : read_part(call.x, row, 0, d, dim));
    for (int d = padded(dim); d < length; d += kLanes) store(to + d, zero());
}

// Every unit of a row to its place in a tile.
KVANT_INLINE void spread(const void* units, int count, uint32_t* to, int size) {
    for (int i = 0; i < count; ++i)
        std::memcpy(to + i * size, static_cast<const char*>(units) + 4 * i, 4);
}

KVANT_INLINE void put(uint32_t* to, int32_t x) { std::memcpy(to, &x, 4); }
KVANT_INLINE void put(uint32_t* to, float x) { std::memcpy(to, &x, 4); }

// Round one row to 8 bits by groups. What is not finite makes all results of its row NaN.
static void round_inputs(const LinearWeights& w, const float* from, uint8_t* codes, uint32_t* to,
                         int size) {
    const int units = units_of(w), group = w.group_words * 4;
    const int middle = w.kind == WeightKind::codes8 ? 128 : 8;
    uint32_t* totals = to + units * size;
    for (int g = 0; g < w.groups; ++g, totals += size) {
        const int begin = g * group, end = begin + group;
        const M last = first_lanes((group - 1) % kLanes + 1);
        const auto read = [&](int d) {
            const F x = load(from + d);
            return d + kLanes <= end ? x : select(last, x, zero());
        };
        F most = zero(), poison = zero();
        for (int d = begin; d < end; d += kLanes) {
            const F x = read(d);
            most = max(abs(x), most);
            poison = fma(x, zero(), poison);
        }
        const float limit = highest(most), scale = limit / 127.0f + sum(poison);
        const F factor = set(limit > 1e-35f ? 127.0f / limit : 0.0f);  // no Inf
        I total = izero();
        for (int d = begin; d < end; d += kLanes) {
            const I rounded = to_int(mul(read(d), factor));
            total = iadd(total, rounded);
            store_bytes(codes + d, rounded);  // also to the next group, which comes later
        }
        const int32_t all = isum(total);  // anything if a row is not finite
        put(totals, static_cast<int32_t>(0u - static_cast<uint32_t>(middle) * all));
        put(totals + w.groups * size, scale);
        put(totals + 2 * w.groups * size, static_cast<float>(all) * scale);
    }
    spread(codes, units, to, size);
}

// Rows [begin, end) of those that are prepared together, of which row 0 is `row` of x.
static void prepare_rows(const LinearCall& call, int64_t row, int rows, int begin, int end,
                         uint8_t* prepared, uint8_t* scratch) {
    const LinearWeights& w = *call.weights;
    const int units = units_of(w);
    const int length = units * (has_codes(w.kind) ? 4 : dots_halves(w.kind) ? 2 : 1);
    auto* floats = reinterpret_cast<float*>(scratch);
    uint8_t* rounded = scratch + row_room(w) * sizeof(float);
    for (int r = begin; r < end; ++r) {
        const int tile = r / kLinearRows;
        const RowTile t = tile_at(rows, tile);
        uint32_t* to = tile_memory(w, prepared, tile) + r - t.first;
        read_inputs(call, row + r, floats, padded(length));
        if (has_codes(w.kind)) {
            if (w.rotation) rotate_any<false>(floats, w.inputs, w.signs, w.rotation);
            round_inputs(w, floats, rounded, to, t.size);
        } else if (dots_halves(w.kind)) {
            auto* halves = reinterpret_cast<uint16_t*>(floats);  // each behind those it is made of
            for (int d = 0; d < length; d += kLanes) store_bf16(halves + d, load(floats + d));
            spread(halves, units, to, t.size);
        } else {
            spread(floats, units, to, t.size);
        }
    }
}

// Bytes between a line that is used and the one that is asked for then.
constexpr int ahead(WeightKind kind) { return kind == WeightKind::codes4 ? 2048 : 4096; }

KVANT_INLINE F float_at(const uint32_t* p) {
    float x;
    std::memcpy(&x, p, 4);
    return set(x);
}
KVANT_INLINE I unit_at(const uint32_t* p) { return iset(static_cast<int32_t>(*p)); }

// Products of a tile of rows with one pair of blocks, of weights that are floats. Sums are made of
// sums of kSummedWords words: one long chain would lose more to rounding.
constexpr int kSummedWords = 128;
template <WeightKind kind, int rows>
KVANT_INLINE void multiply_floats(const LinearWeights& w, const uint8_t* lines, const uint32_t* x,
                                  F (&out)[rows][2]) {
    for (int r = 0; r < rows; ++r) out[r][0] = out[r][1] = zero();
    const int words = words_of(w);
    for (int begin = 0; begin < words; begin += kSummedWords) {
        F acc[rows][2];
        for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = zero();
        const int end = std::min(words, begin + kSummedWords);
        for (int k = begin; k < end; ++k, lines += 128) {
            prefetch(lines + ahead(kind));
            prefetch(lines + ahead(kind) + 64);
            const I line0 = iload(lines), line1 = iload(lines + 64);
            if constexpr (dots_halves(kind)) {
                for (int r = 0; r < rows; ++r) {
                    const I pair = unit_at(x + r);
                    acc[r][0] = dot_bf16(acc[r][0], line0, pair);
                    acc[r][1] = dot_bf16(acc[r][1], line1, pair);
                }
            } else if constexpr (kind == WeightKind::f32) {
                for (int r = 0; r < rows; ++r) {
                    const F each = float_at(x + r);
                    acc[r][0] = fma(as_float(line0), each, acc[r][0]);
                    acc[r][1] = fma(as_float(line1), each, acc[r][1]);
                }
            } else {
                constexpr bool f16 = kind == WeightKind::f16;
                const F low0 = f16 ? low_f16(line0) : low_bf16(line0);
                const F low1 = f16 ? low_f16(line1) : low_bf16(line1);
                for (int r = 0; r < rows; ++r) {
                    const F each = float_at(x + r);
                    acc[r][0] = fma(low0, each, acc[r][0]);
                    acc[r][1] = fma(low1, each, acc[r][1]);
                }
                x += rows;
                const F high0 = f16 ? high_f16(line0) : high_bf16(line0);
                const F high1 = f16 ? high_f16(line1) : high_bf16(line1);
                for (int r = 0; r < rows; ++r) {
                    const F each = float_at(x + r);
                    acc[r][0] = fma(high0, each, acc[r][0]);
                    acc[r][1] = fma(high1, each, acc[r][1]);
                }
            }
            x += rows;
        }
        for (int r = 0; r < rows; ++r) {
            out[r][0] = add(out[r][0], acc[r][0]);
            out[r][1] = add(out[r][1], acc[r][1]);
        }
    }
}

template <int rows>
KVANT_INLINE void add_word(I line0, I line1, const uint32_t* x, I (&acc)[rows][2]) {
    for (int r = 0; r < rows; ++r) {
        const I unit = unit_at(x + r);
        acc[r][0] = dot(acc[r][0], line0, unit);
        acc[r][1] = dot(acc[r][1], line1, unit);
    }
}

// The same of weights that are codes.
template <WeightKind kind, int rows>
KVANT_INLINE void multiply_codes(const LinearWeights& w, const uint8_t* lines, const uint32_t* x,
                                 F (&out)[rows][2]) {
    const uint32_t* sums = x + words_of(w) * rows;
    const uint32_t* scales = sums + w.groups * rows;
    const uint32_t* scaled = scales + w.groups * rows;
    for (int r = 0; r < rows; ++r) out[r][0] = out[r][1] = zero();
    for (int g = 0; g < w.groups; ++g, sums += rows, scales += rows, scaled += rows) {
        I acc[rows][2];
        for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = unit_at(sums + r);
        for (const uint32_t* end = x + w.group_words * rows; x < end; lines += 128) {
            prefetch(lines + ahead(kind));
            prefetch(lines + ahead(kind) + 64);
            const I line0 = iload(lines), line1 = iload(lines + 64);
            if constexpr (kind == WeightKind::codes8) {
                add_word(line0, line1, x, acc);
                x += rows;
            } else {
                const I low = iset(0x0f0f0f0f);
                add_word(iand(line0, low), iand(line1, low), x, acc);
                add_word(iand(shift_right<4>(line0), low), iand(shift_right<4>(line1), low),
                         x + rows, acc);
                x += 2 * rows;
            }
        }
        const auto* factors = reinterpret_cast<const uint16_t*>(lines);
        const F scale0 = load_f16(factors), scale1 = load_f16(factors + 16);
        prefetch(lines + ahead(kind));
        lines += 64;
        for (int r = 0; r < rows; ++r) {
            const F scale = float_at(scales + r);
            out[r][0] = fma(mul(to_float(acc[r][0]), scale0), scale, out[r][0]);
            out[r][1] = fma(mul(to_float(acc[r][1]), scale1), scale, out[r][1]);
        }
        if (!w.offsets) continue;
        const F offset0 = load_f16(factors + 32), offset1 = load_f16(factors + 48);
        prefetch(lines + ahead(kind));
        lines += 64;
        for (int r = 0; r < rows; ++r) {
            const F total = float_at(scaled + r);
            out[r][0] = fma(offset0, total, out[r][0]);
            out[r][1] = fma(offset1, total, out[r][1]);
        }
    }
}

// What comes after the product: bias, gate, addition to what is there.
KVANT_INLINE void finish(const LinearCall& call, int64_t row, int pair, F a, F b) {
    const LinearWeights& w = *call.weights;
    const auto put = [&](int d, F value) {
        if (d >= w.outputs) return;
        if (call.add) value = add(value, read_part(call.out, row, 0, d, w.outputs));
        write_part(call.out, row, 0, d, w.outputs, value);
    };
    if (w.bias) {
        a = add(a, load(w.bias + 32 * pair));
        b = add(b, load(w.bias + 32 * pair + 16));
    }
    if (!w.gated) {
        put(32 * pair, a);
        put(32 * pair + 16, b);
    } else {
        put(16 * pair, mul(silu(a), b));
    }
}

// Rows [row, row + count), which begin a tile of `rows` rows at `x`, times pairs [begin, end).
template <WeightKind kind, int rows>
static void multiply_tile(const LinearCall& call, int64_t row, int count, const uint32_t* x,
                          int begin, int end) {
    const LinearWeights& w = *call.weights;
    for (int pair = begin; pair < end; ++pair) {
        const uint8_t* lines = w.lines + pair * w.pair_bytes;
        F out[rows][2];
        if constexpr (has_codes(kind)) {
            multiply_codes<kind>(w, lines, x, out);
            const F factor0 = load(w.factors + 32 * pair), factor1 = load(w.factors + 32 * pair + 16);
            for (int r = 0; r < rows; ++r) {
                out[r][0] = mul(out[r][0], factor0);
                out[r][1] = mul(out[r][1], factor1);
            }
        } else {
            multiply_floats<kind>(w, lines, x, out);
        }
        for (int r = 0; r < count; ++r) finish(call, row + r, pair, out[r][0], out[r][1]);
    }
}

using MultiplyTile = void (*)(const LinearCall&, int64_t, int, const uint32_t*, int, int);

template <WeightKind kind, size_t... i>
KVANT_INLINE MultiplyTile tile_of(int size, std::index_sequence<i...>) {
    static constexpr MultiplyTile tiles[] = {multiply_tile<kind, kTileSizes[i]>...};
    int at = 0;
    while (kTileSizes[at] != size) ++at;
    return tiles[at];
}

static MultiplyTile tile_of(WeightKind kind, int size) {
    constexpr auto sizes = std::make_index_sequence<std::size(kTileSizes)>();
    switch (kind) {
        case WeightKind::f32: return tile_of<WeightKind::f32>(size, sizes);
        case WeightKind::f16: return tile_of<WeightKind::f16>(size, sizes);
        case WeightKind::bf16: return tile_of<WeightKind::bf16>(size, sizes);
        case WeightKind::codes8: return tile_of<WeightKind::codes8>(size, sizes);
        default: return tile_of<WeightKind::codes4>(size, sizes);
    }
}

// Rows [row, row + rows), all of them prepared, times pairs [begin, end). Weights of a pair
// stay in the first caches while all tiles of rows use them.
static void multiply_rows(const LinearCall& call, int64_t row, int rows, int begin, int end,
                          uint8_t* prepared) {
    const LinearWeights& w = *call.weights;
    const int tiles = tiles_of(rows);
    const int step = tiles == 1 ? end - begin : 1;
    for (int pair = begin; pair < end; pair += step) {
        for (int tile = 0; tile < tiles; ++tile) {
            const RowTile t = tile_at(rows, tile);
            tile_of(w.kind, t.size)(call, row + t.first, t.count, tile_memory(w, prepared, tile),
                                    pair, pair + step);
        }
    }
}

}  // namespace
