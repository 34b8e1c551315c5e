// Memory in lines of the cache that only grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvant {

class Scratch {
   public:
    uint8_t* reserve(size_t bytes) {
        if (lines_.size() * sizeof(Line) < bytes) lines_.resize(bytes / sizeof(Line) + 1);
        return reinterpret_cast<uint8_t*>(lines_.data());
    }

   private:
    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    std::vector<Line> lines_;
};

}  // namespace kvant
