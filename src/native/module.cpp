// The Python module kvant.kernels._native.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "decoder.hpp"
#include "isa.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvant;

namespace {

template <typename T> using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const Kernels* find(const std::string& isa) {
    for (const Kernels* each : available_kernels())
        if (isa == each->isa) return each;
    throw std::invalid_argument("no kernels for " + isa);
}

// Tensors come as (address, type, row stride, head stride): DLPack would take longer than the
// attention of a short sequence.
Tensor tensor(nb::tuple x) {
    return {reinterpret_cast<void*>(nb::cast<uintptr_t>(x[0])),
            static_cast<DType>(nb::cast<int>(x[1])), nb::cast<int64_t>(x[2]),
            nb::cast<int64_t>(x[3])};
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("available_isas", [] {
        std::vector<std::string> names;
        for (const Kernels* each : available_kernels()) names.push_back(each->isa);
        return names;
    });

    nb::class_<Pool>(m, "Pool").def(
        "__init__",
        [](Pool* self, nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> pages) {
            new (self) Pool{pages.data(), static_cast<int64_t>(pages.shape(1))};
        },
        "pages"_a.noconvert());

    nb::class_<Part>(m, "Part").def(
        "__init__",
        [](Part* self, int family, int dtype, int bits, bool rotated, bool by_page, int nbytes,
           int scale, int zero, std::pair<int, int> codes, std::pair<int, int> widths) {
            new (self) Part{static_cast<Family>(family), static_cast<DType>(dtype), bits, rotated,
                            by_page, nbytes, scale, zero, {codes.first, codes.second},
                            {widths.first, widths.second}};
        },
        nb::kw_only(), "family"_a, "dtype"_a, "bits"_a, "rotated"_a, "by_page"_a, "nbytes"_a,
        "scale"_a, "zero"_a, "codes"_a, "widths"_a);

    nb::class_<Layer>(m, "Layer").def(
        "__init__",
        [](Layer* self, int64_t offset, const Part& k, const Part& v) {
            new (self) Layer{offset, k, v};
        },
        "offset"_a, "k"_a, "v"_a);

    nb::class_<Plan>(m, "Plan")
        .def(nb::init<>())
        .def(
            "add",
            [](Plan& plan, int64_t row, int64_t start, int64_t end, Array<const int64_t> pages,
               Array<const int64_t> fine_pages) {
                plan.add(row, start, end, pages.data(), pages.size(), fine_pages.data(),
                         fine_pages.size());
            },
            "row"_a, "start"_a, "end"_a, "pages"_a, "fine_pages"_a);

    nb::class_<Rotary>(m, "Rotary")
        .def(
            "__init__",
            [](Rotary* self, const std::string& isa, int threads) {
                new (self) Rotary(find(isa), threads);
            },
            "isa"_a, "threads"_a)
        .def(
            "forward",
            [](const Rotary& self, nb::tuple x, nb::tuple cos, nb::tuple sin, nb::tuple out,
               int64_t rows, int heads, int head_dim) {
                const Tensor from = tensor(x), c = tensor(cos), s = tensor(sin), to = tensor(out);
                nb::gil_scoped_release release;
                self.forward(from, static_cast<float*>(c.data), static_cast<float*>(s.data), to,
                             rows, heads, head_dim);
            },
            "x"_a, "cos"_a, "sin"_a, "out"_a, "rows"_a, "heads"_a, "head_dim"_a);

    nb::class_<LinearLayer>(m, "Linear")
        .def(
            "__init__",
            [](LinearLayer* self, const std::string& isa, int kind, bool gated, bool offsets,
               int inputs, int outputs, int groups, int group_words, int rotation,
               std::optional<Array<const float>> signs,
               nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> lines,
               std::optional<Array<const float>> factors, std::optional<Array<const float>> bias,
               int threads) {
                const LinearWeights weights{static_cast<WeightKind>(kind),
                                            gated,
                                            offsets,
                                            inputs,
                                            outputs,
                                            groups,
                                            group_words,
                                            rotation,
                                            signs ? signs->data() : nullptr,
                                            static_cast<int64_t>(lines.shape(0)),
                                            static_cast<int64_t>(lines.shape(1)),
                                            lines.data(),
                                            factors ? factors->data() : nullptr,
                                            bias ? bias->data() : nullptr};
                new (self) LinearLayer(find(isa), weights, threads);
            },
            nb::kw_only(), "isa"_a, "kind"_a, "gated"_a, "offsets"_a, "inputs"_a, "outputs"_a,
            "groups"_a, "group_words"_a, "rotation"_a, "signs"_a.none(), "lines"_a, "factors"_a.none(), "bias"_a.none(),
            "threads"_a)
        .def(
            "forward",
            [](const LinearLayer& self, nb::tuple x, nb::tuple out, int64_t rows, uintptr_t norm,
               float eps, bool add) {
                const Tensor from = tensor(x), to = tensor(out);
                nb::gil_scoped_release release;
                self.forward(from, to, rows, reinterpret_cast<const float*>(norm), eps, add);
            },
            "x"_a, "out"_a, "rows"_a, "norm"_a, "eps"_a, "add"_a);

    nb::class_<Backend>(m, "Backend")
        .def(
            "__init__",
            [](Backend* self, const std::string& isa, const Pool& base, const Pool& recent,
               const Pool& scratch, int64_t num_recent, bool has_recent, int64_t num_sink,
               int kv_heads, int head_dim, std::vector<float> signs,
               const std::vector<std::pair<Layer, Layer>>& layers, int threads) {
                std::vector<Backend::LayerPair> pairs;
                for (const auto& [base_layer, fine] : layers) pairs.push_back({base_layer, fine});
                const Store store{base,     recent,   scratch,  num_recent, has_recent,
                                  num_sink, kv_heads, head_dim, nullptr};
                new (self) Backend(find(isa), store, std::move(signs), std::move(pairs), threads);
            },
            nb::kw_only(), "isa"_a, "base"_a, "recent"_a, "scratch"_a, "num_recent"_a,
            "has_recent"_a, "num_sink"_a, "kv_heads"_a, "head_dim"_a, "signs"_a, "layers"_a,
            "threads"_a)
        .def(
            "write",
            [](Backend& self, Plan& plan, int layer, nb::tuple k, nb::tuple v) {
                const Tensor keys = tensor(k), values = tensor(v);
                nb::gil_scoped_release release;
                self.write(plan, layer, keys, values);
            },
            "plan"_a, "layer"_a, "k"_a, "v"_a)
        .def(
            "attend",
            [](Backend& self, Plan& plan, int layer, nb::tuple q, nb::tuple out, int heads,
               float scale, int64_t window, float softcap,
               std::optional<Array<const float>> sinks) {
                const Tensor queries = tensor(q), outputs = tensor(out);
                nb::gil_scoped_release release;
                self.attend(plan, layer, queries, outputs, heads, scale, window, softcap,
                            sinks ? sinks->data() : nullptr);
            },
            "plan"_a, "layer"_a, "q"_a, "out"_a, "heads"_a, "scale"_a, "window"_a, "softcap"_a,
            "sinks"_a.none());

    nb::class_<Block>(m, "Block").def(
        "__init__",
        [](Block* self, const LinearLayer& qkv, const LinearLayer& output,
           const LinearLayer& gate_up, const LinearLayer& down, uintptr_t attention_norm,
           uintptr_t mlp_norm, float eps, int64_t window) {
            new (self) Block{&qkv,
                             &output,
                             &gate_up,
                             &down,
                             reinterpret_cast<const float*>(attention_norm),
                             reinterpret_cast<const float*>(mlp_norm),
                             eps,
                             window};
        },
        nb::kw_only(), "qkv"_a, "output"_a, "gate_up"_a, "down"_a, "attention_norm"_a,
        "mlp_norm"_a, "eps"_a, "window"_a);

    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const Rotary&, std::vector<Block>, int, int, int, float, int>(), "rotary"_a,
             "blocks"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "threads"_a)
        .def(
            "forward",
            [](Decoder& self, Backend& backend, Plan& plan, nb::tuple x, nb::tuple cos,
               nb::tuple sin, int64_t rows, Array<const int64_t> chosen, nb::tuple out) {
                const Tensor from = tensor(x), c = tensor(cos), s = tensor(sin), to = tensor(out);
                nb::gil_scoped_release release;
                self.forward(backend, plan, from, static_cast<float*>(c.data),
                             static_cast<float*>(s.data), rows, chosen.data(),
                             static_cast<int64_t>(chosen.size()), to);
            },
            "backend"_a, "plan"_a, "x"_a, "cos"_a, "sin"_a, "rows"_a, "chosen"_a, "out"_a);
}
