#include "division.hpp"

#include <algorithm>

namespace kvant {

namespace {

constexpr int64_t kItemsPerThread = 6;  // so that the last ones to finish are short
constexpr int64_t kPageCost = 4;        // of a page, in rows

}  // namespace

Division divide(const std::vector<Sequence>& sequences, const Store& store, int heads,
                int64_t window, int threads) {
    Division out;
    const int share = heads / store.kv_heads, positions = std::max(1, kTileRows / share);
    const auto rows = [&](const Tile& tile) { return tile.heads * tile.count * share; };
    const auto cost = [&](const Tile& tile, int64_t begin, int64_t end) {
        const int64_t first = std::max(first_group(tile, window), begin * kSplitPages);
        const int64_t last = std::min(tile.first / kPageTokens + 1, end * kSplitPages);
        return (last - first) * (rows(tile) + kPageCost * tile.heads) * store.head_dim;
    };

    for (size_t s = 0; s < sequences.size(); ++s) {
        const Sequence& seq = sequences[s];
        for (int64_t at = seq.start; at < seq.end;) {
            const int64_t group_end = (at / kPageTokens + 1) * kPageTokens;
            const int64_t end = std::min({seq.end, group_end, at + positions});
            const int count = static_cast<int>(end - at);
            // Heads lie side by side in a page: together they are read in one stream.
            const int together = std::clamp(kTileRows / (count * share), 1, store.kv_heads);
            for (int head = 0; head < store.kv_heads; head += together) {
                const int some = std::min(together, store.kv_heads - head);
                const Tile tile{static_cast<int32_t>(s), head, some, count, at};
                const int64_t first = first_group(tile, window) / kSplitPages;
                const int64_t splits = at / kPageTokens / kSplitPages + 1 - first;
                out.tiles.push_back({tile, first, splits, 1, 0});
                out.cost += cost(tile, first, first + splits);
                out.most_rows = std::max(out.most_rows, rows(tile));
            }
            at = end;
        }
    }

    const int64_t target = threads > 1 ? out.cost / (threads * kItemsPerThread) + 1 : out.cost;
    for (size_t t = 0; t < out.tiles.size(); ++t) {
        TileWork& work = out.tiles[t];
        const int64_t end = work.first + work.count;
        const int64_t whole = cost(work.tile, work.first, end);
        const int64_t pieces = std::clamp<int64_t>((whole + target - 1) / target, 1, work.count);
        const int64_t step = (work.count + pieces - 1) / pieces;
        work.items = (work.count + step - 1) / step;
        for (int64_t at = work.first; at < end; at += step) {
            const int64_t until = std::min(at + step, end);
            out.items.push_back({t, at, until, cost(work.tile, at, until)});
        }
        if (work.items > 1) {
            work.partials = out.partials;
            out.partials += work.count * partial_floats(rows(work.tile), store.head_dim);
        }
    }
    std::stable_sort(out.items.begin(), out.items.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
    return out;
}

}  // namespace kvant
