// Register tiles: out[row][panel] (+)= sum over k of input[row][k] * weights[panel][k]. Needs Lanes.
//
// Every output lane is one chain of fused multiply-adds in the order of k, whatever the tile, the k chunks (whose
// partial sums go through fp32 memory) or the split over threads. So results do not depend on any of them.
#pragma once
#include "ffn.h"

namespace {

using moefy::kLanes;

struct Product {
  int rows, panels, steps;
  const char* const* in;
  const char* weights;
  size_t panel_bytes;
  float* const* out;  // 16 floats per panel
  bool add;           // to what `out` holds
  const char* next;   // the weights, as many, that will be needed after these
};

// How a block of weights is read and which inputs belong to its lanes; k counts blocks, a bf16 block has two parts.
struct UpF32 {
  static constexpr int kBytes = 64, kParts = 1, kInputBytes = 8;  // of one block
  static constexpr bool kShortPanels = false;
  static Lanes weights(const char* w, int) { return Lanes::load_f32(w); }
  static Lanes input(const char* row, int k, int) { return Lanes::pair(reinterpret_cast<const float*>(row) + 2 * k); }
  static Lanes multiply(Lanes x, Lanes w, Lanes sum) { return Lanes::fma(x, w, sum); }
};
struct UpI8 : UpF32 {
  static constexpr int kBytes = 16;
  static Lanes weights(const char* w, int) { return Lanes::load_i8(w); }
};
struct UpBf16 : UpF32 {
  static constexpr int kParts = 2, kInputBytes = 16;
  static Lanes weights(const char* w, int part) { return part ? Lanes::load_bf16_high(w) : Lanes::load_bf16_low(w); }
  static Lanes input(const char* row, int k, int part) { return UpF32::input(row, 2 * k + part, 0); }
};
struct DownF32 : UpF32 {
  static constexpr bool kShortPanels = true;
  static constexpr int kInputBytes = 4;
  static Lanes input(const char* row, int k, int) { return Lanes::set(reinterpret_cast<const float*>(row)[k]); }
};
struct DownI8 : UpI8 {
  static constexpr bool kShortPanels = true;
  static constexpr int kInputBytes = 4;
  static Lanes input(const char* row, int k, int) { return DownF32::input(row, k, 0); }
};
struct DownBf16 : UpBf16 {
  static constexpr bool kShortPanels = true;
  static constexpr int kInputBytes = 8;
  static Lanes input(const char* row, int k, int part) { return DownF32::input(row, 2 * k + part, 0); }
};
template <class L>
struct UpDot {
  static constexpr int kBytes = 64, kParts = 1, kInputBytes = 8;
  static constexpr bool kShortPanels = false;
  static L weights(const char* w, int) { return L::bits(w); }
  static L input(const char* row, int k, int) { return L::bits64(row + 8 * k); }
  static L multiply(L x, L w, L sum) { return L::dot(x, w, sum); }
};
template <class L>
struct DownDot : UpDot<L> {
  static constexpr bool kShortPanels = true;
  static constexpr int kInputBytes = 4;
  static L input(const char* row, int k, int) { return L::bits32(row + 4 * k); }
};

// Weights to prefetch while a tile is multiplied: every `every`th line from line `first` on, so that the row tiles of a
// task share them; none when `every` is 0. A panel is read once per task, by its first row tile, and waited for DRAM
// there: with the next ones on their way, 256 tokens take 8-18 % less. To L2, since in L1 they would push out what is
// being worked on: another 6-9 %.
struct Ahead {
  const char* weights;
  int first = 0, every = 0;
};

template <class Format, int R, int P>
void tile(const Product& job, int row, int panel, Ahead fetch) {
  const char* in[R];
  float* out[R];
  Lanes sum[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    in[r] = job.in[row + r];
    out[r] = job.out[row + r] + panel * kLanes;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[r][p] = job.add ? Lanes::load(out[r] + p * kLanes) : Lanes::zero();
  }
  const char* weights = job.weights + panel * job.panel_bytes;
  const size_t next = job.panel_bytes;
  constexpr int line = int(moefy::kAlign) / Format::kBytes;  // blocks of one
  const int every = fetch.every * line;
  int wait = every ? fetch.first * line : -1;
  const char* ahead = fetch.weights;
  for (int k = 0; k < job.steps; ++k, weights += Format::kBytes, ahead += Format::kBytes) {
    if (R > 1 && wait-- == 0) {  // with one row the hardware alone reaches the limit of DRAM, and this costs 5-20 %
      wait = every - 1;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) __builtin_prefetch(ahead + p * next, 0, 2);
    }
#pragma GCC unroll 2
    for (int part = 0; part < Format::kParts; ++part) {
      Lanes w[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) w[p] = Format::weights(weights + p * next, part);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Lanes x = Format::input(in[r], k, part);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[r][p] = Format::multiply(x, w[p], sum[r][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[r][p].store(out[r] + p * kLanes);
  }
}

constexpr int kMaxRows = 6, kMaxPanels = 4;
constexpr size_t kInL1 = 16 << 10;  // weights that share L1 with the rows of a tile
using TileFunction = void (*)(const Product&, int row, int panel, Ahead ahead);

template <class Format, int R, int P>
constexpr TileFunction tile_or_none() {
  if constexpr (R * P <= Lanes::kTile) return tile<Format, R, P>;
  return nullptr;
}

template <class Format, int R>
TileFunction tile_of(int panels) {
  static constexpr TileFunction table[] = {tile_or_none<Format, R, 1>(), tile_or_none<Format, R, 2>(),
                                           tile_or_none<Format, R, 3>(), tile_or_none<Format, R, 4>()};
  return table[panels - 1];
}

template <class Format>
TileFunction tile_of(int rows, int panels) {
  static constexpr TileFunction (*table[])(int) = {tile_of<Format, 1>, tile_of<Format, 2>, tile_of<Format, 3>,
                                                   tile_of<Format, 4>, tile_of<Format, 5>, tile_of<Format, 6>};
  return table[rows - 1](panels);
}

constexpr int max_rows() { return kMaxRows < Lanes::kTile ? kMaxRows : Lanes::kTile; }
constexpr int max_panels(int rows) { return Lanes::kTile / rows < kMaxPanels ? Lanes::kTile / rows : kMaxPanels; }

// Row tiles and panel groups are cut evenly: 13 rows run as 5 + 4 + 4, not as 6 + 6 + 1.
struct Cut {
  int row_tiles, groups;
  explicit Cut(const Product& job)
      : row_tiles(int(moefy::ceil_div(job.rows, max_rows()))),
        groups(int(moefy::ceil_div(job.panels, max_panels(int(moefy::ceil_div(job.rows, row_tiles)))))) {}
};

template <class Format>
void prefetch_panels(const Product& job, const char* ahead, int panels) {
  for (int p = 0; p < panels; ++p)
    for (size_t at = 0; at < size_t(job.steps) * Format::kBytes; at += moefy::kAlign)
      __builtin_prefetch(ahead + p * job.panel_bytes + at);
}

// Row tiles run inside a panel group, whose weights stay in L1.
template <class Format>
void multiply_by_panels(const Product& job, Cut cut) {
  for (int g = 0, panel = 0; g < cut.groups; ++g) {
    const int end = job.panels * (g + 1) / cut.groups;
    const bool last = g + 1 == cut.groups;
    const char* ahead = last ? job.next : job.weights + end * job.panel_bytes;
    for (int t = 0, row = 0; t < cut.row_tiles; ++t) {
      const int rows = job.rows * (t + 1) / cut.row_tiles - row;
      const int every = Format::kShortPanels || cut.row_tiles > 1 ? cut.row_tiles : 0;
      tile_of<Format>(rows, end - panel)(job, row, panel, {ahead, t, every});
      row += rows;
    }
    panel = end;
  }
}

// Where the weights of all panels stay in L1, as in the down phase of experts of 8, panel groups run inside a row tile:
// each row of y is walked through once. Experts of 8 take about 5 % less. With one row, tiles do not prefetch, and the
// panels of the next expert are far away: asking for them here takes 4-23 % off a token of experts of 8.
template <class Format>
void multiply_by_rows(const Product& job, Cut cut) {
  for (int t = 0, row = 0; t < cut.row_tiles; ++t) {
    const int rows = job.rows * (t + 1) / cut.row_tiles - row;
    for (int g = 0, panel = 0; g < cut.groups; ++g) {
      const int end = job.panels * (g + 1) / cut.groups;
      tile_of<Format>(rows, end - panel)(job, row, panel, {job.next + panel * job.panel_bytes, t, cut.row_tiles});
      if (job.rows == 1) prefetch_panels<Format>(job, job.next + panel * job.panel_bytes, end - panel);
      panel = end;
    }
    row += rows;
  }
}

template <class Format>
void multiply(const Product& job) {
  if (job.rows == 0 || job.panels == 0) return;
  const bool in_l1 = Format::kShortPanels && job.panels * job.panel_bytes <= kInL1;
  (in_l1 ? multiply_by_rows<Format> : multiply_by_panels<Format>)(job, Cut(job));
}

}  // namespace
