// The phases for banks that are `tiled`, and the scores of bf16 inputs: rows of x are gathered into tiles, multiplied
// (amx_tiles.h, or amx_row.h for a single row) and finished as everywhere. Other banks go to kernels.h. Included by
// isa_amx.cpp after its lanes.
#pragma once
#include "amx_split.h"

namespace {

// Sums of a panel as a tile leaves them: 8 neurons.
struct TiledSums {
  static constexpr int kFloats = kNeurons;
  static Lanes load(const float* first, const float* second) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(first));
    return {_mm512_insertf32x8(low, second ? _mm256_loadu_ps(second) : _mm256_setzero_ps(), 1)};
  }
  static void store(const UpTask& task, Lanes h, char* out, int column) {
    const Bank& bank = *task.bank;
    // The neighbours of a joined expert are others.
    const __mmask16 mine = bank.joined ? __mmask16((1u << bank.neurons) - 1) : __mmask16(0xffff);
    __m256i part[3];
    if (task.dot)
      part[0] = (__m256i)_mm512_cvtneps_pbh(h.v);
    else
      split(h.v, part);
    for (int s = 0; s < tile_splits(task.dot); ++s)
      _mm256_mask_storeu_epi16(out + 2 * (s * bank.hidden_row() + column), mine, part[s]);
  }
};

struct TiledScores : TiledSums {
  static void store(const UpTask&, Lanes h, char* out, int column) { h.store(reinterpret_cast<float*>(out) + column); }
};

// Rows of x to tiles: [split][block][tile of depth][row][depth], zero padded. Reads nothing beyond `width`. Blocks
// come first, since tiles of one block are 1 KB apart; 64 rows between them would be 4 KB, all in one set of L1.
struct Gathered {
  TileCut cut;
  int64_t row, part, block, split;  // bytes
  Gathered(int width, const Blocks& blocks)
      : cut(width), row(cut.depth * 2), part(blocks.size * row), block(cut.parts * part), split(blocks.count * block) {}
};

void gather_row(const UpTask& task, const char* x, const Gathered& layout, char* to) {
  const int width = task.bank->width, depth = layout.cut.depth;
  const __mmask32 write = uint32_t((uint64_t(1) << depth) - 1);
  for (int k = 0; k < layout.cut.inputs(); k += depth, to += layout.part) {
    const int count = width - k < depth ? (width > k ? width - k : 0) : depth;
    const __mmask32 read = uint32_t((uint64_t(1) << count) - 1);
    if (task.dot) {
      _mm512_mask_storeu_epi16(to, write, _mm512_maskz_loadu_epi16(read, x + 2 * k));
      continue;
    }
    __m256i low[3], high[3];
    split(_mm512_maskz_loadu_ps(__mmask16(read), x + 4 * k), low);
    split(_mm512_maskz_loadu_ps(__mmask16(read >> 16), x + 4 * k + 64), high);
    for (int s = 0; s < 3; ++s)
      _mm512_mask_storeu_epi16(to + s * layout.split, write,
                               _mm512_inserti64x4(_mm512_castsi256_si512(low[s]), high[s], 1));
  }
}

void gather(const UpTask& task, char* to) {
  const Blocks blocks(task.rows);
  const Gathered layout(task.bank->width, blocks);
  for (int b = 0; b < blocks.count; ++b)
    for (int r = 0; r < blocks.size; ++r)
      gather_row(task, task.x[blocks.first(b) + r], layout, to + b * layout.block + r * layout.row);
}

// ---- up

const char* up_panel(const Bank& bank, int expert, int panel) {
  return bank.up + (int64_t(expert) * bank.up_panels() + panel) * bank.up_panel_bytes();
}

