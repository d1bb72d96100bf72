// The data of one conditional FFN and the function table that every instruction set fills.
//
// Letters as in types.py: T tokens, D model width, E routed experts, M neurons per expert, K chosen, S shared.
//
// Packed weights are made of blocks of 16 values ("lanes", see lanes_*.h); all instruction sets read the same bytes.
//   up    panel of 8 neurons; one block = 8 neurons x 2 values of k, so that experts of 8 neurons fill a vector.
//         Gated experts interleave gate and up panels: g0 u0 g1 u1 ...
//   down  panel of 16 output columns; one block = 16 columns of one neuron.
// A bf16 block keeps two successive blocks lane by lane (low half first); an fp16 block is 32 bytes, an int8 block 16.
// Banks for AMX (`tiled`, bf16 only) are made of rows of 16 pairs instead, see TileCut.
#pragma once
#include <cstddef>
#include <cstdint>

// Inlined without optimisation too: a copy of its own, compiled for AVX-512, could be the one that the linker keeps for
// every unit.
#define MOEFY_INLINE inline __attribute__((always_inline))

namespace moefy {

enum class Activation : int { identity, relu, relu2, gelu, gelu_tanh, silu, quick_gelu, sigmoid, tanh };
enum class Weights : int { f32, bf16, i8, f16 };

constexpr int kLanes = 16;     // values in a block
constexpr int kNeurons = 8;    // neurons in an up panel
constexpr int kRows = 48;      // rows of one task: x of a k chunk stays in L2 of 512 KB, and 48 = 8 tiles of 6 rows
constexpr int kTiledRows = 64;  // the same for AMX: 2 pairs of tiles of 16 rows
constexpr int kScoreRows = 128;  // the same for the scores of bf16 inputs in AMX, which split the router once a task
constexpr int kRowPanels = 4;  // up panels that are read at once for a single row
constexpr size_t kAlign = 64;  // bytes; one cache line, one AVX-512 register

MOEFY_INLINE constexpr int most_rows(bool tiled) { return tiled ? kTiledRows : kRows; }
// In the down phase rows share nothing but weights, and setting up a task is 12 % of what experts of 8 take with 48
// rows: with more, 256 tokens of those take 2 % less, larger experts 1 %.
constexpr int kDownRows = 144;
MOEFY_INLINE constexpr int most_down_rows(bool tiled) { return tiled ? kTiledRows : kDownRows; }

MOEFY_INLINE constexpr size_t value_bytes(Weights type) { return type == Weights::f32 ? 4 : type == Weights::i8 ? 1 : 2; }
MOEFY_INLINE constexpr int block_depth(Weights type) { return type == Weights::bf16 ? 2 : 1; }
MOEFY_INLINE constexpr size_t block_bytes(Weights type) { return kLanes * block_depth(type) * value_bytes(type); }

MOEFY_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOEFY_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How AMX walks over n inputs: `parts` tiles of `depth` inputs each (even, at most 32), zero padded but never beyond
// the next multiple of 16, where rows of hidden values end. A tile of weights has depth / 2 rows of 16 columns x 2
// successive inputs; a column is a neuron in up (two panels of 8 side by side, the last one alone where their number
// is odd) and an output column in down.
struct TileCut {
  int depth = 0, parts = 1;
  MOEFY_INLINE explicit constexpr TileCut(int n) {
    for (parts = int(ceil_div(n, 32)) > 0 ? int(ceil_div(n, 32)) : 1;; ++parts) {
      depth = int(round_up(ceil_div(n, parts), 2));
      if (depth * parts <= round_up(n, kLanes)) break;
    }
  }
  MOEFY_INLINE constexpr int inputs() const { return depth * parts; }
};

// Experts of one size: the routed ones, the shared neurons (one expert), or the rows of a router (one expert).
struct Bank {
  int experts = 0, neurons = 0, width = 0;
  bool gated = false, activate_up = false;
  bool absolute = false;  // a representative router scores |act(gate) * up|
  bool tiled = false;     // packed for AMX
  // Tiled experts of few neurons share one down matrix, all neurons in the order of experts, and the hidden values of a
  // token are one row with zeros where it has no expert: multiplying by zeros costs a tile less than reading and writing
  // y once per expert (256 tokens, 48 of 144 experts of 8: the call takes 1.53 ms instead of 1.99).
  bool joined = false;
  Activation act = Activation::identity;
  Weights up_type = Weights::f32, down_type = Weights::f32;  // int8 is of both or of none
  char *up = nullptr, *down = nullptr;
  // One row of hidden_stride() per expert, zero padded; null when the model has none.
  float *up_bias = nullptr, *gate_bias = nullptr;
  float *up_scale = nullptr, *gate_scale = nullptr, *down_scale = nullptr;  // int8 only; see Call::y_scale

