// The down phase without products with hidden values that are 0: with ReLU half of them for random weights, and eight
// or nine of ten in trained models. Such a product adds nothing, so the sums are those of tiles.h bit for bit, but
// where nothing else is added to a bias of -0 or, with dot, to a denormal (it would be flushed), and where weights are not
// finite. Rows have their zeros in different places, so a tile here is one row and many panels: as many loads as products,
// which the cores make as fast as the products alone, but for Intel's (has_zeros).
#pragma once
#include "tiles.h"

namespace {

constexpr int kSparsePanels = kWide ? 8 : Lanes::kTile >= 6 ? 4 : 3;  // sums of a row, in registers
constexpr int kMaskBits = 64;  // inputs of a chunk: its weights are at most 32 KB of eight panels

// Which of `count` inputs of a row from `first` on are not 0; rows end at a multiple of 16 values.
template <class Format>
uint64_t nonzero(const char* row, int first, int count) {
  uint64_t mask = 0;
  for (int i = 0; i < count; i += Format::kMaskInputs) mask |= uint64_t(Format::mask(row, first + i)) << i;
  return count < kMaskBits ? mask & ((uint64_t(1) << count) - 1) : mask;
}

template <class Format, int P>
void add_row(const char* in, uint64_t mask, const char* weights, size_t panel_bytes, float* out) {
  Lanes sum[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = Lanes::load(out + p * kLanes);
  for (; mask; mask &= mask - 1) {
    const int i = __builtin_ctzll(mask);
    const Lanes x = Format::one_input(in, i);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = Format::multiply(x, Format::one(weights + p * panel_bytes, i), sum[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p].store(out + p * kLanes);
}

template <class Format, int P = kSparsePanels>
void add_row(int panels, const char* in, uint64_t mask, const char* weights, size_t panel_bytes, float* out) {
  if constexpr (P > 1) {
    if (panels < P) return add_row<Format, P - 1>(panels, in, mask, weights, panel_bytes, out);
  }
  add_row<Format, P>(in, mask, weights, panel_bytes, out);
}

// The `part`th of `parts` pieces of `bytes` of each panel. Inlined: GCC leaves out calls that do nothing but prefetch.
[[gnu::always_inline]] inline void fetch(const char* weights, int panels, size_t panel_bytes, size_t bytes, int part,
                                         int parts) {
  const int lines = int(moefy::ceil_div(bytes, moefy::kAlign)), all = panels * lines;
  int at = int(int64_t(all) * part / parts);
  const int end = int(int64_t(all) * (part + 1) / parts);
  while (at < end) {
    const int panel = at / lines, first = at % lines;
    const int last = end - at < lines - first ? first + end - at : lines;
    const char* line = weights + panel * panel_bytes + first * moefy::kAlign;
    for (int i = first; i < last; ++i, line += moefy::kAlign) __builtin_prefetch(line, 0, 2);
    at += last - first;
  }
}

// Cache lines of a panel that hold the weights of some inputs.
template <class Format>
int lines_of(uint64_t mask) {
  constexpr int inputs = int(moefy::kAlign) * Format::kParts / Format::kBytes;  // of one line
  uint64_t first = ~uint64_t(0);
  for (int i = 1; i < inputs; i *= 2) mask |= mask >> i;
  if (inputs > 1) first = ~uint64_t(0) / ((uint64_t(1) << inputs) - 1);
  return __builtin_popcountll(mask & first);
}

// Some inputs of all rows and panels; `next`: the weights of the chunk after this one, or of the next expert.
template <class Format>
void add_chunk(const Product& job, int first, int count, const char* next) {
  uint64_t masks[moefy::kDownRows], any = 0;
  for (int r = 0; r < job.rows; ++r) any |= masks[r] = nonzero<Format>(job.in[r], first, count);
  // Reading some of a panel's lines is slower than reading them in a row: half of them take as long as all, a fifth 60 % of
  // it (Zen 4). So all are asked for unless few are needed.
  const size_t bytes = Format::bytes_before(count + Format::kParts - 1);
  const bool all = 3 * size_t(lines_of<Format>(any)) * moefy::kAlign > bytes;
  const char* weights = job.weights + Format::bytes_before(first);
  for (int p = 0; p < job.panels; p += kSparsePanels, weights += kSparsePanels * job.panel_bytes) {
    const int left = job.panels - p, after = left - kSparsePanels > 0 ? left - kSparsePanels : job.panels;
    const char* ahead = left > kSparsePanels ? weights + kSparsePanels * job.panel_bytes : next;
    for (int r = 0; r < job.rows; ++r) {
      if (all) fetch(ahead, after < kSparsePanels ? after : kSparsePanels, job.panel_bytes, bytes, r, job.rows);
      add_row<Format>(left < kSparsePanels ? left : kSparsePanels, job.in[r] + Format::input_bytes(first), masks[r], weights,
                      job.panel_bytes, job.out[r] + p * kLanes);
    }
  }
}

// Whether leaving zeros out pays, by some of the rows. Setting up a row takes as long as one to three products, and weights
// that are widened are so for every row: with experts of 32 and fp32 it pays below 60 % of values other than 0 (AVX2 46 %),
// of 8 below 46 % (AVX2 17 %). Where a core makes two products in a cycle, which loads do not keep up with, it pays below
// 45 % (few rows 37 %), of 8 below 31 % (23 %). Few rows wait for weights, which long panels are read faster for in a row.
template <class Format>
bool has_zeros(const Product& job, int inputs) {
  constexpr bool widened = Format::kBytes < int(moefy::kAlign) || Format::kParts > 1;
  const int limit = (twice() ? 50 : kWide ? 65 : 55) - (widened ? 5 : 0);
  const int few = inputs > kMaskBits ? 28 : twice() ? 42 : widened ? 50 : limit;
  const int step = job.rows > 8 ? job.rows / 8 : 1;
  int64_t seen = 0, cost = 0;  // in hundredths of a product
  for (int r = 0; r < job.rows; r += step, cost += kWide ? 150 : 300)
    for (int first = 0; first < inputs; first += kMaskBits) {
      const int count = inputs - first < kMaskBits ? inputs - first : kMaskBits;
      cost += 100 * __builtin_popcountll(nonzero<Format>(job.in[r], first, count));
      seen += count;
    }
  return cost < seen * (job.rows <= max_rows() ? few : limit);
}

template <class Format>
bool multiply_nonzero(const Product& job) {
  const int inputs = job.steps * Format::kParts;
  if (!has_zeros<Format>(job, inputs)) return false;
  for (int first = 0; first < inputs; first += kMaskBits) {
    const int end = first + kMaskBits;
    add_chunk<Format>(job, first, end < inputs ? kMaskBits : inputs - first,
                      end < inputs ? job.weights + Format::bytes_before(end) : job.next);
  }
  return true;
}

}  // namespace
