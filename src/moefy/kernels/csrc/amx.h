// Tiles of AMX: rows x 16 sums += rows x depth inputs * depth x 16 weights, bf16 in and fp32 out, one instruction.
// Included after kernels.h by isa_amx.cpp. Takes banks that are `tiled` (TileCut in ffn.h).
//
// Every sum is one chain over the tiles of depth (within a tile the hardware adds even and odd inputs separately),
// whatever the number of rows; a single token goes through the same instruction. So bits do not depend on the batch.
#pragma once
#include "kernels.h"

namespace {

constexpr int kTileRows = 16;

// Rows are cut into blocks of one size; where they do not add up, the last one begins earlier and repeats a few.
struct Blocks {
  int rows, count, size;
  explicit Blocks(int rows) : rows(rows), count(int(ceil_div(rows, kTileRows))), size(int(ceil_div(rows, count))) {}
  int first(int block) const { return (block + 1) * size <= rows ? block * size : rows - size; }
  int fresh(int block) const { return block * size; }  // the first row that no block before it has
};

// Tiles 0-3 are sums, 4 and 5 inputs, 6 and 7 weights.
void set_tiles(int rows, int depth, int columns) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = uint8_t(i < 6 ? rows : depth / 2);
    config.bytes[i] = uint16_t(i == 4 || i == 5 ? depth * 2 : columns * 4);
  }
  _tile_loadconfig(&config);
}

struct TileProduct {
  int parts, splits;
  const char* in;  // of row 0; bytes to the next row, the next tile of depth, the next split
  int64_t in_row, in_part, in_split;
  int64_t weights_row, weights_part, weights_group;  // bytes to the next row, tile of depth, group of columns
  int64_t out_row;  // bytes
};

// out[block][group] = in . weights for G groups of columns and R blocks of rows, which begin at row[block]. Four chains
// of sums hide the latency of the instruction, 52 cycles for one that could begin every 16.
template <int R, int G>
void multiply_tiles(const TileProduct& job, const int* row, const char* weights, float* const* out) {
  static_assert(R * G <= 4);
  asm volatile("" ::: "memory");  // what the tiles read was stored by plain code
  _tile_zero(0);
  if constexpr (R * G > 1) _tile_zero(1);
  if constexpr (R * G > 2) _tile_zero(2);
  if constexpr (R * G > 3) _tile_zero(3);
  const char* in = job.in;
  const int64_t row0 = row[0] * job.in_row, row1 = row[R > 1] * job.in_row;
  const int64_t row2 = row[R > 2 ? 2 : 0] * job.in_row, row3 = row[R > 3 ? 3 : 0] * job.in_row;
  for (int k = 0; k < job.parts; ++k, weights += job.weights_part, in += job.in_part) {
    _tile_loadd(6, weights, job.weights_row);
    if constexpr (G == 2) _tile_loadd(7, weights + job.weights_group, job.weights_row);
    const char* part = in;
    for (int s = 0; s < job.splits; ++s, part += job.in_split) {
      _tile_loadd(4, part + row0, job.in_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (G == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R > 1) _tile_loadd(5, part + row1, job.in_row);
      if constexpr (R > 1 && G == 1) _tile_dpbf16ps(1, 5, 6);
      if constexpr (R > 1 && G == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (R > 1 && G == 2) _tile_dpbf16ps(3, 5, 7);
      if constexpr (R > 2) _tile_loadd(4, part + row2, job.in_row);
      if constexpr (R > 2) _tile_dpbf16ps(2, 4, 6);
      if constexpr (R > 3) _tile_loadd(5, part + row3, job.in_row);
      if constexpr (R > 3) _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, out[0], job.out_row);
  if constexpr (R * G > 1) _tile_stored(1, out[1], job.out_row);
  if constexpr (R * G > 2) _tile_stored(2, out[2], job.out_row);
  if constexpr (R * G > 3) _tile_stored(3, out[3], job.out_row);
  asm volatile("" ::: "memory");
}

constexpr int most_blocks(int groups) { return groups == 2 ? 2 : 4; }

void multiply_tiles(int R, int G, const TileProduct& job, const int* row, const char* weights, float* const* out) {
  if (G == 2) return (R == 2 ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)(job, row, weights, out);
  switch (R) {
    case 4: return multiply_tiles<4, 1>(job, row, weights, out);
    case 3: return multiply_tiles<3, 1>(job, row, weights, out);
    case 2: return multiply_tiles<2, 1>(job, row, weights, out);
    default: return multiply_tiles<1, 1>(job, row, weights, out);
  }
}

// ---- bf16 parts of fp32 values

// The upper half of the bits: at most 8 of 24 significant ones, never more than the value, so nothing overflows.
__m512 upper(__m512 v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(int(0xffff0000))));
}

__m256i upper_half(__m512 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); }

