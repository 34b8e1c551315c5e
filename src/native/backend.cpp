#include "backend.hpp"

#include <atomic>

#include "threads.hpp"

namespace kvant {

namespace {

constexpr int64_t kWriteCost = 2;  // of an element, in units of Division::cost

Layer in_scratch(Layer fine) {
    fine.offset = 0;
    return fine;
}

}  // namespace

void Plan::add(int64_t row, int64_t start, int64_t end, const int64_t* pages, size_t num_pages,
               const int64_t* fine_pages, size_t num_fine) {
    divided_.clear();
    const size_t at = tables_.size();
    tables_.insert(tables_.end(), pages, pages + num_pages);
    tables_.insert(tables_.end(), fine_pages, fine_pages + num_fine);
    places_.emplace_back(at, at + num_pages);
    sequences_.push_back({row, start, end, nullptr, nullptr});
}

const std::vector<Sequence>& Plan::sequences() {
    for (size_t i = 0; i < sequences_.size(); ++i) {
        sequences_[i].pages = tables_.data() + places_[i].first;
        sequences_[i].fine_pages = tables_.data() + places_[i].second;
    }
    return sequences_;
}

const Division& Plan::division(const Store& store, int heads, int64_t window, int threads) {
    for (const Divided& each : divided_)
        if (each.heads == heads && each.window == window) return each.division;
    divided_.push_back({heads, window, divide(sequences(), store, heads, window, threads)});
    return divided_.back().division;
}

Backend::Backend(const Kernels* kernels, const Store& store, std::vector<float> signs,
                 std::vector<LayerPair> layers, int threads)
    : kernels_(kernels), store_(store), signs_(std::move(signs)), layers_(std::move(layers)),
      threads_(threads) {
    store_.signs = signs_.data();
}

template <typename Body>
void Backend::run(size_t count, int64_t cost, size_t scratch_bytes, const Body& body) {
    const int threads = useful_threads(count, cost, threads_);
    scratch_bytes = (scratch_bytes + 127) / 128 * 128;
    uint8_t* scratch = scratch_.reserve(threads * scratch_bytes);
    parallel(count, threads,
             [&](int64_t i, int thread) { body(i, scratch + thread * scratch_bytes); });
}

void Backend::write(Plan& plan, int layer, const Tensor& k, const Tensor& v) {
    const auto& [base, fine] = layers_[layer];
    const WriteCall call{&store_, base, fine, in_scratch(fine), k, v};
    struct Group {
        const Sequence* sequence;
        int64_t number;
    };
    std::vector<Group> groups;
    int64_t rows = 0;
    for (const Sequence& seq : plan.sequences()) {
        rows += seq.end - seq.start;
        for (int64_t at = seq.start / kPageTokens; at * kPageTokens < seq.end; ++at)
            groups.push_back({&seq, at});
    }
    const int64_t cost = rows * store_.kv_heads * store_.head_dim * kWriteCost;
    run(groups.size() * store_.kv_heads, cost, kernels_->write_scratch(store_.head_dim),
        [&](size_t i, uint8_t* scratch) {
            const Group& group = groups[i / store_.kv_heads];
            const int head = static_cast<int>(i % store_.kv_heads);
            kernels_->write_group(call, *group.sequence, head, group.number, scratch);
        });
}

void Backend::attend(Plan& plan, int layer, const Tensor& q, const Tensor& out, int heads,
                     float scale, int64_t window, float softcap, const float* sinks) {
    const auto& [base, fine] = layers_[layer];
    const AttendCall call{&store_, base,  fine,   in_scratch(fine), q,    out,
                          heads,   scale, window, softcap,          sinks};
    const auto& sequences = plan.sequences();
    const Division& work = plan.division(store_, heads, window, threads_);
    auto* partials = reinterpret_cast<float*>(partials_.reserve(work.partials * sizeof(float)));
    std::vector<std::atomic<int64_t>> left(work.tiles.size());
    for (size_t i = 0; i < left.size(); ++i) left[i] = work.tiles[i].items;

    run(work.items.size(), work.cost, kernels_->attend_scratch(call, work.most_rows),
        [&](size_t i, uint8_t* scratch) {
            const Item& item = work.items[i];
            const TileWork& tile = work.tiles[item.tile];
            const Sequence& seq = sequences[tile.tile.sequence];
            float* results = tile.items > 1 ? partials + tile.partials : nullptr;
            kernels_->attend_item(call, seq, tile.tile, item.begin, item.end, results, scratch);
            // Whoever makes the last result of a tile merges them.
            if (results && left[item.tile].fetch_sub(1) == 1)
                kernels_->finish_tile(call, seq, tile.tile, tile.count, results, scratch);
        });
}

}  // namespace kvant
