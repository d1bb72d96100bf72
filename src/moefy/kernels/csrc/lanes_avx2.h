// 16 lanes as two AVX2 registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// For a shuffle of bytes: the low or the high halves of pairs of bf16, as floats.
alignas(16) const __m128i kBf16Bytes[2] = {{0x0504808001008080ll, 0x0d0c808009088080ll},
                                           {0x0706808003028080ll, 0x0f0e80800b0a8080ll}};

struct Lanes {
  static constexpr int kTile = 6;  // 6 x 2 accumulators + 2 weights + 1 input of 16 registers
  static constexpr bool kHasDot = false;
  __m256 a, b;

  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Lanes set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes pair(const float* p) {
    __m256 x = _mm256_castpd_ps(_mm256_set1_pd(*reinterpret_cast<const unaligned_double*>(p)));
    return {x, x};
  }
  static Lanes load_f32(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static Lanes load_bf16_low(const char* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(raw(p), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(raw(p + 32), 16))};
  }
  static Lanes load_bf16_high(const char* p) {
    const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(raw(p), mask)), _mm256_castsi256_ps(_mm256_and_si256(raw(p + 32), mask))};
  }
  static Lanes load_i8(const char* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x)))};
  }
  static Lanes load_f16(const char* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }

  static Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  // An operand that is NaN must come out as NaN: both return the second operand then.
  static Lanes max(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static Lanes min(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static Lanes abs(Lanes x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static Lanes round(Lanes x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
  // 2^n for whole n in -126..127
  static Lanes exp2(Lanes n) { return {exp2(n.a), exp2(n.b)}; }
  static Lanes below(Lanes x, Lanes limit, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, limit.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, limit.b, _CMP_LT_OQ))};
  }
  static unsigned nonzero(Lanes x) {
    const __m256 none = _mm256_setzero_ps();
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x.a, none, _CMP_NEQ_UQ))) |
           unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x.b, none, _CMP_NEQ_UQ))) << 8;
  }
  static Lanes load_bf16(const char* p, int part) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_load_si128(kBf16Bytes + part));
    return {_mm256_castsi256_ps(_mm256_shuffle_epi8(raw(p), bytes)), _mm256_castsi256_ps(_mm256_shuffle_epi8(raw(p + 32), bytes))};
  }
  // Sums of neighbours: 8 of x, then 8 of y.
  static Lanes pair_sum(Lanes x, Lanes y) { return {pair_sum(x.a, x.b), pair_sum(y.a, y.b)}; }
  friend Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  friend Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  friend Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  friend Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }

 private:
  typedef double unaligned_double __attribute__((aligned(4), may_alias));
  static __m256i raw(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256 exp2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static __m256 pair_sum(__m256 x, __m256 y) {  // hadd works within 128-bit halves, so quarters come out as x0 y0 x1 y1
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(x, y)), _MM_SHUFFLE(3, 1, 2, 0)));
  }
};

}  // namespace
