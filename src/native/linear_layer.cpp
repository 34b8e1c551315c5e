#include "linear_layer.hpp"

#include <algorithm>

#include "scratch.hpp"
#include "threads.hpp"

namespace kvant {

namespace {

constexpr int64_t kTiledRows = 12;       // a multiple of the rows of any tile (linear.hpp)
constexpr int64_t kBlockRows = 48;       // whole tiles that stay in a cache beside weights
constexpr int64_t kPreparedRows = 4;     // that a thread prepares at a time
constexpr int64_t kItemsPerThread = 16;  // so that a thread that is held up leaves its work to others

// In units of Division::cost (2 ns): a stream of 16 bytes each, or 200 products each.
int64_t multiply_cost(const LinearWeights& w, int64_t rows) {
    const int64_t bytes = w.pairs * w.pair_bytes;
    return bytes / 32 + rows * w.inputs * w.pairs * 32 / 400;
}
int64_t prepare_cost(const LinearWeights& w, int64_t rows) { return rows * w.inputs / 4; }

thread_local Scratch scratch;

size_t in_lines(size_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace

void LinearLayer::forward(const Tensor& x, const Tensor& out, int64_t rows, const float* norm,
                          float eps, bool add) const {
    const LinearCall call{&weights_, x, out, norm, eps, add};
    if (rows >= 4 * kBlockRows * threads_) {
        by_rows(call, rows);
    } else {
        by_outputs(call, static_cast<int>(rows));
    }
}

void LinearLayer::by_rows(const LinearCall& call, int64_t rows) const {
    const LinearWeights& w = weights_;
    // As many blocks for each thread, of whole tiles but for the last.
    const int64_t tiles = (rows + kTiledRows - 1) / kTiledRows;
    const int64_t blocks = ((rows + kBlockRows - 1) / kBlockRows + threads_ - 1) / threads_ * threads_;
    const auto first_row = [&](int64_t block) {
        return std::min(rows, tiles * block / blocks * kTiledRows);
    };
    const size_t prepared = in_lines(kernels_->prepared_bytes(w, kBlockRows));
    const size_t each = prepared + in_lines(kernels_->prepare_scratch(w));
    uint8_t* memory = scratch.reserve(threads_ * each);
    parallel(blocks, threads_, [&](int64_t block, int thread) {
        const int64_t row = first_row(block);
        const int count = static_cast<int>(first_row(block + 1) - row);
        uint8_t* mine = memory + thread * each;
        kernels_->prepare_rows(call, row, count, 0, count, mine, mine + prepared);
        kernels_->multiply_rows(call, row, count, 0, static_cast<int>(w.pairs), mine);
    });
}

void LinearLayer::by_outputs(const LinearCall& call, int rows) const {
    const LinearWeights& w = weights_;
    const size_t prepared = in_lines(kernels_->prepared_bytes(w, rows));
    const size_t each = in_lines(kernels_->prepare_scratch(w));
    uint8_t* memory = scratch.reserve(prepared + threads_ * each);
    const int64_t pieces = (rows + kPreparedRows - 1) / kPreparedRows;
    parallel(pieces, useful_threads(pieces, prepare_cost(w, rows), threads_),
             [&](int64_t piece, int thread) {
                 const int begin = static_cast<int>(piece * kPreparedRows);
                 const int end = std::min<int>(rows, begin + kPreparedRows);
                 kernels_->prepare_rows(call, 0, rows, begin, end, memory,
                                        memory + prepared + thread * each);
             });
    const int64_t parts = std::min<int64_t>(w.pairs, threads_ * kItemsPerThread);
    parallel(parts, useful_threads(parts, multiply_cost(w, rows), threads_),
             [&](int64_t part, int) {
                 kernels_->multiply_rows(call, 0, rows, static_cast<int>(w.pairs * part / parts),
                                         static_cast<int>(w.pairs * (part + 1) / parts), memory);
             });
}

}  // namespace kvant