void up_one_row(const UpTask* tasks, int count, int panel0, int panels) {
  const Bank& bank = *tasks->bank;
  Row row(bank.width, reinterpret_cast<char*>(tasks->scratch));
  load_x(*tasks, row);
  float* sums = tasks->scratch + tile_scratch(bank.width, tasks->dot) / 4;
  RowGroups<16> pairs(row);
  RowGroups<8> alone(row);
  for (int i = 0; i < count; ++i)
    for (int p = 0; p < panels; p += 2) {
      const char* weights = up_panel(bank, tasks[i].expert, panel0 + p);
      float* to = sums + (i * panels + p) * kNeurons;
      p + 1 < panels ? pairs.add(weights, to) : alone.add(weights, to);
    }
  pairs.flush(), alone.flush();
  const FinishRow finish = finish_of<TiledSums>(bank);
  for (int i = 0; i < count; ++i, sums += panels * kNeurons)
    finish(tasks[i], sums, tasks[i].weight ? tasks[i].weight[0] : 1.f, tasks[i].out[0]);
}

// y += row . weights for P panels of 16 columns that lie `apart`
void add_panels(int P, int apart, const Row& row, const char* weights, int64_t panel_bytes, float* y) {
  alignas(64) float sums[4][kLanes];
  const char* from[4];
  float* to[4];
  for (int p = 0; p < P; ++p) from[p] = weights + p * apart * panel_bytes, to[p] = sums[p];
  multiply_row<16>(P, row, from, to);
  for (int p = 0; p < P; ++p, y += apart * kLanes) (Lanes::load(y) + Lanes::load(sums[p])).store(y);
}

// y += row . weights for some panels of 16 columns: four that lie far apart, which are long streams (tiles.h).
void down_one_row(const Row& row, const char* weights, int64_t panel_bytes, int panels, float* y) {
  const int apart = panels / 4, rest = panels % 4, last = 4 * apart;
  for (int p = 0; p < apart; ++p) add_panels(4, apart, row, weights + p * panel_bytes, panel_bytes, y + p * kLanes);
  if (rest) add_panels(rest, 1, row, weights + last * panel_bytes, panel_bytes, y + last * kLanes);
}

// sums[row][panel][8 neurons] = x . weights, which are `panels` up panels of an expert, or of a router after split_up (an
// even number then); x as gather leaves it
void multiply_up(const UpTask& task, const char* weights, int panels, const char* x, float* sums) {
  const Bank& bank = *task.bank;
  const TileCut cut(bank.width);
  const Blocks blocks(task.rows);
  const Gathered layout(bank.width, blocks);
  const SplitTiles split(bank.width);
  const int64_t panel_bytes = bank.tiled ? bank.up_panel_bytes() : split.group / 2;
  TileProduct job{cut.parts, tile_splits(task.dot), x, layout.row, layout.part, layout.split, 64,
                  32 * cut.depth, 2 * panel_bytes, int64_t(panels) * kNeurons * 4};
  if (!bank.tiled) job.weight_splits = 3, job.weights_split = split.split, job.weights_part = split.part, job.in_split = 0;
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
      int64_t at[4];
      float* out[4];
      for (int i = 0; i < R; ++i) {
        at[i] = (b + i) * layout.block;
        for (int g = 0; g < G; ++g) out[i * G + g] = sums + (blocks.first(b + i) * panels + panel + 2 * g) * kNeurons;
      }
      job.fetch = b == 0 && bank.tiled;
      multiply_tiles(R, G, job, at, weights + panel * panel_bytes, out);
    }
  }
  _tile_release();
}

// Scores of bf16 inputs.
void score(const UpTask& task, const char* weights, int panels) {
  const Bank& bank = *task.bank;
  const FinishRow finish = finish_of<TiledScores>(bank);
  if (task.rows == 1) {
    Row row(bank.width, reinterpret_cast<char*>(task.scratch));
    load_x(task, row);
    float* sums = task.scratch + tile_scratch(bank.width, true) / 4;
    const int64_t bytes = bank.up_panel_bytes();
    for (int p = 0; p < panels; p += 2)
      _mm512_store_ps(sums + p * kNeurons, split_row(bank, row, weights + p * bytes,
                                                     p + 1 < panels ? weights + (p + 1) * bytes : nullptr));
    return finish(task, sums, 1.f, task.out[0]);
  }
  const int even = int(round_up(panels, 2)), groups = int(ceil_div(task.rows, kTiledRows));
  char* x = reinterpret_cast<char*>(task.scratch);
  float* const sums = task.scratch + tile_scratch(bank.width, true) / 4;
  char* tiles = reinterpret_cast<char*>(sums + int64_t(kTiledRows) * even * kNeurons);
  split_up(bank, weights, panels, tiles);
  UpTask rows = task;
  for (int g = 0; g < groups; ++g, rows.x += rows.rows, rows.out += rows.rows) {
    rows.rows = task.rows * (g + 1) / groups - task.rows * g / groups;
    gather(rows, x);
    multiply_up(rows, tiles, even, x, sums);
    for (int r = 0; r < rows.rows; ++r) finish(rows, sums + r * even * kNeurons, 1.f, rows.out[r]);
  }
}

