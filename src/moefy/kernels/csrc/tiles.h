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
  int apart = 1;      // of the panels of a tile
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
struct UpF16 : UpF32 {
  static constexpr int kBytes = 32;
  static Lanes weights(const char* w, int) { return Lanes::load_f16(w); }
};
struct UpBf16 : UpF32 {
  static constexpr int kParts = 2, kInputBytes = 16;
  static Lanes weights(const char* w, int part) { return part ? Lanes::load_bf16_high(w) : Lanes::load_bf16_low(w); }
  static Lanes input(const char* row, int k, int part) { return UpF32::input(row, 2 * k + part, 0); }
};
// Inputs of down one by one, for those that are not 0 (sparse.h): a neuron, or with dot a pair of them.
struct FloatInputs {
  static constexpr int kMaskInputs = kLanes;  // of one mask
  static unsigned mask(const char* row, int i) { return Lanes::nonzero(Lanes::load(reinterpret_cast<const float*>(row) + i)); }
  static Lanes one_input(const char* row, int i) { return Lanes::set(reinterpret_cast<const float*>(row)[i]); }
  static size_t input_bytes(int i) { return size_t(i) * 4; }
};
template <class Up>
struct DownBlocks : Up, FloatInputs {
  static constexpr bool kShortPanels = true;
  static constexpr int kInputBytes = 4 * Up::kParts;
  static Lanes input(const char* row, int k, int part) { return one_input(row, Up::kParts * k + part); }
  static size_t bytes_before(int i) { return size_t(i / Up::kParts) * Up::kBytes; }
  static Lanes one(const char* w, int i) { return Up::weights(w + bytes_before(i), 0); }
};
using DownF32 = DownBlocks<UpF32>;
using DownI8 = DownBlocks<UpI8>;
using DownF16 = DownBlocks<UpF16>;
struct DownBf16 : DownBlocks<UpBf16> {
  static Lanes one(const char* w, int i) { return Lanes::load_bf16(w + bytes_before(i), i % 2); }
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
  static constexpr int kInputBytes = 4, kMaskInputs = 8;
  static L input(const char* row, int k, int) { return one_input(row, k); }
  static unsigned mask(const char* row, int i) { return L::nonzero_pairs(row + 4 * i); }
  static L one_input(const char* row, int i) { return L::bits32(row + 4 * i); }
  static size_t input_bytes(int i) { return size_t(i) * 4; }
  static size_t bytes_before(int i) { return size_t(i) * UpDot<L>::kBytes; }
  static L one(const char* w, int i) { return L::bits(w + bytes_before(i)); }
};

// Weights to prefetch while tiles are multiplied, shared by the row tiles of a task. A panel is read once per task, by
// its first row tile, and waited for DRAM there: with the next ones on their way, 256 tokens take 8-18 % less. To L2,
// since in L1 they would push out what is being worked on: another 6-9 %.
struct Ahead {
  const char* weights;
  int first, tiles;  // of the row tiles, which one this is; none: the panel is left to the hardware
  // Small tiles ask at every step, each time `share` bytes further on: most lines several times, which costs less than
  // the branch that would leave those out (4 % with all of a task in L1, AVX2). Tiles of AVX-512 have more to do in a
  // step, and ask for every `tiles`th line.
  static constexpr bool kAlways = Lanes::kTile <= 6;
  int share;  // 0 where there are no tiles: the same line again and again

  Ahead(const char* weights, int tiles, int block)
      : weights(weights), first(0), tiles(tiles), share(tiles ? int(moefy::ceil_div(block, tiles)) : 0) {}
};

// The sums of R rows and P panels.
template <class Format, int R, int P>
inline void products(const Product& job, const char* const* in, float* const* out, const char* weights,
                     const char* fetch, const Ahead& ahead) {
  const size_t next = job.panel_bytes * job.apart;
  const int columns = kLanes * job.apart;
  Lanes sum[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[r][p] = job.add ? Lanes::load(out[r] + p * columns) : Lanes::zero();
  }
  constexpr int line = int(moefy::kAlign) / Format::kBytes;  // blocks of one
  const int every = ahead.tiles * line;
  int wait = every ? ahead.first * line : -1;
  const int advance = Ahead::kAlways ? ahead.share : Format::kBytes;
  for (int k = 0; k < job.steps; ++k, weights += Format::kBytes, fetch += advance) {
    // With one row the hardware alone reaches the limit of DRAM, and this costs 5-20 %.
    if (R > 1 && (Ahead::kAlways || wait-- == 0)) {
      wait = every - 1;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) __builtin_prefetch(fetch + p * next, 0, 2);
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
    for (int p = 0; p < P; ++p) sum[r][p].store(out[r] + p * columns);
  }
}

