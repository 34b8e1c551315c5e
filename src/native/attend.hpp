// Attention of a tile of queries to the pages of their sequence.
//
// A tile is some positions of one 64-group of one sequence with some KV heads and all their query
// heads: its rows. It goes through the pages that its rows see, and through a KV head's part of a
// page with blocks of up to kRows rows that stay in registers:
//
//   scores    rows x head_dim times head_dim x 64 tokens
//   softmax   relative to the page's own maximum; P becomes integers if V is codes
//   output    rows x 64 tokens times 64 x head_dim, merged into the rows' (m, l, O)
//
// Codes are multiplied as integers and never become floats. With centred codes c' = c - 2^(b-1), so
// that a rounding error of the other factor meets small numbers, and z' = z + 2^(b-1) s:
//
//   q . k_t   = s_t (q . c'_t) + z'_t sum(q)                     scale and zero by token
//   q . k_t   = (q s) . c'_t + q . z'                            by channel of the page
//   sum p v   = sum (p_t s_t) c'_t + sum p_t z'_t                by token
//   sum p v   = s_d (sum p_t c'_td) + z'_d sum p_t               by channel of the page
//
// q is rounded to 8 or 16 bits, p_t s_t to 8 or 14 bits (`wide`), as one or two vectors of bytes; the
// term that centring takes off, 2^(b-1) times the sum of the rounded factor, is exact.
//
// A page's result depends on the row and the page alone, and they are merged in an order that
// positions decide: pages of a split (8 pages) one after the other, then the splits. So a row has
// the same bits in any tile, batch or division of work.
#pragma once

#include <cfloat>

#include "kernels.hpp"
#include "rotate.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace {

using namespace kvant;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -FLT_MAX;  // the maximum of no scores, finite so that differences are

// Whether codes are multiplied as integers, and of how many bits the other factor is. (kernels/cpu.py
// tells the same to tests.)
constexpr bool coded(const Part& part) {
    return part.family == Family::affine || part.family == Family::midpoint;
}
constexpr bool wide(const Part& part) { return coded(part) && part.bits > 4; }

// ------------------------------------------------------------------------------------------------
// Products with what pages hold. B is lines of 64 bytes, [block][word][16 columns][4 bytes]: columns
// are tokens for keys and dimensions for values, words go along the sum.

// Loops over registers must be unrolled, or the registers become memory.
#define KVANT_UNROLL _Pragma("GCC unroll 16")

template <int R, int NB, typename T>
KVANT_INLINE void fill(T (&acc)[R][NB], T value) {
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) acc[r][n] = value;
    }
}

// What is read next, fetched a few lines at a time all through the work on what is there: asked for
// in bursts, it would come too late and hold up the work's own loads meanwhile.
struct Stream {
    const uint8_t *at, *end;
    int step;  // bytes of a pull

    [[gnu::always_inline]] void pull() {
        if (at >= end) return;
        for (int i = 0; i < step; i += 64) prefetch(at + i);
        at += step;
    }
};

KVANT_INLINE int32_t word_at(const void* p) {
    int32_t out;
    std::memcpy(&out, p, 4);
    return out;
}

// acc += A [R rows of bytes] times `NB` blocks of B. Signed bytes are B's with kSigned, else A's.
template <int R, int NB, bool kSigned>
KVANT_INLINE void multiply(I (&acc)[R][NB], const uint8_t* a, ptrdiff_t a_stride, const uint8_t* b,
                           ptrdiff_t block_stride, int words, Stream& next) {
    for (int w = 0; w < words; ++w) {
        I line[NB];
        next.pull();
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) {
            line[n] = iload(b + n * block_stride + 64 * w);
            hold(line[n]);
        }
        KVANT_UNROLL
        for (int r = 0; r < R; ++r) {
            const I row = iset(word_at(a + r * a_stride + 4 * w));
            KVANT_UNROLL
            for (int n = 0; n < NB; ++n)
                acc[r][n] = kSigned ? dot(acc[r][n], row, line[n]) : dot(acc[r][n], line[n], row);
        }
    }
}

// The same with B in fields of 4 bits: a line has the words `w` and `words + w` of keys, but of values
// the blocks n and n + all of them: results of the second ones follow those of the first.
template <int R, int NB, Side kSide>
KVANT_INLINE void multiply_packed(I (&acc)[R][kSide == Side::k ? NB : 2 * NB], const uint8_t* a,
                                  ptrdiff_t a_stride, const uint8_t* b, ptrdiff_t block_stride,
                                  int words, Stream& next) {
    const I mask = iset(0x0f0f0f0f);
    for (int w = 0; w < words; ++w) {
        next.pull();
        KVANT_UNROLL
        for (int field = 0; field < 2; ++field) {
            I line[NB];
            KVANT_UNROLL
            for (int n = 0; n < NB; ++n) {
                const I packed = iload(b + n * block_stride + 64 * w);
                line[n] = iand(field ? shift_right<4>(packed) : packed, mask);
                hold(line[n]);
            }
            KVANT_UNROLL
            for (int r = 0; r < R; ++r) {
                const int word = kSide == Side::k ? w + field * words : w;
                const I row = iset(word_at(a + r * a_stride + 4 * word));
                KVANT_UNROLL
                for (int n = 0; n < NB; ++n) {
                    I& to = acc[r][kSide == Side::k ? n : field * NB + n];
                    to = kSide == Side::k ? dot(to, line[n], row) : dot(to, row, line[n]);
                }
            }
        }
    }
}

// The same with floats: a word of B is two of 16 bits or one of 32. `keep` is null, or a mask for
// each word: values that are masked out count as 0, whatever they are.
template <int R, int NB, DType kType>
KVANT_INLINE void multiply(F (&acc)[R][NB], const float* a, ptrdiff_t a_stride, const uint8_t* b,
                           ptrdiff_t block_stride, int words, Stream& next,
                           const int32_t* keep) {
    constexpr int kPer = kType == DType::f32 ? 1 : 2;
    for (int w = 0; w < words; ++w) {
        F low[NB], high[NB];
        next.pull();
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) {
            I line = iload(b + n * block_stride + 64 * w);
            if (keep) line = iand(line, iset(keep[w]));
            if constexpr (kType == DType::f32) {
                low[n] = as_float(line);
            } else if constexpr (kType == DType::bf16) {
                low[n] = low_bf16(line);
                high[n] = high_bf16(line);
            } else {
                low[n] = low_f16(line);
                high[n] = high_f16(line);
            }
        }
        KVANT_UNROLL
        for (int r = 0; r < R; ++r) {
            const F row = set(a[r * a_stride + kPer * w]);
            KVANT_UNROLL
            for (int n = 0; n < NB; ++n) acc[r][n] = fma(row, low[n], acc[r][n]);
            if constexpr (kPer == 2) {
                const F second = set(a[r * a_stride + kPer * w + 1]);
                KVANT_UNROLL
                for (int n = 0; n < NB; ++n) acc[r][n] = fma(second, high[n], acc[r][n]);
            }
        }
    }
}