// v = part 0 + part 1 + part 2, exactly, each rounded to bf16 already; infinite values are all in part 0.
void split(__m512 v, __m256i* part) {
  const __m512 first = upper(v);
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
  const __m512 rest = _mm512_maskz_sub_ps(finite, v, first), second = upper(rest);
  part[0] = upper_half(first);
  part[1] = upper_half(second);
  part[2] = upper_half(_mm512_sub_ps(rest, second));
}

// Sums of a panel as a tile leaves them: 8 neurons.
struct TiledSums {
  static constexpr int kFloats = kNeurons;
  static Lanes load(const float* first, const float* second) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(first));
    return {_mm512_insertf32x8(low, second ? _mm256_loadu_ps(second) : _mm256_setzero_ps(), 1)};
  }
  static void store(const UpTask& task, Lanes h, char* out, int column) {
    if (task.dot) return store_bf16(h, out + 2 * column);
    __m256i part[3];
    split(h.v, part);
    for (int s = 0; s < 3; ++s)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * (s * task.bank->hidden_stride() + column)), part[s]);
  }
};

// Rows of x to tiles: [split][tile of depth][row][depth], zero padded. Reads nothing beyond `width`.
void gather(const UpTask& task, TileCut cut, char* to) {
  const int width = task.bank->width;
  const int64_t row_bytes = cut.depth * 2, part_bytes = task.rows * row_bytes, split_bytes = cut.parts * part_bytes;
  for (int r = 0; r < task.rows; ++r)
    for (int k = 0, part = 0; part < cut.parts; ++part, k += cut.depth) {
      char* row = to + part * part_bytes + r * row_bytes;
      const int count = width - k < cut.depth ? (width > k ? width - k : 0) : cut.depth;
      const __mmask32 read = uint32_t((uint64_t(1) << count) - 1), write = uint32_t((uint64_t(1) << cut.depth) - 1);
      if (task.dot) {
        _mm512_mask_storeu_epi16(row, write, _mm512_maskz_loadu_epi16(read, task.x[r] + 2 * k));
        continue;
      }
      const float* x = reinterpret_cast<const float*>(task.x[r]) + k;
      __m256i low[3], high[3];
      split(_mm512_maskz_loadu_ps(__mmask16(read), x), low);
      split(_mm512_maskz_loadu_ps(__mmask16(read >> 16), x + 16), high);
      for (int s = 0; s < 3; ++s)
        _mm512_mask_storeu_epi16(row + s * split_bytes, write,
                                 _mm512_inserti64x4(_mm512_castsi256_si512(low[s]), high[s], 1));
    }
}

// ---- the function table

// sums[row][panel][8 neurons] = x . up of the panels from panel0 on
void multiply_up(const UpTask& task, int panel0, int panels, const char* x, float* sums) {
  const Bank& bank = *task.bank;
  const TileCut cut(bank.width);
  const Blocks blocks(task.rows);
  const int64_t row_bytes = cut.depth * 2, part_bytes = task.rows * row_bytes, panel_bytes = bank.up_panel_bytes();
  TileProduct job{cut.parts, tile_splits(task.dot), x, row_bytes, part_bytes, cut.parts * part_bytes,
                  64, 32 * cut.depth, 2 * panel_bytes, int64_t(panels) * kNeurons * 4};
  const char* weights = bank.up + (int64_t(task.expert) * bank.up_panels() + panel0) * panel_bytes;
  set_tiles(blocks.size, cut.depth, kLanes);
  for (int panel = 0, G = 0; panel < panels; panel += 2 * G) {
    const int left = panels - panel;
    G = left >= 4 ? 2 : 1;
    if (left == 1) {  // a panel alone has rows of 8 columns
      set_tiles(blocks.size, cut.depth, kNeurons);
      job.weights_row = 32, job.weights_part = 16 * cut.depth;
    }
    for (int b = 0, R; b < blocks.count; b += R) {
      R = blocks.count - b < most_blocks(G) ? blocks.count - b : most_blocks(G);
      int row[4];
      float* out[4];
      for (int i = 0; i < R; ++i) {
        row[i] = blocks.first(b + i);
        for (int g = 0; g < G; ++g) out[i * G + g] = sums + (row[i] * panels + panel + 2 * g) * kNeurons;
      }
      multiply_tiles(R, G, job, row, weights + panel * panel_bytes, out);
    }
  }
  _tile_release();
}