// The sums of R rows and P panels, and of `count` - 1 further tiles beside them: in one go, since setting up a tile is
// 30 % of the down phase of experts of 8. 64 tokens and more of those take 3-6 % less (bf16 weights 10-17 %), experts of
// 32 up to 3 % less.
template <class Format, int R, int P>
void tile(const Product& job, int row, int panel, int count, const Ahead& ahead) {
  const char* in[R];
  float* out[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    in[r] = job.in[row + r];
    out[r] = job.out[row + r] + panel * kLanes;
  }
  const char* weights = job.weights + panel * job.panel_bytes;
  const char* fetch = ahead.weights + (Ahead::kAlways ? size_t(ahead.first) * job.steps * ahead.share : 0);
  const int beside = job.apart == 1 ? P : 1;
  for (;;) {
    products<Format, R, P>(job, in, out, weights, fetch, ahead);
    if (--count == 0) return;
    weights += beside * job.panel_bytes, fetch += beside * job.panel_bytes;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[r] += beside * kLanes;
  }
}

constexpr int kMaxRows = 6, kMaxPanels = 4;
constexpr int kFewRows = 3;  // of which tiles of AVX2 take two panels and more
using TileFunction = void (*)(const Product&, int row, int panel, int count, const Ahead& ahead);

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

constexpr bool kWide = Lanes::kTile >= 24;
inline bool twice() { return kWide && moefy::two_products(); }  // two products of 512 bits in a cycle

constexpr int max_rows() { return kMaxRows < Lanes::kTile ? kMaxRows : Lanes::kTile; }
// Bytes of weights that share L1 with the rows of a tile. Of 48 KB, as Intel's cores have, 24: with 32 the down phase of
// experts of 64 takes 1-8 % more.
inline size_t in_l1(int rows) { return (rows > max_rows() && twice() ? 24 : 16) << 10; }

constexpr int max_panels(int rows) { return Lanes::kTile / rows < kMaxPanels ? Lanes::kTile / rows : kMaxPanels; }

// Where weights stay in L1 a tile has few steps, and with four panels (AVX-512) y's rows are loaded and stored around
// them in lumps of 24 registers. With two, the down phase takes 5-9 % less with experts of 32, from 128 tokens on, and up
// to 25 % less with experts of 8 (Zen 4). But not with int8, of which experts of 32 take 8 % more (of 8, 6-11 % less).
template <class Format>
int max_panels_in_l1(int rows, int steps) {
  const int most = max_panels(rows);
  const bool two = Format::kBytes == int(moefy::kAlign) || steps <= 8;
  return rows > kFewRows && most > 2 && two ? 2 : most;
}

// `count` things in parts of at most `most`, cut evenly: 13 rows run as 5 + 4 + 4, not as 6 + 6 + 1. The first `longer`
// parts have one more than `size`.
struct Even {
  int parts, size, longer;
  int largest() const { return longer ? size + 1 : size; }
  Even(int count, int most) : parts((count + most - 1) / most), size(count / parts), longer(count - parts * size) {}
  template <class Do>  // run(first, parts, size of a part) for the longer ones, and for the others
  void each(const Do& run) const {
    if (longer) run(0, longer, size + 1);
    if (parts > longer) run(longer * (size + 1), parts - longer, size);
  }
};

// Row tiles run inside a panel group, whose weights stay in L1 or L2.
template <class Format>
void multiply_by_panels(const Product& job, Even rows, Even panels, Ahead ahead) {
  panels.each([&](int first, int groups, int size) {
    for (int g = 0, panel = first; g < groups; ++g, panel += size) {
      const int end = panel + size;
      ahead.weights = end == job.panels ? job.next : job.weights + end * job.panel_bytes;
      ahead.first = 0;
      rows.each([&](int row, int tiles, int height) {
        const TileFunction run = tile_of<Format>(height, size);
        for (int t = 0; t < tiles; ++t, row += height, ++ahead.first) run(job, row, panel, 1, ahead);
      });
    }
  });
}

