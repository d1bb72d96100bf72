// A single row times tiled weights, in plain AVX-512: it reads what one token needs and no more. Of bf16 inputs the sums
// are those of the tiles, bit for bit: within a part even and odd inputs are two chains from 0, whose sum is added to the
// whole (Intel's manual, TDPBF16PS), and denormals count as 0. Tiles alone took 12 to 25 % longer for one token. Inputs
// in fp32 are multiplied as they are: in three splits, as tiles do, a token took 24 to 36 % longer.
#pragma once
#include "amx_tiles.h"

namespace {

struct FlushDenormals {
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
};

// The inputs of one row as fp32, and which pairs of each part are not 0.
struct Row {
  TileCut cut;
  float* values;    // inputs, rounded up to 32
  uint16_t* pairs;  // a bit per pair, for each part
  bool by_pairs = false;  // of many parts less than half of the pairs are needed, as of joined experts
  int64_t padded() const { return round_up(cut.inputs(), 2 * kLanes); }
  Row(int inputs, char* scratch)
      : cut(inputs), values(reinterpret_cast<float*>(scratch)), pairs(reinterpret_cast<uint16_t*>(values + padded())) {}
  void find_pairs() {
    int count = 0;
    for (int part = 0; part < cut.parts; ++part) {
      uint32_t found = 0;
      for (int i = 0; i < cut.depth; i += kLanes) {
        const __mmask16 inside = cut.depth - i >= kLanes ? __mmask16(0xffff) : __mmask16((1u << (cut.depth - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(inside, values + part * cut.depth + i);
        found |= uint32_t(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ)) << i;
      }
      pairs[part] = uint16_t(_pext_u32(found | found >> 1, 0x55555555));
      count += __builtin_popcount(pairs[part]);
    }
    by_pairs = cut.parts > 2 && 4 * count < cut.inputs();
  }
};

__m512 from_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

void load_x(const UpTask& task, Row& row) {
  const int width = task.bank->width;
  for (int64_t k = 0; k < row.padded(); k += kLanes) {
    const int64_t left = width - k;
    const __mmask16 read = left >= kLanes ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
    _mm512_storeu_ps(row.values + k, task.dot ? from_bf16(_mm256_maskz_loadu_epi16(read, task.x[0] + 2 * k))
                                              : _mm512_maskz_loadu_ps(read, task.x[0] + 4 * k));
  }
  row.find_pairs();
}

void load_hidden(const char* hidden, int64_t stride, bool dot, Row& row) {
  for (int64_t k = 0; k < row.padded(); k += kLanes) {
    __m512 sum = _mm512_setzero_ps();
    for (int s = 0; s < tile_splits(dot) && k < stride; ++s)
      sum = _mm512_add_ps(sum, from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(hidden + 2 * (s * stride + k)))));
    _mm512_storeu_ps(row.values + k, sum);
  }
  row.find_pairs();
}

// Asks for the weights of a part's pairs.
template <int P, int Columns>
[[gnu::always_inline]] inline void fetch_pairs(const Row& row, int part, const char* const* weights) {
  for (unsigned left = part < row.cut.parts ? row.pairs[part] : 0; left; left &= left - 1) {
    const int64_t at = int64_t(part) * row.cut.depth * Columns * 2 + __builtin_ctz(left) * Columns * 4;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) __builtin_prefetch(weights[p] + at);
  }
}

// sums[p] = row . weights[p] for P groups of `Columns` columns. The hardware alone is late: with weights asked for 1 KB
// ahead a token's up phase takes 7-14 % less and the down phase 4-9 %, of pieces (experts of 8) 11 % with those of two
// parts ahead, where 1 KB ahead is what no pair needs (bf16 weights, Emerald Rapids).
template <int P, int Columns>
void multiply_row(const Row& row, const char* const* weights, float* const* sums) {
  const FlushDenormals flush;
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  const int64_t ahead = row.by_pairs ? 0 : 1024;
  __m512 sum[P];
  const char* w[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = _mm512_setzero_ps(), w[p] = weights[p];
  for (int part = 0; part < row.cut.parts; ++part) {
    const float* x = row.values + part * row.cut.depth;
    if (row.by_pairs) fetch_pairs<P, Columns>(row, part + 2, weights);
    if (row.pairs[part]) {
      __m512 even[P], odd[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) even[p] = odd[p] = _mm512_setzero_ps();
      for (unsigned left = row.pairs[part]; left; left &= left - 1) {
        const int pair = __builtin_ctz(left);
        const __m512 first = _mm512_set1_ps(x[2 * pair]), second = _mm512_set1_ps(x[2 * pair + 1]);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const char* at = w[p] + pair * Columns * 4;
          __builtin_prefetch(at + ahead);
          const __m512i both = Columns == 16 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(0xff, at);
          even[p] = _mm512_fmadd_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[p]);
          odd[p] = _mm512_fmadd_ps(second, _mm512_castsi512_ps(_mm512_and_si512(both, high)), odd[p]);
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[p] = _mm512_add_ps(sum[p], _mm512_add_ps(even[p], odd[p]));
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) w[p] += row.cut.depth * Columns * 2;
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    _mm512_mask_storeu_ps(sums[p], Columns == 16 ? __mmask16(0xffff) : __mmask16(0xff), sum[p]);
}

template <int Columns>
void multiply_row(int P, const Row& row, const char* const* weights, float* const* sums) {
  switch (P) {
    case 4: return multiply_row<4, Columns>(row, weights, sums);
    case 3: return multiply_row<3, Columns>(row, weights, sums);
    case 2: return multiply_row<2, Columns>(row, weights, sums);
    case 1: return multiply_row<1, Columns>(row, weights, sums);
  }
}

// Groups of columns on their way to multiply_row, four at a time.
template <int Columns>
struct RowGroups {
  explicit RowGroups(const Row& row) : row(row) {}
  const Row& row;
  int count = 0;
  const char* weights[4] = {};
  float* sums[4] = {};
  void add(const char* from, float* to) {
    weights[count] = from, sums[count] = to;
    if (++count == 4) flush();
  }
  void flush() {
    multiply_row<Columns>(count, row, weights, sums);
    count = 0;
  }
};

}  // namespace
