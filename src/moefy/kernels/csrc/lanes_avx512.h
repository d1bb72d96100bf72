// 16 lanes as one AVX-512 register.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// For a shuffle of bytes: the low or the high halves of pairs of bf16, as floats.
alignas(16) const __m128i kBf16Bytes[2] = {{0x0504808001008080ll, 0x0d0c808009088080ll},
                                           {0x0706808003028080ll, 0x0f0e80800b0a8080ll}};

struct Lanes {
  static constexpr int kTile = 24;  // accumulators of a tile: 24 + 4 weights + 1 input of 32 registers
  __m512 v;

  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes set(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes pair(const float* p) { return {_mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const unaligned_double*>(p)))}; }
  static Lanes load_f32(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static Lanes load_bf16_low(const char* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
  static Lanes load_bf16_high(const char* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))))};
  }
  static Lanes load_i8(const char* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static Lanes load_f16(const char* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // An operand that is NaN must come out as NaN: both return the second operand then.
  static Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Lanes abs(Lanes a) { return {_mm512_abs_ps(a.v)}; }
  static Lanes round(Lanes a) { return {_mm512_roundscale_ps(a.v, 8)}; }
  // 2^n for whole n in -126..127
  static Lanes exp2(Lanes n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
  static Lanes below(Lanes a, Lanes limit, Lanes yes, Lanes no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_LT_OQ), no.v, yes.v)};
  }
  static unsigned nonzero(Lanes a) { return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
  static Lanes load_bf16(const char* p, int part) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_load_si128(kBf16Bytes + part));
    return {_mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_loadu_si512(p), bytes))};
  }
  // Sums of neighbours: 8 of a, then 8 of b.
  static Lanes pair_sum(Lanes a, Lanes b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
  }
  friend Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }

#ifdef __AVX512BF16__
  static constexpr bool kHasDot = true;
  void store_bf16(char* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }
  static Lanes bits(const char* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes bits32(const char* p) { return {_mm512_castsi512_ps(_mm512_set1_epi32(*reinterpret_cast<const unaligned_int*>(p)))}; }
  static Lanes bits64(const char* p) { return pair(reinterpret_cast<const float*>(p)); }
  // Which of 8 pairs are not 0.
  static unsigned nonzero_pairs(const char* p) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_test_epi32_mask(pairs, pairs);
  }
  // c + low(a) low(b) + high(a) high(b) in every lane
  static Lanes dot(Lanes a, Lanes b, Lanes c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
  }
#else
  static constexpr bool kHasDot = false;
#endif

 private:
  // Inputs are only 4-byte (bf16: 2-byte) aligned.
  typedef double unaligned_double __attribute__((aligned(2), may_alias));
  typedef int unaligned_int __attribute__((aligned(2), may_alias));
};

}  // namespace