template <class Format>
void prefetch_panels(const Product& job, const char* ahead, int panels) {
  for (int p = 0; p < panels; ++p)
    for (size_t at = 0; at < size_t(job.steps) * Format::kBytes; at += moefy::kAlign)
      __builtin_prefetch(ahead + p * job.panel_bytes + at);
}

// Where the weights of all panels stay in L1, as in the down phase of experts of 8, panel groups run inside a row tile:
// each row of y is walked through once. Experts of 8 take about 5 % less. With one row, tiles do not prefetch, and the
// panels of the next expert are far away: asking for them here takes 4-23 % off a token of experts of 8.
template <class Format>
void multiply_by_rows(const Product& job, Even rows, Even panels, Ahead ahead) {
  rows.each([&](int row, int tiles, int height) {
    for (int t = 0; t < tiles; ++t, row += height, ++ahead.first)
      panels.each([&](int panel, int groups, int size) {
        const int together = job.rows == 1 ? 1 : groups;
        for (int g = 0; g < groups; g += together, panel += together * size) {
          ahead.weights = job.next + panel * job.panel_bytes;
          tile_of<Format>(height, size)(job, row, panel, together, ahead);
          if (job.rows == 1) prefetch_panels<Format>(job, ahead.weights, size);
        }
      });
  });
}

// Few rows wait for DRAM. Short panels side by side are streams that end before the hardware has found them; a tile of
// panels far apart reads as many long ones. With experts of 32, a token takes 15 % less, 2 to 8 tokens 13-17 %, 16
// tokens 5 %; software prefetch adds nothing to that.
template <class Format>
void multiply_far_apart(Product job) {
  const int streams = max_panels(job.rows), rest = job.panels % streams;
  const Ahead none(job.next, 0, Format::kBytes);
  job.apart = job.panels / streams;
  tile_of<Format>(job.rows, streams)(job, 0, 0, job.apart, none);
  job.apart = 1;
  if (rest) tile_of<Format>(job.rows, rest)(job, 0, job.panels - rest, 1, none);
}

// The same for tiles of one panel: two halves in turns are two streams, with three quarters of the next panel asked for.
// 16 tokens of experts of 8 and 32 take 3-5 % less (bf16 weights 0-1 %), 8 tokens and larger experts as long.
template <class Format>
void multiply_halves(const Product& job) {
  const int half = job.panels / 2;
  const auto panel = [&](int i) { return i < 2 * half ? i % 2 * half + i / 2 : i; };
  const TileFunction run = tile_of<Format>(job.rows, 1);
  Ahead ahead(job.next, 1, Format::kBytes * 3 / 4);
  for (int i = 0; i < job.panels; ++i) {
    ahead.weights = i + 1 < job.panels ? job.weights + panel(i + 1) * job.panel_bytes : job.next;
    run(job, 0, panel(i), 1, ahead);
  }
}

// A single row tile and long panels of which a piece is at hand: three quarters of the next piece are asked for while a
// tile is multiplied. Without its first lines 16 tokens take 10 % more, of fp32; with a line, 2-8 % more.
template <class Format>
void multiply_pieces(const Product& job) {
  const int size = max_panels(job.rows), last = (job.panels - 1) / size * size;
  Ahead ahead(job.weights + size * job.panel_bytes, 1, Format::kBytes * 3 / 4);
  if (last) tile_of<Format>(job.rows, size)(job, 0, 0, last / size, ahead);
  ahead.weights = job.next;
  tile_of<Format>(job.rows, job.panels - last)(job, 0, last, 1, ahead);
}

template <class Format>
void multiply(const Product& job) {
  const bool near = Format::kShortPanels && job.panels * job.panel_bytes < in_l1(job.rows);
  if (Format::kShortPanels && !near && job.rows <= max_rows() && job.panels >= kMaxPanels) {
    const int streams = max_panels(job.rows);
    if (streams == 1) return multiply_halves<Format>(job);
    if (job.rows <= kFewRows) return multiply_far_apart<Format>(job);
  }
  const Even rows(job.rows, max_rows());
  const Even panels(job.panels, near ? max_panels_in_l1<Format>(rows.largest(), job.steps) : max_panels(rows.largest()));
  const bool fetch = Format::kShortPanels || rows.parts > 1;
  const Ahead ahead(job.next, fetch ? rows.parts : 0, Format::kBytes);
  (near ? multiply_by_rows<Format> : multiply_by_panels<Format>)(job, rows, panels, ahead);
}

}  // namespace
