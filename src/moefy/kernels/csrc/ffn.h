// The data of one conditional FFN and the function table that every instruction set fills.
//
// Letters as in types.py: T tokens, D model width, E routed experts, M neurons per expert, K chosen, S shared.
//
// Packed weights are made of blocks of 16 values ("lanes", see lanes_*.h); all instruction sets read the same bytes.
//   up    panel of 8 neurons; one block = 8 neurons x 2 values of k, so that experts of 8 neurons fill a vector.
//         Gated experts interleave gate and up panels: g0 u0 g1 u1 ...
//   down  panel of 16 output columns; one block = 16 columns of one neuron.
// A bf16 block keeps two successive blocks lane by lane (low half first), an int8 block is 16 bytes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moefy {

enum class Activation : int { identity, relu, relu2, gelu, gelu_tanh, silu, quick_gelu, sigmoid, tanh };
enum class Weights : int { f32, bf16, i8 };

constexpr int kLanes = 16;     // values in a block
constexpr int kNeurons = 8;    // neurons in an up panel
constexpr int kRows = 48;      // rows of one task: x of a k chunk stays in L2, and 48 = 8 tiles of 6 rows
constexpr int kRowPanels = 4;  // up panels that are read at once for a single row
constexpr size_t kAlign = 64;  // bytes; one cache line, one AVX-512 register

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Experts of one size: the routed ones, the shared neurons (one expert), or the rows of a router (one expert).
struct Bank {
  int experts = 0, neurons = 0, width = 0;
  bool gated = false, activate_up = false;
  bool absolute = false;  // a representative router scores |act(gate) * up|
  Activation act = Activation::identity;
  Weights type = Weights::f32;
  char *up = nullptr, *down = nullptr;
  // One row of hidden_stride() per expert, zero padded; null when the model has none.
  float *up_bias = nullptr, *gate_bias = nullptr;
  float *up_scale = nullptr, *gate_scale = nullptr, *down_scale = nullptr;  // int8 only

  size_t block_bytes() const { return type == Weights::i8 ? 16 : 64; }
  int block_depth() const { return type == Weights::bf16 ? 2 : 1; }
  int up_panels() const { return int(ceil_div(neurons, kNeurons)) * (gated ? 2 : 1); }
  int up_steps() const { return int(ceil_div(width, 2 * block_depth())); }
  int down_panels() const { return int(ceil_div(width, kLanes)); }
  int down_steps() const { return int(ceil_div(neurons, block_depth())); }
  int hidden_stride() const { return int(round_up(neurons, kLanes)); }
  // A unit is 16 neurons: what the epilogue writes at once and the smallest piece of work of a task.
  int units() const { return int(ceil_div(neurons, kLanes)); }
  int unit_panels() const { return gated ? 4 : 2; }
  size_t up_panel_bytes() const { return size_t(up_steps()) * block_bytes(); }
  size_t down_panel_bytes() const { return size_t(down_steps()) * block_bytes(); }
  size_t up_bytes() const { return size_t(experts) * up_panels() * up_panel_bytes(); }
  size_t down_bytes() const { return size_t(experts) * down_panels() * down_panel_bytes(); }
};

// hidden = act(x . up) for some rows (tokens) and some units of one expert.
struct UpTask {
  const Bank* bank;
  int expert, unit0, unit1, rows;
  const char* const* x;    // one pointer per row: fp32 values, or bf16 in the order of pack_bf16 when `dot`
  float* scratch;          // rows x panels of the task x 16
  char* const* out;        // one pointer per row, to unit0 of its hidden values: fp32, or bf16 when `dot`
  const float* weight;     // per row, multiplied into the hidden values; may be null
  bool dot;
};

// y += hidden . down for some rows and some panels of 16 columns.
struct DownTask {
  const Bank* bank;
  int expert, next;  // next: the expert that the thread will read after this one
  int panel0, panel1, rows;
  const char* const* hidden;
  float* const* y;  // one pointer per row, to panel0
  bool dot;
};

struct Selection {
  int top_k = 0;
  bool by_threshold = false;  // every score above `threshold`, at least `least` and at most `most`
  float threshold = 0;
  int least = 0, most = 0;
};

struct Kernels {
  const char* name;
  bool has_dot;  // multiplies bf16 pairs in one instruction
  void (*up)(const UpTask&);
  // Several experts of one bank for one row, kRowPanels panels at most: whole experts, all tasks with the same x.
  void (*up_row)(const UpTask* tasks, int count);
  void (*down)(const DownTask&);
  // Writes the chosen experts of one token in ascending order, returns their number; keys: scratch of `experts`.
  int (*select)(const float* scores, int experts, const Selection& rule, int32_t* keys, int32_t* chosen);
  // weight[i] = 1 + softmax(scores)[chosen[i]] * scale[chosen[i]] (CMoE's gate); scratch: experts rounded up to 16.
  void (*gate)(const float* scores, int experts, const float* scale, const int32_t* chosen, int count, float* scratch,
               float* weight);
};

// Names of what this build and this machine can run, the fastest last; null for a name that it cannot.
int instruction_sets(const char** names, int capacity);
const Kernels* kernels(const char* name);

}  // namespace moefy