void up_tiled(const UpTask& task) {
  const Bank& bank = *task.bank;
  const int panel0 = task.unit0 * bank.unit_panels(), end = task.unit1 * bank.unit_panels();
  const int panels = (end < bank.up_panels() ? end : bank.up_panels()) - panel0;
  const char* weights = up_panel(bank, task.expert, panel0);
  if (!bank.tiled) return task.dot && bank.up_type == Weights::f32 ? score(task, weights, panels) : up(task);
  if (task.rows == 1) return up_one_row(&task, 1, panel0, panels);
  char* x = reinterpret_cast<char*>(task.scratch);
  float* sums = task.scratch + tile_scratch(bank.width, task.dot) / 4;
  gather(task, x);
  multiply_up(task, weights, panels, x, sums);
  const FinishRow finish = finish_of<TiledSums>(bank);
  for (int r = 0; r < task.rows; ++r, sums += panels * kNeurons)
    finish(task, sums, task.weight ? task.weight[r] : 1.f, task.out[r]);
}

void up_row_tiled(const UpTask* tasks, int count) {
  if (!tasks->bank->tiled) return up_row(tasks, count);
  up_one_row(tasks, count, 0, tasks->bank->up_panels());
}

// Experts whose panels are in pairs follow each other like one large expert.
void up_joined(const JoinedUpTask& task) {
  UpTask rows = task.rows;
  const Bank& bank = *rows.bank;
  const int panels = bank.up_panels(), together = panels % 2 ? 1 : task.experts;
  char* x = reinterpret_cast<char*>(rows.scratch);
  float* sums = rows.scratch + tile_scratch(bank.width, rows.dot) / 4;
  gather(rows, x);
  rows.unit0 = 0, rows.unit1 = bank.units(), rows.weight = task.weight;
  const FinishRow finish = finish_of<TiledSums>(bank);
  for (int i = 0; i < task.experts; ++i) {
    if (i % together == 0) multiply_up(rows, up_panel(bank, task.rows.expert + i, 0), together * panels, x, sums);
    rows.expert = task.rows.expert + i;
    for (int pair = task.begin[i]; pair < task.end[i]; ++pair) {
      const int row = task.token[pair] - task.token0;
      finish(rows, sums + (row * together + i % together) * panels * kNeurons, task.weight ? task.weight[pair] : 1.f,
             task.hidden + (task.token0 + row) * task.hidden_row + int64_t(rows.expert) * bank.neurons * 2);
    }
  }
}

