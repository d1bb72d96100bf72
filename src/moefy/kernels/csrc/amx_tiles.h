// Tiles of AMX: rows x 16 sums += rows x depth inputs * depth x 16 weights, bf16 in and fp32 out, one instruction.
// Takes banks that are `tiled` (TileCut in ffn.h), and the router's weights as amx_split.h splits them.
//
// Every sum is one chain over the tiles of depth (within a tile the hardware adds even and odd inputs separately),
// whatever the number of rows, and amx_row.h adds in the same order. So bits do not depend on the batch.
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

constexpr int kAhead = 4;  // tiles of depth that are asked for before they are needed

struct TileProduct {
  int parts, splits;
  const char* in;  // of row 0; bytes to the next row, the next tile of depth, the next split
  int64_t in_row, in_part, in_split;
  int64_t weights_row, weights_part, weights_group;  // bytes to the next row, tile of depth, group of columns
  int64_t out_row;  // bytes
  const uint8_t* needed = nullptr;  // the parts that are not all 0
  bool fetch = false;               // weights that follow, for this is the first to read them
  int64_t beyond = 0;               // bytes that they lie further than `kAhead` tiles
  int weight_splits = 1;            // more than one only where `splits` is one
  int64_t weights_split = 0;        // bytes to the next
};

void prefetch_tile(const char* tile, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(tile + i);
}

// out[block][group] = in . weights for G groups of columns and R blocks of rows, which begin at byte at[block]. Four
// chains of sums hide the latency of the instruction, 52 cycles for one that could begin every 16.
template <int R, int G>
void multiply_tiles(const TileProduct& job, const int64_t* at, const char* weights, float* const* out) {
  static_assert(R * G <= 4);
  asm volatile("" ::: "memory");  // what the tiles read was stored by plain code
  _tile_zero(0);
  if constexpr (R * G > 1) _tile_zero(1);
  if constexpr (R * G > 2) _tile_zero(2);
  if constexpr (R * G > 3) _tile_zero(3);
  const char* in = job.in;
  const int64_t ahead = kAhead * job.weights_part + job.beyond;
  const int64_t at0 = at[0], at1 = at[R > 1], at2 = at[R > 2 ? 2 : 0], at3 = at[R > 3 ? 3 : 0];
  for (int k = 0; k < job.parts; ++k, weights += job.weights_part, in += job.in_part) {
    if (job.needed && !job.needed[k]) continue;
    _tile_loadd(6, weights, job.weights_row);
    if constexpr (G == 2) _tile_loadd(7, weights + job.weights_group, job.weights_row);
    if (job.fetch) {
      prefetch_tile(weights + ahead, job.weights_part);
      if constexpr (G == 2) prefetch_tile(weights + job.weights_group + ahead, job.weights_part);
    }
    const char *part = in, *split = weights;
    for (int s = 0; s < job.splits * job.weight_splits; ++s) {
      if (s > 0) part += job.in_split, split += job.weights_split;
      if (s > 0 && job.weight_splits > 1) {
        _tile_loadd(6, split, job.weights_row);
        if constexpr (G == 2) _tile_loadd(7, split + job.weights_group, job.weights_row);
      }
      _tile_loadd(4, part + at0, job.in_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (G == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R > 1) _tile_loadd(5, part + at1, job.in_row);
      if constexpr (R > 1 && G == 1) _tile_dpbf16ps(1, 5, 6);
      if constexpr (R > 1 && G == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (R > 1 && G == 2) _tile_dpbf16ps(3, 5, 7);
      if constexpr (R > 2) _tile_loadd(4, part + at2, job.in_row);
      if constexpr (R > 2) _tile_dpbf16ps(2, 4, 6);
      if constexpr (R > 3) _tile_loadd(5, part + at3, job.in_row);
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

void multiply_tiles(int R, int G, const TileProduct& job, const int64_t* at, const char* weights, float* const* out) {
  if (G == 2) return (R == 2 ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)(job, at, weights, out);
  switch (R) {
    case 4: return multiply_tiles<4, 1>(job, at, weights, out);
    case 3: return multiply_tiles<3, 1>(job, at, weights, out);
    case 2: return multiply_tiles<2, 1>(job, at, weights, out);
    default: return multiply_tiles<1, 1>(job, at, weights, out);
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

}  // namespace
