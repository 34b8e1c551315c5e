// What the kernels of all instruction sets share: plain data, and the table of their entry points.
//
// Only declarations and aggregates: nothing here may become a function that several objects define
// (simd.hpp says why).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvant {

constexpr int kPageTokens = 64;
constexpr int kMaxHeadDim = 256;

enum class Family : int32_t { plain, affine, midpoint, float8 };
enum class DType : int32_t { f32, f16, bf16 };
enum class Side : int32_t { k, v };

// How keys or values of one layer are stored: a KVFormat (formats/base.py) at one head_dim.
// Offsets are in bytes from the beginning of the part.
struct Part {
    Family family;
    DType dtype;      // of family plain; f32 of float8, which is computed so
    int32_t bits;     // of a code
    bool rotated;
    bool by_page;     // scales and zeros by channel of a page, not by token
    int32_t nbytes;   // of the part: 64 tokens of one KV head
    int32_t scale;    // the planes `scale` (but of plain), `zero` (affine)
    int32_t zero;
    int32_t codes[2];   // planes of codes, lowest bits first; packing.py has their layout
    int32_t widths[2];  // bits of a field; 0 if there is no second plane
};

// One layer in the pages of one pool. A page holds [KV head][K part, V part] at `offset`.
struct Layer {
    int64_t offset;
    Part k, v;
};

struct Pool {
    uint8_t* data;
    int64_t page_bytes;
};

// Rows of a batch that are consecutive positions [start, end) of one sequence; see BatchSequence in
// kernels/backend.py for the tables.
struct Sequence {
    int64_t row, start, end;
    const int64_t* pages;
    const int64_t* fine_pages;
};

// [rows, heads, head_dim] in memory; strides in elements, the last dimension is dense.
struct Tensor {
    void* data;
    DType type;
    int64_t row_stride, head_stride;
};

// The memory of a KV cache and the shape of what it holds.
struct Store {
    Pool base, recent, scratch;
    int64_t num_recent;
    bool has_recent;
    int64_t num_sink;  // 0 or 1 groups that all queries see in the fine format
    int32_t kv_heads, head_dim;
    const float* signs;  // [head_dim], of the rotation (hadamard.py)
};

struct WriteCall {
    const Store* store;
    Layer base, fine, scratch;  // of one layer; `scratch` is `fine` in a page of its own
    Tensor k, v;
};

struct AttendCall {
    const Store* store;
    Layer base, fine, scratch;
    Tensor q, out;
    int32_t heads;
    float scale;
    int64_t window;      // 0: none
    float softcap;       // 0: none
    const float* sinks;  // [heads] logits, or null
};

// Positions [first, first + count) of a sequence, all of one group, with the query heads of KV heads
// [kv_head, kv_head + heads).
struct Tile {
    int32_t sequence, kv_head, heads, count;
    int64_t first;
};

constexpr int kTileRows = 64;   // positions times query heads of a tile, unless it has one of either
constexpr int kSplitPages = 8;  // pages whose results are merged before they meet others

// The first group that a tile sees.
static constexpr int64_t first_group(const Tile& tile, int64_t window) {
    return window && tile.first >= window ? (tile.first - window + 1) / kPageTokens : 0;
}

// Floats of the result of one split: (m, l, O) of all rows.
static constexpr size_t partial_floats(int rows, int head_dim) {
    return size_t(rows) * ((head_dim + 15) / 16 * 16) + 2 * (rows + 16);
}

enum class WeightKind : int32_t { f32, f16, bf16, codes8, codes4 };

// Weights of a linear layer; linear.hpp has their layout.
struct LinearWeights {
    WeightKind kind;
    bool gated;    // of each pair of blocks the first is the gate of the second
    bool offsets;  // groups of codes have offsets beside their scales
    int32_t inputs, outputs;  // outputs after gating
    int32_t groups, group_words;
    int32_t rotation;  // inputs of a block that is rotated before codes are multiplied; 0: none
    const float* signs;  // [inputs], of the rotation
    int64_t pairs, pair_bytes;
    const uint8_t* lines;
    const float* factors;  // [32 pairs], of codes
    const float* bias;     // [32 pairs] or null
};

// out = f(x) W^T + bias, or that added to `out`; f is the RMS norm if there is one.
struct LinearCall {
    const LinearWeights* weights;
    Tensor x, out;
    const float* norm;  // [inputs] or null
    float eps;
    bool add;
};

struct Kernels {
    const char* isa;
    // Encode what the rows of one sequence bring to one KV head and one group of 64 positions.
    void (*write_group)(const WriteCall&, const Sequence&, int kv_head, int64_t group,
                        uint8_t* scratch);
    size_t (*write_scratch)(int head_dim);
    // Attend the splits [begin, end) of a tile; attend.hpp has the meaning of `partials`.
    void (*attend_item)(const AttendCall&, const Sequence&, const Tile&, int64_t begin, int64_t end,
                        float* partials, uint8_t* scratch);
    void (*finish_tile)(const AttendCall&, const Sequence&, const Tile&, int64_t count,
                        float* partials, uint8_t* scratch);
    size_t (*attend_scratch)(const AttendCall&, int rows);
    // A linear layer, for rows [row, row + rows): each is prepared, [begin, end) of them in a call;
    // then they are multiplied with any pairs of blocks [begin, end).
    size_t (*prepared_bytes)(const LinearWeights&, int rows);
    size_t (*prepare_scratch)(const LinearWeights&);
    void (*prepare_rows)(const LinearCall&, int64_t row, int rows, int begin, int end,
                         uint8_t* prepared, uint8_t* scratch);
    void (*multiply_rows)(const LinearCall&, int64_t row, int rows, int begin, int end,
                          uint8_t* prepared);
    // One head of one row.
    void (*rope)(const Tensor& x, const float* cos, const float* sin, const Tensor& out,
                 int64_t row, int head, int half);
};

// Those that this build has.
#if defined(KVANT_X86)
extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512bf16;
#endif
extern const Kernels kernels_scalar;

}  // namespace kvant