  MOEFY_INLINE bool is_bf16() const { return up_type == Weights::bf16 && down_type == Weights::bf16; }
  MOEFY_INLINE int up_panels() const { return int(ceil_div(neurons, kNeurons)) * (gated ? 2 : 1); }
  MOEFY_INLINE int up_steps() const { return int(ceil_div(width, 2 * block_depth(up_type))); }
  MOEFY_INLINE int down_panels() const { return int(ceil_div(width, kLanes)); }
  MOEFY_INLINE int down_experts() const { return joined ? 1 : experts; }
  MOEFY_INLINE int down_neurons() const { return joined ? experts * neurons : neurons; }
  MOEFY_INLINE int down_steps() const {
    return int(ceil_div(tiled ? TileCut(down_neurons()).inputs() : neurons, block_depth(down_type)));
  }
  MOEFY_INLINE int hidden_stride() const { return int(round_up(neurons, kLanes)); }
  // Hidden values of a row: of one expert, or of all when they are joined.
  // Those are an odd number of cache lines, since tiles read the same columns of 16 rows at once.
  MOEFY_INLINE int hidden_row() const { return joined ? int(ceil_div(down_neurons(), 32) | 1) * 32 : hidden_stride(); }
  // A unit is 16 neurons: what the epilogue writes at once and the smallest piece of work of a task.
  MOEFY_INLINE int units() const { return int(ceil_div(neurons, kLanes)); }
  MOEFY_INLINE int unit_panels() const { return gated ? 4 : 2; }
  MOEFY_INLINE size_t up_panel_bytes() const {
    if (tiled) return size_t(round_up(TileCut(width).inputs() * kNeurons * 2, kAlign));
    return size_t(up_steps()) * block_bytes(up_type);
  }
  MOEFY_INLINE size_t down_panel_bytes() const { return size_t(down_steps()) * block_bytes(down_type); }
  MOEFY_INLINE size_t up_bytes() const { return size_t(experts) * up_panels() * up_panel_bytes(); }
  MOEFY_INLINE size_t down_bytes() const { return size_t(down_experts()) * down_panels() * down_panel_bytes(); }
};

// hidden = act(x . up) for some rows (tokens) and some units of one expert.
struct UpTask {
  const Bank* bank;
  int expert, unit0, unit1, rows;
  // One pointer per row: fp32 values, or bf16 when `dot`, swapped by copy_row_swapped but for AMX.
  const char* const* x;
  float* scratch;          // rows x panels of the task x 16 floats; tiled: tile_scratch() and kTiledRows x panels x 8;
                           // a router with `dot`: split_scratch()
  char* const* out;        // one pointer per row, to unit0 of its hidden values: hidden_bytes() each
  const float* weight;     // per row, multiplied into the hidden values; may be null
  bool dot;                // x is bf16, and so are the hidden values; scores are fp32
};

// The same for some joined experts and successive tokens: all products are made, and what was chosen is kept.
struct JoinedUpTask {
  UpTask rows;                 // the tokens and the first expert; its out and weight are not used
  int experts;                 // at most kTiledRows
  const int32_t *begin, *end;  // for each expert, its pairs among these tokens
  const int32_t* token;        // of a pair
  int token0;                  // of the first row
  const float* weight;         // of a pair; may be null
  char* hidden;                // of token 0
  int64_t hidden_row;          // bytes
};

// y += hidden . down for some rows and some panels of 16 columns.
struct DownTask {
  const Bank* bank;
  int expert, next;  // next: the expert that the thread will read after this one
  int panel0, panel1, rows;
  const char* const* hidden;
  float* const* y;  // one pointer per row, to panel0
  char* scratch;    // row_scratch() bytes of down_neurons(), tiled only
  bool dot;
  bool alone;  // the expert has a single row, and not only in this slice of tokens: slices depend on the threads
};

// The same for joined experts and successive tokens: rows of hidden_row() values, rounded up to kJoinedRows rows.
struct JoinedTask {
  const Bank* bank;
  int panel0, panel1, rows;
  const char* hidden;
  const uint8_t* needed;  // for each kJoinedRows rows: which parts of TileCut have values other than 0
  float* y;
  int64_t y_row;  // floats
  char* scratch;  // row_scratch() bytes of down_neurons()
  bool dot;
};

// AMX multiplies bf16 only. An fp32 value is the exact sum of three bf16 ones, and three products take its place.
MOEFY_INLINE constexpr int tile_splits(bool dot) { return dot ? 1 : 3; }
// Bytes of a hidden value; with three splits a row is three rows of bf16.
MOEFY_INLINE constexpr int hidden_bytes(bool tiled, bool dot) { return tiled ? 2 * tile_splits(dot) : dot ? 2 : 4; }
// Bytes of the rows of x of one task, as tiles want them.
MOEFY_INLINE constexpr int64_t tile_scratch(int width, bool dot) {
  return round_up(int64_t(kTiledRows) * TileCut(width).inputs() * 2 * tile_splits(dot), kAlign);
}

// Units of a router in one task of AMX (amx_split.h), six bytes a weight, and the scratch of such a task.
MOEFY_INLINE constexpr int64_t split_bytes(int width, int panels) {
  return int64_t(TileCut(width).inputs()) * kNeurons * 6 * round_up(panels, 2);
}
MOEFY_INLINE int split_units(const Bank& router) {
  const int64_t most = (640 << 10) / split_bytes(router.width, router.unit_panels());
  return int(most < 1 ? 1 : most < router.units() ? most : router.units());
}
MOEFY_INLINE int64_t split_scratch(const Bank& router) {
  const int panels = split_units(router) * router.unit_panels();
  return tile_scratch(router.width, true) + int64_t(kTiledRows) * panels * kNeurons * 4 + split_bytes(router.width, panels);
}

constexpr int kJoinedNeurons = 16;  // experts of so many neurons or fewer are joined
constexpr int kJoinedRows = 32;
// Bytes of a single row as fp32, and a mask for each part.
MOEFY_INLINE constexpr int64_t row_scratch(int inputs) {
  const TileCut cut(inputs);
  return round_up(round_up(cut.inputs(), 2 * kLanes) * 4 + cut.parts * 2, kAlign);
}

struct Selection {
  int top_k = 0;
  bool by_threshold = false;  // every score above `threshold`, at least `least` and at most `most`
  float threshold = 0;
  int least = 0, most = 0;
};

struct Kernels {
  const char* name;
  bool wide;     // has vectors of 512 bits
  bool has_dot;  // multiplies bf16 pairs in one instruction
  bool tiled;    // wants bf16 weights packed for AMX
  void (*up)(const UpTask&);
  // Several experts of one bank for one row, kRowPanels panels at most: whole experts, all tasks with the same x.
  void (*up_row)(const UpTask* tasks, int count);
  void (*down)(const DownTask&);
  void (*up_joined)(const JoinedUpTask&);  // these two are null where nothing is tiled
  void (*down_joined)(const JoinedTask&);
  // Writes the chosen experts of one token in ascending order, returns their number; keys: scratch of `experts`.
  int (*select)(const float* scores, int experts, const Selection& rule, int32_t* keys, int32_t* chosen);
  // weight[i] = 1 + softmax(scores)[chosen[i]] * scale[chosen[i]] (CMoE's gate); scratch: experts rounded up to 16.
  void (*gate)(const float* scores, int experts, const float* scale, const int32_t* chosen, int count, float* scratch,
               float* weight);
};

// Whether a core makes two products of 512 bits in a cycle, twice as many as one of Zen 4: Intel's servers do (what else
// Intel has with AVX-512 counts as one), and want other amounts at a time. Zen 5's do too, but what they want was not
// measured.
bool two_products();

// Names of what this build and this machine can run, the fastest last; null for a name that it cannot.
int instruction_sets(const char** names, int capacity);
const Kernels* kernels(const char* name);

}  // namespace moefy