// The same with rows of bfloat16, and B too, by pairs.
template <int R, int NB>
KVANT_INLINE void multiply_pairs(F (&acc)[R][NB], const uint8_t* a, ptrdiff_t a_stride,
                                 const uint8_t* b, ptrdiff_t block_stride, int words,
                                 Stream& next) {
    for (int w = 0; w < words; ++w) {
        I line[NB];
        next.pull();
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) {
            line[n] = iload(b + n * block_stride + 64 * w);
            hold(line[n]);
        }
        KVANT_UNROLL
        for (int r = 0; r < R; ++r) {
            const I row = iset(word_at(a + r * a_stride + 4 * w));
            KVANT_UNROLL
            for (int n = 0; n < NB; ++n) acc[r][n] = dot_bf16(acc[r][n], line[n], row);
        }
    }
}

// Rows of integers as bytes: of signed 16 bits (high * 256 + low), or of 8.
struct Bytes {
    uint8_t* high;
    uint8_t* low;  // null: one byte is all
    ptrdiff_t stride;
};

template <int R, int NB, bool kSigned, int kShift>
KVANT_INLINE void product(I (&acc)[R][NB], const Bytes& a, const int32_t* start, const uint8_t* b,
                          ptrdiff_t block_stride, int words, Stream& next) {
    fill<R, NB>(acc, izero());
    multiply<R, NB, kSigned>(acc, a.high, a.stride, b, block_stride, words, next);
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n)
            acc[r][n] = iadd(a.low ? shift_left<kShift>(acc[r][n]) : acc[r][n], iset(start[r]));
    }
    if (a.low) multiply<R, NB, kSigned>(acc, a.low, a.stride, b, block_stride, words, next);
}

// ------------------------------------------------------------------------------------------------
// Codes of less than 8 bits become lines of bytes in scratch memory (packing.py has the fields).

// Keys: [16 tokens][columns / 4][16][4]. Fields of kWidth bits go to bits kShift and up.
template <int kWidth, int kShift>
KVANT_INLINE void unpack_keys(const uint8_t* from, uint8_t* lines, int dim, Stream& next) {
    const int words = (dim * kWidth + 31) / 32, all = dim / 4;
    const I mask = iset(int32_t(0x01010101u * ((1u << kWidth) - 1)));
    for (int block = 0; block < kPageTokens / 16; ++block)
        for (int w = 0; w < words; ++w, from += 64) {
            I packed = iload(from);
            next.pull();
            KVANT_UNROLL
            for (int field = 0; field < 8 / kWidth; ++field) {
                const int to = w + field * words;
                if (to < all) {
                    uint8_t* at = lines + 64 * (block * all + to);
                    const I codes = iand(packed, mask);
                    istore(at, kShift ? iadd(iload(at), shift_left<kShift>(codes)) : codes);
                }
                packed = shift_right<kWidth>(packed);
            }
        }
}

// Values: [columns / b][16 words][b][4 tokens] with b = gcd(16, columns), to blocks of 16 columns.
template <int kWidth, int kShift, int kColumns>
KVANT_INLINE void unpack_value_blocks(const uint8_t* from, uint8_t* lines, int dim,
                                      Stream& next) {
    const int columns = (dim * kWidth + 31) / 32 * 4;
    constexpr uint64_t kMask = 0x0101010101010101u * ((1u << kWidth) - 1);
    for (int first = 0; first < columns; first += kColumns)
        for (int w = 0; w < 16; ++w, from += 4 * kColumns) {
            next.pull();
            I line = kColumns == 16 ? iload(from) : izero();
            for (int field = 0; field < 8 / kWidth; ++field) {
                const int to = first + field * columns;
                if (to >= padded(dim)) break;
                uint8_t* at = lines + 64 * (to / 16 * 16 + w) + to % 16 * 4;
                if (kColumns == 16) {
                    const I codes = iand(line, iset(int32_t(kMask)));
                    istore(at, kShift ? iadd(iload(at), shift_left<kShift>(codes)) : codes);
                    line = shift_right<kWidth>(line);
                    continue;
                }
                for (int i = 0; i < kColumns / 2; ++i) {
                    uint64_t packed, codes = 0;
                    std::memcpy(&packed, from + 8 * i, 8);
                    if (kShift) std::memcpy(&codes, at + 8 * i, 8);
                    codes |= (packed >> (field * kWidth) & kMask) << kShift;
                    std::memcpy(at + 8 * i, &codes, 8);
                }
            }
        }
}
template <int kWidth, int kShift>
KVANT_INLINE void unpack_values(const uint8_t* from, uint8_t* lines, int dim, Stream& next) {
    const int columns = (dim * kWidth + 31) / 32 * 4;
    if (columns % 16 == 0)
        unpack_value_blocks<kWidth, kShift, 16>(from, lines, dim, next);
    else if (columns % 8 == 0)
        unpack_value_blocks<kWidth, kShift, 8>(from, lines, dim, next);
    else
        unpack_value_blocks<kWidth, kShift, 4>(from, lines, dim, next);
}

template <int kWidth, int kShift>
KVANT_INLINE void unpack_plane(Side side, const uint8_t* from, uint8_t* lines, int dim,
                               Stream& next) {
    side == Side::k ? unpack_keys<kWidth, kShift>(from, lines, dim, next)
                    : unpack_values<kWidth, kShift>(from, lines, dim, next);
}

static void unpack(const Part& part, Side side, const uint8_t* data, uint8_t* lines, int dim,
                   Stream& next) {
    const uint8_t *low = data + part.codes[0], *high = data + part.codes[1];
    switch (part.bits) {
        case 8: return unpack_plane<8, 0>(side, low, lines, dim, next);
        case 6:
            unpack_plane<4, 0>(side, low, lines, dim, next);
            return unpack_plane<2, 4>(side, high, lines, dim, next);
        case 5:
            unpack_plane<4, 0>(side, low, lines, dim, next);
            return unpack_plane<1, 4>(side, high, lines, dim, next);
        case 4: return unpack_plane<4, 0>(side, low, lines, dim, next);
        case 3:
            unpack_plane<2, 0>(side, low, lines, dim, next);
            return unpack_plane<1, 2>(side, high, lines, dim, next);
        default: return unpack_plane<2, 0>(side, low, lines, dim, next);
    }
}

