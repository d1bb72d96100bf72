// The Python module: checks nothing that native.py has checked. Tensors come as addresses: an integer per tensor
// costs 0.1 us, a DLPack capsule 1-2 us, and a whole call at one token is 20-200 us.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "pack.h"
#include "run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moefy;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> names() {
  const char* found[8];
  const int count = instruction_sets(found, 8);
  return {found, found + count};
}

// What is the same in every call of a layer.
Call of_layer(const std::string& isa, const PackedBank* routed, const PackedBank* shared, const PackedBank* router,
              uintptr_t down_bias, uintptr_t y_scale, int width, int capacity, bool by_threshold) {
  Call c;
  c.kernels = kernels(isa.c_str());
  if (!c.kernels) throw nb::value_error("this machine has no such instruction set");
  c.routed = routed ? &routed->bank() : nullptr;
  c.shared = shared ? &shared->bank() : nullptr;
  c.router = router ? &router->bank() : nullptr;
  c.down_bias = pointer<const float>(down_bias);
  c.y_scale = pointer<const float>(y_scale);
  c.width = width;
  c.capacity = capacity;
  c.rule = {capacity, by_threshold, 0, 0, capacity};
  return c;
}

bool call(const std::string& isa, const PackedBank* routed, const PackedBank* shared, const PackedBank* router,
          uintptr_t down_bias, uintptr_t y_scale, int width, int capacity, bool by_threshold, uintptr_t x, int64_t x_row,
          int64_t x_column, bool bf16, uintptr_t y, int64_t tokens, uintptr_t chosen, uintptr_t scores, float threshold,
          int least, uintptr_t gate_weights, uintptr_t expert_scale, uintptr_t chosen_out, uintptr_t counts_out,
          uintptr_t phases_out, int threads) {
  Call c = of_layer(isa, routed, shared, router, down_bias, y_scale, width, capacity, by_threshold);
  c.x = pointer<const void>(x), c.x_row = x_row, c.x_column = x_column, c.bf16 = bf16;
  c.y = pointer<void>(y), c.tokens = tokens;
  c.chosen = pointer<const int32_t>(chosen);
  c.scores = pointer<const float>(scores);
  c.rule.threshold = threshold, c.rule.least = least;
  c.gate_weights = pointer<const float>(gate_weights);
  c.expert_scale = pointer<const float>(expert_scale);
  c.chosen_out = pointer<int32_t>(chosen_out);
  c.counts_out = pointer<int64_t>(counts_out);
  c.phases_out = pointer<int64_t>(phases_out);
  c.threads = threads;
  nb::gil_scoped_release release;
  return forward(c);
}

// A layer's call with only what changes: contiguous rows of x, and the threshold.
struct Prepared {
  Call layer;
  void run(uintptr_t x, uintptr_t y, int64_t tokens, float threshold, int threads) const {
    Call c = layer;
    c.x = pointer<const void>(x), c.y = pointer<void>(y), c.tokens = tokens;
    c.rule.threshold = threshold, c.threads = threads;
    nb::gil_scoped_release release;
    forward(c);
  }
};

}  // namespace

NB_MODULE(_native, m) {
  m.def("instruction_sets", names);
  m.def("tiled", [](const std::string& isa) { return kernels(isa.c_str()) && kernels(isa.c_str())->tiled; }, "isa"_a);
  m.def("forward", call, "isa"_a, "routed"_a.none(), "shared"_a.none(), "router"_a.none(), "down_bias"_a, "y_scale"_a,
        "width"_a, "capacity"_a, "by_threshold"_a, "x"_a, "x_row"_a, "x_column"_a, "bf16"_a, "y"_a, "tokens"_a, "chosen"_a,
        "scores"_a, "threshold"_a, "least"_a, "gate_weights"_a, "expert_scale"_a, "chosen_out"_a, "counts_out"_a,
        "phases_out"_a, "threads"_a);
  nb::class_<Prepared>(m, "Prepared")
      .def(
          "__init__",
          [](Prepared* self, const std::string& isa, const PackedBank* routed, const PackedBank* shared,
             const PackedBank* router, uintptr_t down_bias, uintptr_t y_scale, int width, int capacity, bool by_threshold,
             bool bf16) {
            Call c = of_layer(isa, routed, shared, router, down_bias, y_scale, width, capacity, by_threshold);
            c.x_row = width, c.x_column = 1, c.bf16 = bf16;
            new (self) Prepared{c};
          },
          "isa"_a, "routed"_a, "shared"_a.none(), "router"_a, "down_bias"_a, "y_scale"_a, "width"_a, "capacity"_a,
          "by_threshold"_a, "bf16"_a, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("__call__", &Prepared::run, "x"_a, "y"_a, "tokens"_a, "threshold"_a, "threads"_a);
  nb::class_<PackedBank>(m, "Bank")
      .def(
          "__init__",
          [](PackedBank* self, int experts, int neurons, int width, int activation, bool activate_up, bool absolute,
             int up_type, int down_type, int source, uintptr_t gate, uintptr_t up, uintptr_t down,
             uintptr_t columns, uintptr_t gate_bias, uintptr_t up_bias, int threads, bool tiled) {
            nb::gil_scoped_release release;
            const Weights up_as = Weights(up_type), down_as = Weights(down_type);
            const Shape shape{experts, neurons, width, Activation(activation), activate_up, absolute, up_as, down_as, tiled};
            const auto from = [&](uintptr_t matrix) { return Source{pointer<void>(matrix), Weights(source)}; };
            new (self) PackedBank(shape, from(gate), from(up), from(down), pointer<float>(columns),
                                  pointer<float>(gate_bias), pointer<float>(up_bias), threads);
          },
          "experts"_a, "neurons"_a, "width"_a, "activation"_a, "activate_up"_a, "absolute"_a, "up_type"_a,
          "down_type"_a, "source"_a, "gate"_a, "up"_a, "down"_a, "columns"_a, "gate_bias"_a, "up_bias"_a, "threads"_a, "tiled"_a)
      .def_prop_ro("nbytes", &PackedBank::bytes)
      .def(
          "unpack",
          [](const PackedBank& self, int which, uintptr_t out, int threads) {
            nb::gil_scoped_release release;
            self.unpack(Matrix(which), pointer<void>(out), threads);
          },
          "which"_a, "out"_a, "threads"_a)
      .def(
          "unpack_bias",
          [](const PackedBank& self, int which, uintptr_t out) {
            return self.unpack_bias(Matrix(which), pointer<float>(out));
          },
          "which"_a, "out"_a);
}