// ---- down

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
    const float (*sums)[kLanes] = from.sums[i * G];
    for (int r = blocks.fresh(from.block + i); r < end; ++r) {
      float* y = task.y[r] + column;
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g)
        (Lanes::load(y + g * kLanes) + Lanes::load(sums[g * kTileRows + r - first])).store(y + g * kLanes);
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
  TileProduct job{cut.parts, tile_splits(task.dot), task.hidden[0], stride * tile_splits(task.dot),
                  cut.depth * 2, stride, 64, 32 * cut.depth, panel_bytes, 64};
  const char* weights = bank.down + (int64_t(task.expert) * bank.down_panels() + task.panel0) * panel_bytes;
  const int panels = task.panel1 - task.panel0;
  if (task.rows == 1 && (task.dot || task.alone)) {  // with fp32 x a tile's sums are others
    Row row(bank.neurons, task.scratch);
    load_hidden(task.hidden[0], bank.hidden_stride(), task.dot, row);
    return down_one_row(row, weights, panel_bytes, panels, task.y[0]);
  }
  set_tiles(blocks.size, cut.depth, kLanes);
  // From what lies behind this slice, which is another thread's, to that of the next expert (for panels of up to 64
  // neurons): of experts of 32 the phase takes 4-15 % less with 4 to 64 tokens (Emerald Rapids).
  const int64_t beyond = (int64_t(task.next - task.expert) * bank.down_panels() - panels) * panel_bytes;
  Pending pending[2];  // one is added while the other is computed
  int turn = 0;
  for (int panel = 0; panel < panels; panel += 2) {
    const int G = panel + 1 < panels ? 2 : 1;
    for (int b = 0, R; b < blocks.count; b += R, turn ^= 1) {
      R = blocks.count - b < most_blocks(G) ? blocks.count - b : most_blocks(G);
      Pending& now = pending[turn];
      now.block = b, now.blocks = R, now.panel = panel, now.panels = G;
      int64_t at[4];
      float* out[4];
      job.fetch = b == 0;
      job.beyond = panel * panel_bytes + kAhead * job.weights_part >= panels * panel_bytes ? beyond : 0;
      for (int i = 0; i < R; ++i) at[i] = blocks.first(b + i) * job.in_row;
      for (int i = 0; i < R * G; ++i) out[i] = now.sums[i][0];
      multiply_tiles(R, G, job, at, weights + panel * panel_bytes, out);
      add_to_y(task, blocks, pending[turn ^ 1]);
    }
  }
  add_to_y(task, blocks, pending[turn ^ 1]);
  _tile_release();
}

void down_joined(const JoinedTask& task) {
  const Bank& bank = *task.bank;
  const TileCut cut(bank.down_neurons());
  const int64_t stride = bank.hidden_row() * 2, row_bytes = stride * tile_splits(task.dot);
  const int64_t panel_bytes = bank.down_panel_bytes();
  const char* weights = bank.down + task.panel0 * panel_bytes;
  const int panels = task.panel1 - task.panel0;
  if (task.rows == 1) {
    Row row(bank.down_neurons(), task.scratch);
    load_hidden(task.hidden, bank.hidden_row(), task.dot, row);
    return down_one_row(row, weights, panel_bytes, panels, task.y);
  }
  TileProduct job{cut.parts, tile_splits(task.dot), task.hidden, row_bytes, cut.depth * 2, stride,
                  64, 32 * cut.depth, panel_bytes, 2 * kLanes * 4};
  set_tiles(task.rows < kTileRows ? task.rows : kTileRows, cut.depth, kLanes);
  alignas(64) float sums[kJoinedRows][2 * kLanes];
  float* out[4] = {sums[0], sums[0] + kLanes, sums[kTileRows], sums[kTileRows] + kLanes};
  const int64_t at[] = {0, kTileRows * row_bytes};
  for (int panel = 0; panel < panels; panel += 2) {
    const int G = panel + 1 < panels ? 2 : 1;
    job.needed = task.needed;
    for (int r = 0; r < task.rows; r += kJoinedRows, job.needed += cut.parts) {
      const int rows = task.rows - r < kJoinedRows ? task.rows - r : kJoinedRows, R = rows > kTileRows ? 2 : 1;
      job.in = task.hidden + r * row_bytes;
      job.fetch = r == 0;
      float* where[4] = {out[0], out[G == 2 ? 1 : 2], out[2], out[3]};
      multiply_tiles(R, G, job, at, weights + panel * panel_bytes, where);
      for (int i = 0; i < rows; ++i)
        for (int g = 0; g < G; ++g) {
          float* y = task.y + (r + i) * task.y_row + (panel + g) * kLanes;
          (Lanes::load(y) + Lanes::load(sums[i] + g * kLanes)).store(y);
        }
    }
  }
  _tile_release();
}

}  // namespace