// Values of 16 or 32 bits whose blocks are of 8 columns, because head_dim is no multiple of 16.
static void widen_blocks(const uint8_t* from, uint8_t* lines, int dim, int words,
                         Stream& next) {
    for (int first = 0; first < dim; first += 8)
        for (int w = 0; w < words; ++w, from += 32) {
            next.pull();
            std::memcpy(lines + 64 * (first / 16 * words + w) + first % 16 * 4, from, 32);
        }
}

// Numbers of 8 bits times their scales (float8.py), as lines of float32: [16 tokens][columns][16] of
// keys, and of values [columns / 16][64 tokens][16], a token in each line.
static void open_float8_keys(const Part& part, const uint8_t* data, uint8_t* lines, int dim,
                             Stream& next) {
    const auto* scales = reinterpret_cast<const uint16_t*>(data + part.scale);
    const uint8_t* from = data + part.codes[0];
    auto* to = reinterpret_cast<float*>(lines);
    for (int block = 0; block < kPageTokens; block += 16) {
        const F scale = mul(load_f16(scales + block), set(256.0f));
        for (int w = 0; w < dim / 4; ++w, from += 64, to += 64) {
            const I words = iload(from);
            next.pull();
            store(to, mul(e4m3_at<0>(words), scale));
            store(to + 16, mul(e4m3_at<1>(words), scale));
            store(to + 32, mul(e4m3_at<2>(words), scale));
            store(to + 48, mul(e4m3_at<3>(words), scale));
        }
    }
}
template <int kColumns>
static void open_float8_values(const Part& part, const uint8_t* data, uint8_t* lines, int dim,
                               Stream& next) {
    const auto* halves = reinterpret_cast<const uint16_t*>(data + part.scale);
    const uint8_t* from = data + part.codes[0];
    float scales[kPageTokens];
    for (int t = 0; t < kPageTokens; t += kLanes)
        store(scales + t, mul(load_f16(halves + t), set(256.0f)));
    for (int first = 0; first < dim; first += kColumns) {
        auto* block = reinterpret_cast<float*>(lines) + first / 16 * 16 * kPageTokens + first % 16;
        for (int w = 0; w < 16; ++w, from += 4 * kColumns) {
            alignas(64) uint8_t line[64] = {};
            const I words = iload(kColumns == 16 ? from : std::memcpy(line, from, 4 * kColumns));
            const auto put = [&](int t, F x) __attribute__((always_inline)) {
                float row[kLanes];
                store(row, mul(x, set(scales[t])));
                std::memcpy(block + 16 * t, row, sizeof(float) * kColumns);
            };
            const int token = w / 4 * 16 + w % 4 * 2;
            next.pull();
            put(token, e4m3_at<0>(words));
            put(token + 1, e4m3_at<1>(words));
            put(token + 8, e4m3_at<2>(words));
            put(token + 9, e4m3_at<3>(words));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Queries and scores.

// Rows of a tile, as keys of one format want them.
struct Queries {
    float* vectors;   // [rows][stride], rotated if the format is; zeros behind the last dimension
    ptrdiff_t stride;
    uint8_t* pairs;   // [rows][stride] as bfloat16, if they are and so are the keys; else null
    Bytes bytes;      // rounded to integers; by page it is made anew for each page
    float* step;      // [rows] of an integer, times the scale of scores
    float* sum;       // [rows] of the vector, times the scale of scores
    int32_t* start;   // [rows] minus the sum of integers times 2^(bits - 1)
};

// Round x [dim], zeros behind it up to a multiple of 64, to integers of 16 or 8 bits, given the largest
// magnitude; returns the step.
KVANT_INLINE float round_query(const float* x, float largest, int dim, int bits, const Bytes& to,
                               int row, int32_t* start) {
    const float levels = to.low ? 32512.0f : 127.0f;
    const F inverse = set(largest > FLT_MIN * 65536 ? levels / largest : 0.0f);
    I total = izero();
    for (int d = 0; d < dim; d += 4 * kLanes) {
        uint8_t* high = to.high + row * to.stride + d;
        I all[4];
        for (int i = 0; i < 4; ++i) all[i] = to_int(mul(load(x + d + i * kLanes), inverse));
        total = iadd(total, iadd(iadd(all[0], all[1]), iadd(all[2], all[3])));
        if (to.low) {
            I lower[4];
            for (int i = 0; i < 4; ++i) {
                const I upper = shift_right<8>(iadd(all[i], iset(128)));
                lower[i] = isub(all[i], shift_left<8>(upper));
                all[i] = upper;
            }
            store_bytes(to.low + row * to.stride + d, lower);
        }
        store_bytes(high, all);
    }
    *start = -int32_t(uint32_t(isum(total)) << (bits - 1));
    return largest / levels;
}

struct Scales {
    float* scale;   // [64] by token, [padded dim] by page
    float* centre;  // z' of the same
};

KVANT_INLINE void read_scales(const Part& part, const uint8_t* data, int count, const Scales& to) {
    const auto* scale = reinterpret_cast<const uint16_t*>(data + part.scale);
    const auto* zeros = reinterpret_cast<const uint16_t*>(data + part.zero);
    const F half = set(part.family == Family::midpoint ? 0.5f : float(1 << (part.bits - 1)));
    for (int i = 0; i < count; i += kLanes) {
        const F s = load_f16(scale + i);
        store(to.scale + i, s);
        store(to.centre + i,
              part.family == Family::midpoint ? mul(s, half) : fma(s, half, load_f16(zeros + i)));
    }
}

struct Page {
    const Part *k, *v;
    const uint8_t *k_data, *v_data;
    bool fine;
    bool whole;            // all rows of the tile see all of it
    int64_t first;         // position of its first token
    int first_row;         // of its KV head in the tile
};

template <int R, DType kType>
KVANT_INLINE void float_scores(float* scores, const Queries& q, int row, int dim,
                               const uint8_t* keys, float unit, Stream& next) {
    const int words = kType == DType::f32 ? dim : dim / 2;
    for (int block = 0; block < kPageTokens / 16; block += kBlocks) {
        F acc[R][kBlocks];
        fill<R, kBlocks>(acc, zero());
        const uint8_t* from = keys + 64 * words * block;
        if (kDotsBF16 && kType == DType::bf16 && q.pairs)
            multiply_pairs<R, kBlocks>(acc, q.pairs + 2 * row * q.stride, 2 * q.stride, from,
                                       64 * words, words, next);
        else
            multiply<R, kBlocks, kType>(acc, q.vectors + row * q.stride, q.stride, from,
                                        64 * words, words, next, nullptr);
        KVANT_UNROLL
        for (int r = 0; r < R; ++r) {
            KVANT_UNROLL
            for (int n = 0; n < kBlocks; ++n)
                store(scores + kPageTokens * r + 16 * (block + n), mul(acc[r][n], set(unit)));
        }
    }
}

template <int R>
KVANT_INLINE void code_scores(float* scores, const Queries& q, int row, int dim, bool by_page,
                              bool packed, const uint8_t* lines, const Scales& of, Stream& next) {
    const Bytes bytes{q.bytes.high + row * q.bytes.stride,
                      q.bytes.low ? q.bytes.low + row * q.bytes.stride : nullptr, q.bytes.stride};
    for (int block = 0; block < kPageTokens / 16; block += kBlocks) {
        I acc[R][kBlocks];
        if (packed) {
            KVANT_UNROLL
            for (int r = 0; r < R; ++r) {
                KVANT_UNROLL
                for (int n = 0; n < kBlocks; ++n) acc[r][n] = iset(q.start[row + r]);
            }
            multiply_packed<R, kBlocks, Side::k>(acc, bytes.high, bytes.stride,
                                                 lines + 8 * dim * block, 8 * dim, dim / 8, next);
        } else {
            product<R, kBlocks, false, 8>(acc, bytes, q.start + row, lines + 16 * dim * block,
                                          16 * dim, dim / 4, next);
        }
        KVANT_UNROLL
        for (int r = 0; r < R; ++r) {
            const F step = set(q.step[row + r]), sum = set(q.sum[row + r]);
            KVANT_UNROLL
            for (int n = 0; n < kBlocks; ++n) {
                const int token = 16 * (block + n);
                const F score = by_page ? fma(to_float(acc[r][n]), step, sum)
                                        : fma(to_float(acc[r][n]), mul(step, load(of.scale + token)),
                                              mul(sum, load(of.centre + token)));
                store(scores + kPageTokens * r + token, score);
            }
        }
    }
}

// cap * tanh(x), with x the score divided by cap; in units of log2.
KVANT_INLINE F capped(F x, float cap) {
    const F grown = exp2_minus_1(mul(min(set(15.0f), abs(x)), set(2 * kLog2E)));
    const F tanh = div(grown, add(grown, set(2.0f)));
    return mul(select(less(x, zero()), sub(zero(), tanh), tanh), set(cap * kLog2E));
}

// ------------------------------------------------------------------------------------------------
// Softmax over one page.

// What a row's softmax over one page gives besides P.
struct Weights {
    float most;      // the largest score
    float sum;       // of P
    float step;      // of an integer of P s
    float offset;    // sum of P z'
    int32_t start;   // as of Queries
};

KVANT_INLINE float sum4(const F (&x)[4]) { return sum(add(add(x[0], x[1]), add(x[2], x[3]))); }
KVANT_INLINE float highest4(const F (&x)[4]) {
    return highest(max(max(x[0], x[1]), max(x[2], x[3])));
}

// P in place of scores [64] of one row, of tokens whose bits are set in `seen` (not none).
// `rough` is enough where P is rounded to integers.
KVANT_INLINE void softmax(float* scores, uint64_t seen, float softcap, bool rough, F (&p)[4],
                          Weights& out, Stream& next) {
    for (int i = 0; i < 4; ++i) {
        next.pull();
        p[i] = load(scores + 16 * i);
        if (softcap > 0) p[i] = capped(p[i], softcap);
        if (~seen) p[i] = select(mask_of(seen >> 16 * i & 0xffff), p[i], set(kLowest));
    }
    out.most = highest4(p);
    const F most = set(out.most);
    if (rough)
        for (F& each : p) each = rough_exp2(sub(each, most));
    else
        for (F& each : p) each = exp2(sub(each, most));
    if (~seen)
        for (int i = 0; i < 4; ++i)
            p[i] = select(mask_of(seen >> 16 * i & 0xffff), p[i], zero());
    out.sum = sum4(p);
}

// P times scales as integers, in the byte order of V's words; sums that belong to them.
KVANT_INLINE void round_weights(const F (&p)[4], uint64_t seen, const Part& v, const Scales& of,
                                uint8_t* high, uint8_t* low, Weights& out, Stream& next) {
    const float levels = low ? 16383.0f : 255.0f;
    float most = 1;  // of P
    F w[4];
    if (v.by_page) {
        for (int i = 0; i < 4; ++i) w[i] = p[i];
        out.offset = out.sum;
    } else {
        F z[4];
        for (int i = 0; i < 4; ++i) {
            w[i] = mul(p[i], load(of.scale + 16 * i));
            z[i] = mul(p[i], load(of.centre + 16 * i));
            if (~seen) {  // slots that nobody wrote may hold NaN
                const M here = mask_of(seen >> 16 * i & 0xffff);
                w[i] = select(here, w[i], zero());
                z[i] = select(here, z[i], zero());
            }
        }
        out.offset = sum4(z);
        most = highest4(w);
    }
    // (The page's largest scale would do as a grid for all rows, and is faster, but coarser: the
    // KL divergence of k8v4 grew by 9 % where this one adds 3 %.)
    const F inverse = set(most > 1e-30f ? levels / most : 0.0f);
    out.step = most / levels;
    I all[4];
    for (int i = 0; i < 4; ++i) {
        next.pull();
        all[i] = to_int(mul(w[i], inverse));
    }
    const I total = iadd(iadd(all[0], all[1]), iadd(all[2], all[3]));
    out.start = -int32_t(uint32_t(isum(total)) << (v.bits - 1));
    if (low) {
        const I lower[4] = {iand(all[0], iset(127)), iand(all[1], iset(127)),
                            iand(all[2], iset(127)), iand(all[3], iset(127))};
        store_tokens(low, lower);
        for (I& each : all) each = shift_right<7>(each);
    }
    store_tokens(high, all);
}

// ------------------------------------------------------------------------------------------------
// Running results (m, l, O) of rows, and their merging.

struct State {
    float* most;  // [rows]
    float* sum;   // [rows]
    float* out;   // [rows][padded dim]
};

KVANT_INLINE void clear(const State& state, int rows, int dim) {
    for (int r = 0; r < rows; ++r) state.most[r] = kLowest, state.sum[r] = 0;
    std::memset(state.out, 0, sizeof(float) * rows * padded(dim));
}

// Factors of what was there and of what comes.
struct Factors {
    float old_part[kLanes], new_part[kLanes];
};

// Take maxima and sums of up to 16 rows into the state; arrays have room for 16.
KVANT_INLINE void advance(float* most, float* sums, F new_most, F new_sums, int rows,
                          Factors& by) {
    const F before = load(most), next = max(before, new_most);
    const F old_part = exp2(sub(before, next)), new_part = exp2(sub(new_most, next));
    const F sum = load(sums);
    const M here = first_lanes(rows);
    store(most, select(here, next, before));
    store(sums, select(here, fma(sum, old_part, mul(new_sums, new_part)), sum));
    store(by.old_part, old_part);
    store(by.new_part, new_part);
}

// Merge what later pages gave into `state`.
static void merge(const State& state, const State& later, int rows, int dim) {
    for (int first = 0; first < rows; first += kLanes) {
        const int count = rows - first < kLanes ? rows - first : kLanes;
        Factors by;
        advance(state.most + first, state.sum + first, load(later.most + first),
                load(later.sum + first), count, by);
        for (int r = 0; r < count; ++r) {
            float* out = state.out + (first + r) * padded(dim);
            const float* more = later.out + (first + r) * padded(dim);
            for (int d = 0; d < dim; d += kLanes)
                store(out + d, fma(load(out + d), set(by.old_part[r]),
                                   mul(load(more + d), set(by.new_part[r]))));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Outputs of one page.

// out [R][padded dim] = out * old + P V * new, with V as codes. Block n of the results is of
// dimensions `first + 16 n`, from `half` on of `second + 16 (n - half)`.
template <int R, int NB>
KVANT_INLINE void merge_codes(float* out, int dim, int first, int half, int second, const Part& v,
                              const I (&acc)[R][NB], const Weights* of, const Scales& scales,
                              const Factors& by) {
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        if (of[r].sum == 0) continue;  // it sees nothing here, so that not even NaN may reach it
        const F old_part = set(by.old_part[r]), step = set(of[r].step * by.new_part[r]),
                offset = set(of[r].offset * by.new_part[r]);
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) {
            const int d = n < half ? first + 16 * n : second + 16 * (n - half);
            const F more =
                v.by_page ? fma(to_float(acc[r][n]), mul(step, load(scales.scale + d)),
                                mul(offset, load(scales.centre + d)))
                          : fma(to_float(acc[r][n]), step, offset);
            float* at = out + r * padded(dim) + d;
            store(at, fma(load(at), old_part, more));
        }
    }
}

template <int R, int NB>
KVANT_INLINE void code_outputs(float* out, int dim, int block, const Part& v, const uint8_t* lines,
                               const Bytes& p, const Weights* of, const int32_t* start,
                               const Scales& scales, const Factors& by, Stream& next) {
    I acc[R][NB];
    const uint8_t* from = lines + 1024 * block;
    if (p.low)
        product<R, NB, false, 7>(acc, p, start, from, 1024, 16, next);
    else
        product<R, NB, true, 0>(acc, p, start, from, 1024, 16, next);
    merge_codes<R, NB>(out, dim, 16 * block, NB, 0, v, acc, of, scales, by);
}

// The same with NB blocks of lines with two fields of 4 bits.
template <int R, int NB>
KVANT_INLINE void packed_outputs(float* out, int dim, int block, const Part& v,
                                 const uint8_t* lines, const Bytes& p, const Weights* of,
                                 const int32_t* start, const Scales& scales, const Factors& by,
                                 Stream& next) {
    I acc[R][2 * NB];
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        KVANT_UNROLL
        for (int n = 0; n < 2 * NB; ++n) acc[r][n] = iset(start[r]);
    }
    multiply_packed<R, NB, Side::v>(acc, p.high, p.stride, lines + 1024 * block, 1024, 16, next);
    merge_codes<R, 2 * NB>(out, dim, 16 * block, NB, 16 * block + dim / 2, v, acc, of, scales, by);
}

template <int R, int NB, DType kType>
KVANT_INLINE void float_outputs(float* out, int dim, int block, const uint8_t* lines,
                                const float* p, const Factors& by, Stream& next,
                                const int32_t* keep) {
    constexpr int kWords = kType == DType::f32 ? 64 : 32;
    F acc[R][NB];
    fill<R, NB>(acc, zero());
    multiply<R, NB, kType>(acc, p, kPageTokens, lines + 64 * kWords * block, 64 * kWords, kWords,
                           next, keep);
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        KVANT_UNROLL
        for (int n = 0; n < NB; ++n) {
            float* at = out + r * padded(dim) + 16 * (block + n);
            store(at, fma(load(at), set(by.old_part[r]), mul(acc[r][n], set(by.new_part[r]))));
        }
    }
}

// Run `body` with NB = kBlocks as long as so many blocks are left, then with the rest.
template <int NB = kBlocks, typename Body>
KVANT_INLINE void by_blocks(int first, int count, Body body) {
    for (; first + NB <= count; first += NB) body.template operator()<NB>(first);
    if constexpr (NB > 1)
        if (first < count) by_blocks<NB - 1>(first, count, body);
}

// ------------------------------------------------------------------------------------------------
// A tile at work.

struct Arena {  // scratch memory, handed out in lines of 64 bytes; a null base only counts
    uint8_t* base;
    size_t used = 0;
    template <typename T> T* take(size_t count) {
        auto* out = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return out;
    }
};

struct Work {
    const AttendCall& call;
    int dim, rows, share;  // rows of all KV heads of the tile; query heads of a KV head
    float unit;            // scores are multiplied by it
    Queries base, fine;
    State split, total;
    uint8_t *k_lines, *v_lines;
    Scales k_scales, v_scales;
    float* scores;         // [kRows][64], then P
    Bytes weights;         // [kRows][64]
    float* turned;         // [kRows][padded dim]
    float* row;            // [head_dim]

    Work(const AttendCall& call_, int rows_, Arena& arena)
        : call(call_), dim(call_.store->head_dim), rows(rows_),
          share(call_.heads / call_.store->kv_heads),
          unit(call_.softcap > 0 ? call_.scale / call_.softcap : call_.scale * kLog2E) {
        const int padded_dim = padded(dim);
        const auto queries = [&](const Part& part) {
            Queries q{};
            q.stride = q.bytes.stride = (dim + 63) / 64 * 64;
            q.vectors = arena.take<float>(rows * q.stride);
            const bool pairs = part.family == Family::plain && part.dtype == DType::bf16 &&
                               call.q.type == DType::bf16;
            q.pairs = kDotsBF16 && pairs ? arena.take<uint8_t>(rows * q.stride * 2) : nullptr;
            q.bytes.high = arena.take<uint8_t>(rows * q.bytes.stride);
            q.bytes.low = wide(part) ? arena.take<uint8_t>(rows * q.bytes.stride) : nullptr;
            q.step = arena.take<float>(rows);
            q.sum = arena.take<float>(rows);
            q.start = arena.take<int32_t>(rows);
            return q;
        };
        const auto state = [&] {
            return State{arena.take<float>(rows + kLanes), arena.take<float>(rows + kLanes),
                         arena.take<float>(rows * padded_dim)};
        };
        base = queries(call.base.k);
        fine = queries(call.fine.k);
        split = state();
        total = state();
        k_lines = arena.take<uint8_t>(4 * kPageTokens * padded_dim);
        v_lines = arena.take<uint8_t>(4 * kPageTokens * padded_dim);
        const int most = padded_dim > kPageTokens ? padded_dim : kPageTokens;
        k_scales = {arena.take<float>(most), arena.take<float>(most)};
        v_scales = {arena.take<float>(most), arena.take<float>(most)};
        scores = arena.take<float>(kRows * kPageTokens);
        weights = {arena.take<uint8_t>(kRows * kPageTokens),
                   arena.take<uint8_t>(kRows * kPageTokens), kPageTokens};
        turned = arena.take<float>(kRows * padded_dim);
        row = arena.take<float>(kMaxHeadDim);
    }
};

// Rows are ordered by KV head, position, query head.
struct Row {
    int64_t position;
    int head;
};
KVANT_INLINE Row row_of(const Work& work, const Tile& tile, int row) {
    const int in_order = row / work.share;
    return {tile.first + in_order % tile.count,
            (tile.kv_head + in_order / tile.count) * work.share + row % work.share};
}

// The queries of a tile for keys of one format.
static void prepare(const Work& work, const Queries& q, const Part& part, const Sequence& seq,
                    const Tile& tile) {
    const int padded_dim = padded(work.dim);
    for (int r = 0; r < work.rows; ++r) {
        float* x = q.vectors + r * q.stride;
        const Row at = row_of(work, tile, r);
        read_row(work.call.q, seq.row + at.position - seq.start, at.head, work.dim, x);
        for (int d = padded_dim; d < q.stride; d += kLanes) store(x + d, zero());
        if (q.pairs)
            std::memcpy(q.pairs + 2 * r * q.stride,
                        address(work.call.q, seq.row + at.position - seq.start, at.head),
                        2 * work.dim);
        if (part.rotated) rotate(x, work.dim, work.call.store->signs);
        if (!coded(part) || part.by_page) continue;
        F total = zero(), most = zero();
        for (int d = 0; d < padded_dim; d += kLanes) {
            const F each = load(x + d);
            total = add(total, each);
            most = max(abs(each), most);
        }
        q.sum[r] = sum(total) * work.unit;
        q.step[r] = work.unit * round_query(x, highest(most), padded_dim, part.bits, q.bytes, r,
                                            q.start + r);
    }
}

// The queries of some rows for one page with scales by channel: these go into the queries.
static void prepare_for_page(const Work& work, const Queries& q, const Part& part, int first,
                             int count) {
    const int padded_dim = padded(work.dim);
    for (int r = first; r < first + count; ++r) {
        const float* x = q.vectors + r * q.stride;
        F total = zero(), most = zero();
        for (int d = 0; d < padded_dim; d += kLanes) {
            const F each = load(x + d), scaled = mul(each, load(work.k_scales.scale + d));
            total = fma(each, load(work.k_scales.centre + d), total);
            most = max(abs(scaled), most);
            store(work.row + d, scaled);
        }
        for (int d = padded_dim; d < q.stride; d += kLanes) store(work.row + d, zero());
        q.sum[r] = sum(total) * work.unit;
        q.step[r] = work.unit * round_query(work.row, highest(most), padded_dim, part.bits, q.bytes,
                                            r, q.start + r);
    }
}

// Which tokens of a page a position sees.
KVANT_INLINE uint64_t seen_by(int64_t position, int64_t first, int64_t window) {
    const int64_t last = position - first;  // the last one, counted in the page
    uint64_t seen = last >= kPageTokens - 1 ? ~0ull : (2ull << last) - 1;
    if (window && last >= window) {
        const int64_t gone = last - window + 1;
        seen = gone >= kPageTokens ? 0 : seen & ~0ull << gone;
    }
    return seen;
}

// Masks of the words of floats of V: values of tokens that are not seen count as 0.
KVANT_INLINE void word_masks(uint64_t seen, bool two, int32_t* keep) {
    for (int t = 0; t < kPageTokens; ++t) {
        const bool here = seen >> t & 1;
        if (!two)
            keep[t] = here ? -1 : 0;
        else
            keep[t / 2] = (t % 2 ? keep[t / 2] : 0) | (here ? (t % 2 ? int32_t(0xffff0000) : 0xffff) : 0);
    }
}

// The codes or numbers of a part: lines of 64 bytes, of codes in one byte each or `packed`, two of 4
// bits in each byte as they are stored.
struct Opened {
    const uint8_t* lines;
    bool packed;
};

template <int R>
static void attend_rows(const Work& work, int first, const Page& page, const Tile& tile,
                        const Opened& keys, const Opened& values, Stream& next) {
    const Queries& q = page.fine ? work.fine : work.base;
    const int dim = work.dim, padded_dim = padded(dim);
    const Part &k = *page.k, &v = *page.v;
    uint64_t seen[R], everywhere = ~0ull;
    for (int r = 0; r < R; ++r) {
        seen[r] = page.whole ? ~0ull
                             : seen_by(row_of(work, tile, first + r).position, page.first,
                                       work.call.window);
        everywhere &= seen[r];
    }

    if (coded(k)) {
        if (k.by_page) prepare_for_page(work, q, k, first, R);
        code_scores<R>(work.scores, q, first, dim, k.by_page, keys.packed, keys.lines,
                       work.k_scales, next);
    } else if (k.dtype == DType::bf16) {
        float_scores<R, DType::bf16>(work.scores, q, first, dim, keys.lines,
                                     work.unit, next);
    } else if (k.dtype == DType::f16) {
        float_scores<R, DType::f16>(work.scores, q, first, dim, keys.lines,
                                    work.unit, next);
    } else {
        float_scores<R, DType::f32>(work.scores, q, first, dim, keys.lines,
                                    work.unit, next);
    }

    const bool codes = coded(v);
    const Bytes bytes{work.weights.high, wide(v) ? work.weights.low : nullptr, kPageTokens};
    Weights of[R] = {};
    F most = zero(), sums = zero();  // lanes are rows
    int32_t start[R];
    KVANT_UNROLL
    for (int r = 0; r < R; ++r) {
        float* scores = work.scores + kPageTokens * r;
        uint8_t* high = bytes.high + kPageTokens * r;
        uint8_t* low = bytes.low ? bytes.low + kPageTokens * r : nullptr;
        if (seen[r]) {
            F p[4];
            softmax(scores, seen[r], work.call.softcap, codes, p, of[r], next);
            if (codes) {
                round_weights(p, seen[r], v, work.v_scales, high, low, of[r], next);
            } else {
                for (int i = 0; i < 4; ++i) store(scores + 16 * i, p[i]);
            }
        } else {
            of[r] = {kLowest, 0, 0, 0, 0};
            std::memset(scores, 0, sizeof(float) * kPageTokens);
            std::memset(high, 0, kPageTokens);
            if (low) std::memset(low, 0, kPageTokens);
        }
        most = select(mask_of(1u << r), set(of[r].most), most);
        sums = select(mask_of(1u << r), set(of[r].sum), sums);
        start[r] = of[r].start;
    }

    Factors by;
    advance(work.split.most + first, work.split.sum + first, most, sums, R, by);
    float* out = work.split.out + first * padded_dim;
    float* to = out;
    const bool turn = v.rotated != work.call.base.v.rotated;
    Factors alone = by;
    if (turn) {  // to the domain of the base format, in which all is summed
        to = work.turned;
        std::memset(to, 0, sizeof(float) * R * padded_dim);
        std::memset(alone.old_part, 0, sizeof alone.old_part);
    }

    const int blocks = padded_dim / 16;
    if (codes && values.packed) {
        constexpr int kHalf = kBlocks > 1 ? kBlocks / 2 : 1;
        by_blocks<kHalf>(0, blocks / 2, [&]<int NB>(int block) __attribute__((always_inline)) {
            packed_outputs<R, NB>(to, dim, block, v, values.lines, bytes, of, start, work.v_scales,
                                  alone, next);
        });
    } else if (codes) {
        by_blocks(0, blocks, [&]<int NB>(int block) __attribute__((always_inline)) {
            code_outputs<R, NB>(to, dim, block, v, values.lines, bytes, of, start, work.v_scales, alone,
                                next);
        });
    } else {
        const auto floats = [&]<int Rows, DType kType>(int row, const int32_t* keep)
            __attribute__((always_inline)) {
            Factors those;
            for (int r = 0; r < Rows; ++r) {
                those.old_part[r] = alone.old_part[row + r];
                those.new_part[r] = alone.new_part[row + r];
            }
            by_blocks(0, blocks, [&]<int NB>(int block) __attribute__((always_inline)) {
                float_outputs<Rows, NB, kType>(to + row * padded_dim, dim, block, values.lines,
                                               work.scores + row * kPageTokens, those, next, keep);
            });
        };
        const auto all = [&]<DType kType>() __attribute__((always_inline)) {
            if (!~everywhere) return floats.template operator()<R, kType>(0, nullptr);
            for (int r = 0; r < R; ++r) {
                int32_t keep[kPageTokens];
                word_masks(seen[r], kType != DType::f32, keep);
                floats.template operator()<1, kType>(r, keep);
            }
        };
        if (v.dtype == DType::bf16)
            all.template operator()<DType::bf16>();
        else if (v.dtype == DType::f16)
            all.template operator()<DType::f16>();
        else
            all.template operator()<DType::f32>();
    }

    if (turn)
        for (int r = 0; r < R; ++r) {
            float* more = to + r * padded_dim;
            if (v.rotated)
                unrotate(more, dim, work.call.store->signs);
            else
                rotate(more, dim, work.call.store->signs);
            for (int d = 0; d < padded_dim; d += kLanes)
                store(out + r * padded_dim + d,
                      fma(load(out + r * padded_dim + d), set(by.old_part[r]), load(more + d)));
        }
}

template <int R = kRows, typename... Rest>
static void attend_blocks(const Work& work, int first, int end, Rest&... rest) {
    for (; first + R <= end; first += R) attend_rows<R>(work, first, rest...);
    if constexpr (R > 1)
        if (first < end) attend_blocks<R - 1>(work, first, end, rest...);
}

// How often `attend_page` pulls at its stream.
static int pulls(const Part& k, const Part& v, int dim, int rows) {
    const auto words = [](const Part& part, int length) {
        if (coded(part)) return length / 4 * (wide(part) ? 2 : 1);
        return part.dtype == DType::f32 ? length : length / 2;
    };
    const int key_words = words(k, dim) / (k.bits == 4 && rows <= kRows ? 2 : 1);
    const auto unpacked = [&](const Part& part) {
        const bool at_once = part.bits == 8 || (part.bits == 4 && rows <= kRows);
        const bool as_stored = coded(part) ? at_once : part.family == Family::plain;
        return as_stored ? 0 : dim * part.bits / 8;
    };
    const int row_blocks = (rows + kRows - 1) / kRows;
    const int columns = (padded(dim) / 16 + kBlocks - 1) / kBlocks;
    return row_blocks * (key_words * (4 / kBlocks) + words(v, kPageTokens) * columns) +
           8 * rows + unpacked(k) + unpacked(v);
}

// Codes that many rows need, or that cannot be taken from where they are, are unpacked first, and
// numbers of 8 bits.
static Opened open(const Part& part, Side side, const uint8_t* data, uint8_t* lines, int dim,
                   int rows, Stream& next) {
    const bool whole_blocks = side == Side::k || dim % 16 == 0;
    if (part.family == Family::plain) {
        if (whole_blocks) return {data, false};
        widen_blocks(data, lines, dim, part.dtype == DType::f32 ? 64 : 32, next);
    } else if (part.family == Family::float8) {
        if (side == Side::k)
            open_float8_keys(part, data, lines, dim, next);
        else if (whole_blocks)
            open_float8_values<16>(part, data, lines, dim, next);
        else
            open_float8_values<8>(part, data, lines, dim, next);
    } else {
        if (part.bits == 8 && whole_blocks) return {data + part.codes[0], false};
        if (part.bits == 4 && rows <= kRows && dim % (side == Side::k ? 8 : 32) == 0)
            return {data + part.codes[0], true};
        unpack(part, side, data, lines, dim, next);
    }
    return {lines, false};
}

// The rows of one KV head against its page.
static void attend_page(const Work& work, const Page& page, const Tile& tile, const Page* after) {
    const Part &k = *page.k, &v = *page.v;
    const int dim = work.dim, rows = tile.count * work.share;
    Stream next{};
    if (after) {
        const int bytes = after->k->nbytes + after->v->nbytes;
        const int step = bytes / pulls(k, v, dim, rows);
        next = {after->k_data, after->k_data + bytes, (step + 63) / 64 * 64};
    }
    if (coded(k))
        read_scales(k, page.k_data, k.by_page ? dim : kPageTokens, work.k_scales);
    if (coded(v))
        read_scales(v, page.v_data, v.by_page ? dim : kPageTokens, work.v_scales);
    const Opened keys = open(k, Side::k, page.k_data, work.k_lines, dim, rows, next);
    const Opened values = open(v, Side::v, page.v_data, work.v_lines, dim, rows, next);
    attend_blocks(work, page.first_row, page.first_row + rows, page, tile, keys, values, next);
}

// ------------------------------------------------------------------------------------------------
// Work items: some splits of a tile.

static Page page_of(const Work& work, const Sequence& seq, const Tile& tile, int64_t group,
                    int head) {
    const AttendCall& call = work.call;
    const Store& store = *call.store;
    const int64_t own = tile.first / kPageTokens;
    const Layer* layer = &call.base;
    const Pool* pool = &store.base;
    int64_t number;
    bool fine = false;
    if (store.has_recent && (group == own || group < store.num_sink)) {
        fine = true;
        layer = &call.fine;
        pool = &store.recent;
        number = group == own ? seq.fine_pages[group - seq.start / kPageTokens] : seq.pages[group];
        if (number >= store.num_recent) {
            number -= store.num_recent;
            layer = &call.scratch;
            pool = &store.scratch;
        }
    } else {
        number = seq.pages[group];
    }
    const uint8_t* data = pool->data + number * pool->page_bytes + layer->offset +
                          int64_t(tile.kv_head + head) * (layer->k.nbytes + layer->v.nbytes);
    const int64_t first = group * kPageTokens, last_row = tile.first + tile.count - 1;
    const bool whole = group < own && (!call.window || last_row - first < call.window);
    return {&layer->k, &layer->v, data,  data + layer->k.nbytes,
            fine,      whole,     first, head * tile.count * work.share};
}

// What rows of a tile get from the pages of a split.
static void attend_split(const Work& work, const Sequence& seq, const Tile& tile, int64_t split) {
    clear(work.split, work.rows, work.dim);
    const int64_t own = tile.first / kPageTokens;
    int64_t group = first_group(tile, work.call.window);
    if (group < split * kSplitPages) group = split * kSplitPages;
    int64_t end = (split + 1) * kSplitPages;
    if (end > own + 1) end = own + 1;
    // Head after head, as they lie in memory, and what comes next is fetched meanwhile.
    Page page = page_of(work, seq, tile, group, 0);
    for (; group < end; ++group)
        for (int head = 0; head < tile.heads; ++head) {
            const bool last = head + 1 == tile.heads;
            if (last && group == own) return attend_page(work, page, tile, nullptr);
            const Page after = last ? page_of(work, seq, tile, group + 1, 0)
                                    : page_of(work, seq, tile, group, head + 1);
            attend_page(work, page, tile, &after);
            page = after;
        }
}

// The output of a tile from all that its rows saw.
static void finish(const Work& work, const Sequence& seq, const Tile& tile, const State& state) {
    const int padded_dim = padded(work.dim);
    for (int r = 0; r < work.rows; ++r) {
        float* out = state.out + r * padded_dim;
        const Row at = row_of(work, tile, r);
        float total = state.sum[r], factor = 1;
        if (work.call.sinks) {  // one more entry of the softmax, without a value
            const F sink = set(work.call.sinks[at.head] * kLog2E), most = set(state.most[r]);
            const F next = max(most, sink);
            factor = highest(exp2(sub(most, next)));
            total = total * factor + highest(exp2(sub(sink, next)));
        }
        for (int d = 0; d < padded_dim; d += kLanes)
            store(out + d, div(mul(load(out + d), set(factor)), set(total)));
        if (work.call.base.v.rotated) unrotate(out, work.dim, work.call.store->signs);
        write_row(work.call.out, seq.row + at.position - seq.start, at.head, work.dim, out);
    }
}

static void start(const Work& work, const Sequence& seq, const Tile& tile) {
    prepare(work, work.base, work.call.base.k, seq, tile);
    if (work.call.store->has_recent) prepare(work, work.fine, work.call.fine.k, seq, tile);
}

static State partial_of(const Work& work, float* partials, int64_t split) {
    float* at = partials + split * partial_floats(work.rows, work.dim);
    return {at, at + work.rows + kLanes, at + 2 * (work.rows + kLanes)};
}

// The splits [begin, end) of a tile. With `partials` each one's result goes there, at its number
// less that of the tile's first split; without, they are all splits and the output is made.
static void attend_item(const AttendCall& call, const Sequence& seq, const Tile& tile,
                        int64_t begin, int64_t end, float* partials, uint8_t* scratch) {
    Arena arena{scratch};
    Work work(call, tile.heads * tile.count * (call.heads / call.store->kv_heads), arena);
    start(work, seq, tile);
    const int64_t first = first_group(tile, call.window) / kSplitPages;
    if (!partials) clear(work.total, work.rows, work.dim);
    for (int64_t split = begin; split < end; ++split) {
        if (partials) work.split = partial_of(work, partials, split - first);
        attend_split(work, seq, tile, split);
        if (!partials) merge(work.total, work.split, work.rows, work.dim);
    }
    if (!partials) finish(work, seq, tile, work.total);
}

// The output of a tile from the results of its `count` splits.
static void finish_tile(const AttendCall& call, const Sequence& seq, const Tile& tile,
                        int64_t count, float* partials, uint8_t* scratch) {
    Arena arena{scratch};
    Work work(call, tile.heads * tile.count * (call.heads / call.store->kv_heads), arena);
    clear(work.total, work.rows, work.dim);
    for (int64_t split = 0; split < count; ++split)
        merge(work.total, partial_of(work, partials, split), work.rows, work.dim);
    finish(work, seq, tile, work.total);
}

// Bytes of scratch memory for tiles of so many rows.
static size_t attend_scratch(const AttendCall& call, int rows) {
    Arena arena{nullptr};
    const Work work(call, rows, arena);
    return arena.used;
}

}  // namespace
