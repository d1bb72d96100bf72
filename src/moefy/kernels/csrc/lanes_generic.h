// 16 lanes as four vectors of four in the compiler's own vector language: any machine GCC or Clang knows.
// The same code is the NEON unit on 64-bit Arm, where the compiler turns it into fmla on q registers.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace {

struct Lanes {
  typedef float f4 __attribute__((vector_size(16)));
  typedef int32_t i4 __attribute__((vector_size(16)));
  typedef uint16_t h4 __attribute__((vector_size(8)));
#ifdef __aarch64__
  static constexpr int kTile = 6;  // 24 of 32 registers
#else
  static constexpr int kTile = 3;  // 12 of SSE2's 16
#endif
  static constexpr bool kHasDot = false;
  f4 v[4];

#define MOEFY_EACH(expression) \
  {                            \
    Lanes result;              \
    for (int i = 0; i < 4; ++i) result.v[i] = (expression); \
    return result;             \
  }
  static Lanes zero() { return set(0.f); }
  static Lanes set(float x) MOEFY_EACH((f4{x, x, x, x}))
  static Lanes load(const float* p) MOEFY_EACH(get<f4>(p + 4 * i))
  static Lanes pair(const float* p) MOEFY_EACH((f4{p[0], p[1], p[0], p[1]}))
  static Lanes load_f32(const char* p) MOEFY_EACH(get<f4>(p + 16 * i))
  static Lanes load_bf16_low(const char* p) MOEFY_EACH((f4)(get<i4>(p + 16 * i) << 16))
  static Lanes load_bf16_high(const char* p) MOEFY_EACH((f4)(get<i4>(p + 16 * i) & int32_t(0xffff0000)))
  static Lanes load_i8(const char* p)
      MOEFY_EACH((f4{float(s(p, 4 * i)), float(s(p, 4 * i + 1)), float(s(p, 4 * i + 2)), float(s(p, 4 * i + 3))}))
  static Lanes load_f16(const char* p) MOEFY_EACH(from_f16(get<h4>(p + 8 * i)))
  void store(float* p) const { std::memcpy(p, v, sizeof v); }

  static Lanes fma(Lanes a, Lanes b, Lanes c) MOEFY_EACH(a.v[i] * b.v[i] + c.v[i])
  // An operand that is NaN must come out as NaN: both return the second operand then.
  static Lanes max(Lanes a, Lanes b) MOEFY_EACH(choose(a.v[i] > b.v[i], a.v[i], b.v[i]))
  static Lanes min(Lanes a, Lanes b) MOEFY_EACH(choose(a.v[i] < b.v[i], a.v[i], b.v[i]))
  static Lanes abs(Lanes a) MOEFY_EACH((f4)((i4)a.v[i] & 0x7fffffff))
  // Whole numbers below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
  static Lanes round(Lanes a) {
    volatile float shift = 12582912.f;  // volatile: the compiler must not cancel the two additions
    const float m = shift;
    MOEFY_EACH((a.v[i] + m) - m)
  }
  // 2^n for whole n in -126..127
  static Lanes exp2(Lanes n) MOEFY_EACH((f4)((__builtin_convertvector(n.v[i], i4) + 127) << 23))
  static Lanes below(Lanes a, Lanes limit, Lanes yes, Lanes no)
      MOEFY_EACH(choose(a.v[i] < limit.v[i], yes.v[i], no.v[i]))
  static unsigned nonzero(Lanes a) {
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= unsigned(a.v[i / 4][i % 4] != 0.f) << i;
    return mask;
  }
  static Lanes load_bf16(const char* p, int part)
      MOEFY_EACH((f4)((get<i4>(p + 16 * i) << (16 - 16 * part)) & int32_t(0xffff0000)))
  // Sums of neighbours: 8 of a, then 8 of b.
  static Lanes pair_sum(Lanes a, Lanes b) {
    Lanes result;
    for (int i = 0; i < 4; ++i) {
      const Lanes& x = i < 2 ? a : b;
      const f4 p = x.v[2 * i % 4], q = x.v[2 * i % 4 + 1];
      result.v[i] = f4{p[0] + p[1], p[2] + p[3], q[0] + q[1], q[2] + q[3]};
    }
    return result;
  }
  friend Lanes operator+(Lanes a, Lanes b) MOEFY_EACH(a.v[i] + b.v[i])
  friend Lanes operator-(Lanes a, Lanes b) MOEFY_EACH(a.v[i] - b.v[i])
  friend Lanes operator*(Lanes a, Lanes b) MOEFY_EACH(a.v[i] * b.v[i])
  friend Lanes operator/(Lanes a, Lanes b) MOEFY_EACH(a.v[i] / b.v[i])
#undef MOEFY_EACH

 private:
  template <class V, class P>
  static V get(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#ifdef __aarch64__
  static f4 from_f16(h4 halves) { return (f4)vcvt_f32_f16((float16x4_t)halves); }
#else
  // As in small_floats.h; the smallest, which have no leading one, are got by taking it off again.
  static f4 from_f16(h4 halves) {
    const i4 x = __builtin_convertvector(halves, i4), sign = (x & 0x8000) << 16, size = (x & 0x7fff) << 13;
    const i4 exponent = size & (31 << 23), offset = i4{} + (112 << 23);
    const f4 small = (f4)(size + (113 << 23)) - 0x1p-14f;
    const i4 normal = size + offset + ((exponent == (31 << 23)) & offset);
    return (f4)((i4)choose(exponent == 0, small, (f4)normal) | sign);
  }
#endif
  static int s(const char* p, int i) { return static_cast<signed char>(p[i]); }
  static f4 choose(i4 mask, f4 yes, f4 no) { return (f4)((mask & (i4)yes) | (~mask & (i4)no)); }
};

}  // namespace
