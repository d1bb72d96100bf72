// Scores in AMX: a router stays fp32 beside bf16 experts, and of bf16 inputs AMX makes its scores in the accuracy of fp32,
// since every fp32 weight is the exact sum of three bf16 values. They are split just before they are multiplied: that
// takes as long as multiplying 16 rows, and no second copy of the router.
#pragma once
#include "amx_row.h"

namespace {

// Groups of 16 columns after each other, in each the parts of the cut, in each three tiles.
struct SplitTiles {
  TileCut cut;
  int64_t split, part, group;  // bytes
  explicit SplitTiles(int inputs) : cut(inputs), split(32 * cut.depth), part(3 * split), group(cut.parts * part) {}
};

// v = part[0] + part[1] + part[2], each with at most 8 significant bits; infinite values are all in part[0].
void split_weights(__m512 v, __m512* part) {
  const __mmask16 infinite = _mm512_fpclass_ps_mask(v, 0x18);
  part[0] = upper(v);
  const __m512 rest = _mm512_maskz_sub_ps(_knot_mask16(infinite), v, part[0]);
  part[1] = upper(rest);
  part[2] = _mm512_sub_ps(rest, part[1]);
}

// Up panels of fp32, two of them to a group; where their number is odd, zeros follow.
void split_up(const Bank& bank, const char* from, int panels, char* to) {
  const SplitTiles layout(bank.width);
  const int64_t bytes = bank.up_panel_bytes();
  alignas(64) uint16_t upper_halves[32];
  for (int i = 0; i < 32; ++i) upper_halves[i] = uint16_t(2 * i + 1);
  const __m512i halves = _mm512_load_si512(upper_halves);
  for (int p = 0; p < panels; p += 2, from += 2 * bytes)
    for (int k = 0, step = 0; k < layout.cut.parts; ++k, to += layout.part)
      for (int row = 0; row < layout.cut.depth / 2; ++row, ++step) {
        const bool inside = step < bank.up_steps();
        __m512 a[3], b[3];
        split_weights(inside ? _mm512_load_ps(from + step * 64) : _mm512_setzero_ps(), a);
        split_weights(inside && p + 1 < panels ? _mm512_load_ps(from + bytes + step * 64) : _mm512_setzero_ps(), b);
        for (int s = 0; s < 3; ++s)
          _mm512_store_si512(to + s * layout.split + row * 64,
                             _mm512_permutex2var_epi16(_mm512_castps_si512(a[s]), halves, _mm512_castps_si512(b[s])));
      }
}

// Sums of two panels for a single row, in the order of the tiles: `second` is null for the last of an odd number.
__m512 split_row(const Bank& bank, const Row& row, const char* first, const char* second) {
  const FlushDenormals flush;
  __m512 total = _mm512_setzero_ps();
  for (int k = 0, step = 0; k < row.cut.parts; ++k) {
    __m512 sum[3][2];
    for (auto& s : sum) s[0] = s[1] = _mm512_setzero_ps();
    for (int end = step + row.cut.depth / 2; step < end; ++step) {
      if (step >= bank.up_steps()) continue;
      const __m512 x = Lanes::pair(row.values + 2 * step).v;  // even and odd inputs are two chains
      __m512 a[3], b[3];
      split_weights(_mm512_load_ps(first + step * 64), a);
      split_weights(second ? _mm512_load_ps(second + step * 64) : _mm512_setzero_ps(), b);
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        sum[s][0] = _mm512_fmadd_ps(x, a[s], sum[s][0]);
        sum[s][1] = _mm512_fmadd_ps(x, b[s], sum[s][1]);
      }
    }
    for (const auto& s : sum) total = _mm512_add_ps(total, Lanes::pair_sum({s[0]}, {s[1]}).v);
  }
  return total;
}

}  // namespace
