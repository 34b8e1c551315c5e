// The two verbs over the memory of one KV cache, on all threads.
#pragma once

#include <string>
#include <vector>

#include "division.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace kvant {

// The sequences of a step. Tables are copied, so it depends on nothing.
class Plan {
   public:
    void add(int64_t row, int64_t start, int64_t end, const int64_t* pages, size_t num_pages,
             const int64_t* fine_pages, size_t num_fine);
    // Valid until the next `add`.
    const std::vector<Sequence>& sequences();
    // How its attention is divided; the same for all layers of one window, so made once.
    const Division& division(const Store& store, int heads, int64_t window, int threads);

   private:
    struct Divided {
        int heads;
        int64_t window;
        Division division;
    };
    std::vector<Divided> divided_;
    std::vector<int64_t> tables_;
    std::vector<std::pair<size_t, size_t>> places_;  // of the two tables of each sequence
    std::vector<Sequence> sequences_;
};

class Backend {
   public:
    struct LayerPair {
        Layer base, fine;
    };

    Backend(const Kernels* kernels, const Store& store, std::vector<float> signs,
            std::vector<LayerPair> layers, int threads);
    Backend(const Backend&) = delete;

    void write(Plan& plan, int layer, const Tensor& k, const Tensor& v);
    void attend(Plan& plan, int layer, const Tensor& q, const Tensor& out, int heads, float scale,
                int64_t window, float softcap, const float* sinks);

   private:
    // Run body(index, scratch memory) for all indices below `count`, on as many threads as `cost`
    // is worth.
    template <typename Body>
    void run(size_t count, int64_t cost, size_t scratch_bytes, const Body& body);

    const Kernels* kernels_;
    Store store_;
    std::vector<float> signs_;
    std::vector<LayerPair> layers_;
    int threads_;
    Scratch scratch_, partials_;
};

}  // namespace kvant
