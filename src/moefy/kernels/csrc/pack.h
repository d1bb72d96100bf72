// Weights as PyTorch has them (neuron-major rows) to the panels of ffn.h and back.
#pragma once
#include "memory.h"

namespace moefy {

struct Source {  // (experts, neurons, width), contiguous; data may be null
  const void* data = nullptr;
  Weights type = Weights::f32;  // or bf16, f16
};

struct Shape {
  int experts, neurons, width;
  Activation act;
  bool activate_up, absolute;
  Weights up, down;    // types; int8 for both or for none
  bool tiled = false;  // for kernels that want it; taken where both are bf16
};

enum class Matrix : int { gate, up, down };

class PackedBank {
 public:
  // down may be null (a router). Biases are (experts, neurons) fp32 or null. `columns` (width), for int8, or null: what
  // down's columns are divided by first, and y multiplied by in the end (Call::y_scale).
  PackedBank(const Shape& shape, Source gate, Source up, Source down, const float* columns, const float* gate_bias,
             const float* up_bias, int threads);
  const Bank& bank() const { return bank_; }
  size_t bytes() const;
  // Writes (experts, neurons, width) in the type of the weights, exactly; int8 as fp32, and not times `columns`.
  void unpack(Matrix which, void* out, int threads) const;
  bool unpack_bias(Matrix which, float* out) const;

 private:
  float* rows(Memory& memory);
  void pack_bias(const float* from, float*& to, Memory& memory);
  void find_scales(Source gate, Source up, Source down, const float* columns, int threads);

  Bank bank_;
  Memory up_, down_, up_bias_, gate_bias_, up_scale_, gate_scale_, down_scale_;
};

}  // namespace moefy