void up_tiled(const UpTask& task) {
  const Bank& bank = *task.bank;
  if (!bank.tiled) return up(task);
  const int panel0 = task.unit0 * bank.unit_panels(), end = task.unit1 * bank.unit_panels();
  const int panels = (end < bank.up_panels() ? end : bank.up_panels()) - panel0;
  char* x = reinterpret_cast<char*>(task.scratch);
  float* sums = task.scratch + tile_scratch(bank.width, task.dot) / 4;
  gather(task, TileCut(bank.width), x);
  multiply_up(task, panel0, panels, x, sums);
  const FinishRow finish = finish_of<TiledSums>(bank);
  for (int r = 0; r < task.rows; ++r, sums += panels * kNeurons)
    finish(task, sums, task.weight ? task.weight[r] : 1.f, task.out[r]);
}

void up_row_tiled(const UpTask* tasks, int count) {
  if (!tasks->bank->tiled) return up_row(tasks, count);
  for (int i = 0; i < count; ++i) up_tiled(tasks[i]);
}

// The sums of some blocks of rows and one or two panels of columns, on their way to y.
struct Pending {
  int block = 0, blocks = 0, panel = 0, panels = 0;
  alignas(64) float sums[4][kTileRows][kLanes];
};

template <int G>
void add_to_y(const DownTask& task, const Blocks& blocks, const Pending& from) {
  for (int i = 0; i < from.blocks; ++i) {
    const int first = blocks.first(from.block + i), end = first + blocks.size;
    const int64_t column = from.panel * kLanes;
    const float (*sums)[kLanes] = from.sums[i * G] - first;
    for (int r = blocks.fresh(from.block + i); r < end; ++r) {
      float* y = task.y[r] + column;
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g)
        (Lanes::load(y + g * kLanes) + Lanes::load(sums[g * kTileRows + r])).store(y + g * kLanes);
    }
  }
}

void add_to_y(const DownTask& task, const Blocks& blocks, const Pending& from) {
  (from.panels == 2 ? add_to_y<2> : add_to_y<1>)(task, blocks, from);
}

void down_tiled(const DownTask& task) {
  const Bank& bank = *task.bank;
  if (!bank.tiled) return down(task);
  const TileCut cut(bank.neurons);
  const Blocks blocks(task.rows);
  const int64_t stride = bank.hidden_stride() * 2, panel_bytes = bank.down_panel_bytes();
  // Hidden rows of an expert follow each other.
  const TileProduct job{cut.parts, tile_splits(task.dot), task.hidden[0], stride * tile_splits(task.dot),
                        cut.depth * 2, stride, 64, 32 * cut.depth, panel_bytes, 64};
  const char* weights = bank.down + (int64_t(task.expert) * bank.down_panels() + task.panel0) * panel_bytes;
  const int panels = task.panel1 - task.panel0;
  set_tiles(blocks.size, cut.depth, kLanes);
  Pending pending[2];  // one is added while the other is computed
  int turn = 0;
  for (int panel = 0; panel < panels; panel += 2) {
    const int G = panel + 1 < panels ? 2 : 1;
    for (int b = 0, R; b < blocks.count; b += R, turn ^= 1) {
      R = blocks.count - b < most_blocks(G) ? blocks.count - b : most_blocks(G);
      Pending& now = pending[turn];
      now.block = b, now.blocks = R, now.panel = panel, now.panels = G;
      int row[4];
      float* out[4];
      for (int i = 0; i < R; ++i) row[i] = blocks.first(b + i);
      for (int i = 0; i < R * G; ++i) out[i] = now.sums[i][0];
      multiply_tiles(R, G, job, row, weights + panel * panel_bytes, out);
      add_to_y(task, blocks, pending[turn ^ 1]);
    }
  }
  add_to_y(task, blocks, pending[turn ^ 1]);
  _tile_release();
}

}  // namespace
