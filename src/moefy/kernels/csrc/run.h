// One call of a conditional FFN.
#pragma once
#include "ffn.h"

namespace moefy {

// What a call does one after the other, for every tile of tokens.
enum Phase { kCopy, kScore, kSelect, kSort, kUp, kDown, kPhases };

struct Call {
  const Kernels* kernels = nullptr;
  const Bank *routed = nullptr, *shared = nullptr;  // either may be null
  const float* down_bias = nullptr;                 // (D rounded up to 16,)
  const float* y_scale = nullptr;                   // (D,), multiplied into y before the bias is added; may be null
  int width = 0;

  const void* x = nullptr;  // (T, D), strides in elements
  int64_t x_row = 0, x_column = 1;
  bool bf16 = false;   // x and y
  void* y = nullptr;   // (T, D), contiguous
  int64_t tokens = 0;

  // Routing: given experts, or given scores, or a router.
  const int32_t* chosen = nullptr;  // (T, capacity), < 0 is no expert
  const float* scores = nullptr;    // (T, E)
  const Bank* router = nullptr;
  Selection rule;
  int capacity = 0;                     // most experts of a token
  const float* gate_weights = nullptr;  // (T, capacity), with `chosen`
  const float* expert_scale = nullptr;  // (E,): weight = 1 + softmax(scores) * expert_scale

  int32_t* chosen_out = nullptr;  // (T, capacity), -1 where there is no expert
  int64_t* counts_out = nullptr;  // (E,), tokens per expert are added
  int64_t* phases_out = nullptr;  // (kPhases,), nanoseconds of all threads in each of them are added
  int threads = 1;
};

// False when `chosen` names an expert that does not exist, or one twice for a token (that entry is skipped).
bool forward(const Call& call);

}  // namespace moefy
