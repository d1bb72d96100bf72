// The state of one call: run.cpp has its steps and the two phases, route.cpp what comes before them.
#pragma once
#include <algorithm>

#include "memory.h"
#include "run.h"

namespace moefy {

constexpr int kUnits = 8;                       // most units of a piece: 96 KB of sums for 48 rows
constexpr int most_units(bool tiled) { return tiled ? 2 * kUnits : kUnits; }  // AMX copies x once a piece
constexpr int64_t kHiddenBytes = 24 << 20;      // hidden values of a token tile stay in a 32 MB L3
constexpr int64_t kMostTokens = 1024;           // of a tile: weights are read once per tile
constexpr int64_t kPieceBytes = 192 << 10;      // weights of a piece when there are few rows
constexpr int kChunk = 64;                      // tokens that one job of copying, selecting or sorting handles

class Run {
 public:
  Run(const Call& call, Workspace& workspace);
  void work(int thread, int threads);
  bool finish() const;  // once all threads are back

 private:
  struct Tokens {  // of a tile, or of a chunk of a tile
    int64_t first;
    int count;
  };

  Tokens tile_of(int64_t step) const {
    const int64_t first = step / kPhases * tile_;
    return {first, int(std::min<int64_t>(tile_, c_.tokens - first))};
  }
  int chunks(Tokens tile) const { return int(ceil_div(tile.count, kChunk)); }

  void reserve(int threads);
  void open(int64_t step);
  void job(int64_t step, int job, int thread);
  void copy_x(Tokens tile, int job);
  const char* row32(Tokens tile, int t) const;
  const char* expert_row(Tokens tile, int t) const;
  int score_rows() const { return tiled_scores_ ? kScoreRows : kRows; }
  int score_jobs(Tokens tile) const;
  void score(Tokens tile, int job, int thread);
  void choose(Tokens tile, int job, int thread);
  int choose_one(int64_t token, const float* scores, int32_t* scratch, int32_t* chosen, float* weight);
  void plan(Tokens tile);
  int64_t most_pieces() const;
  void add(const Piece& piece);
  void add_pieces(const Bank& bank, bool shared, int expert, int row, int rows);
  void add_single(int expert, int row);
  bool multiply_all(Tokens tile, int pairs) const;
  void add_all(Tokens tile);
  void scatter(Tokens tile, int job);
  void up(Tokens tile, const Piece& piece, int thread);
  void up_all(Tokens tile, const Piece& piece, int thread);
  void up_experts(Tokens tile, const Piece& piece, int thread);
  void down(Tokens tile, int slice, int thread);
  void add_down(const Bank& bank, int expert, int first, int rows, bool alone, float* y, int64_t stride, int token0,
                int panel0, int panel1, int next, char* scratch);
  void add_joined(int thread, float* y, int64_t stride, int token0, int token1, int panel0, int panel1);
  void clear_joined(Tokens tile, int job);
  char* hidden_of(const Bank& bank, int expert, int pair, int token) const;
  void finish_y(float* y, int64_t stride, int rows, int column0, int column1);
  void write_y(Tokens tile, const float* y, int64_t stride, int token0, int token1, int column0, int column1);

  float* thread_sums(int thread) { return ws_.threads.as<float>() + thread * thread_floats_; }
  int32_t* thread_keys(int thread) { return reinterpret_cast<int32_t*>(thread_sums(thread) + sums_floats_); }
  // For joined experts: the hidden values of a token, and which parts of them some token of a block has.
  int64_t joined_row() const { return int64_t(c_.routed->hidden_row()) * hidden_bytes_; }
  int joined_parts() const { return TileCut(c_.routed->down_neurons()).parts; }
  float* thread_y(int thread) { return thread_sums(thread) + sums_floats_ + keys_floats_; }

  const Call& c_;
  Workspace& ws_;
  const Kernels& k_;
  const bool tiled_, dot_;
  bool tiled_scores_ = false;  // the router's fp32 weights are multiplied in AMX
  const int experts_, capacity_;
  int tile_, score_stride_ = 0;
  int64_t steps_ = 0;
  bool weighted_, copy32_, copy16_, joined_;
  int hidden_bytes_;  // of a value
  int64_t x_stride_ = 0;
  int64_t sums_floats_ = 0, keys_floats_ = 0, y_floats_ = 0, thread_floats_ = 0;
  int together_ = 1;  // experts of a piece, with a single token
  int column_slices_ = 1, token_slices_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<bool> invalid_{false};
  std::atomic<int64_t> spent_[kPhases] = {};
};

}  // namespace moefy
