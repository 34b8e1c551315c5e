// How the attention of a step is divided into items that threads take one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace kvant {

// The splits [first, first + count) of a tile; `items` of them share the work. With more than one
// their results meet in memory, `partials` floats from its beginning.
struct TileWork {
    Tile tile;
    int64_t first, count, items;
    size_t partials;
};

// The splits [begin, end) of a tile, by its number in Division::tiles.
struct Item {
    size_t tile;
    int64_t begin, end;
    int64_t cost;
};

struct Division {
    std::vector<TileWork> tiles;
    std::vector<Item> items;   // long ones first
    size_t partials = 0;       // floats
    int64_t cost = 0;          // of all items; a unit is some nanoseconds
    int most_rows = 0;         // of a tile
};

// Long contexts are cut at splits, so that `threads` have work; what a row sees and in which order
// it is merged does not depend on that.
Division divide(const std::vector<Sequence>& sequences, const Store& store, int heads,
                int64_t window, int threads);

}  // namespace kvant
