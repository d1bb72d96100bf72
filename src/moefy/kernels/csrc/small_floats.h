// Floats of 16 bits and fp32, one at a time: for packing. Kernels have their own ways (lanes_*.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moefy {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(value);
  if (value != value) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
  if (exponent == 0) return float_of(bits_of(float(fraction) * 0x1p-24f) | sign);
  return float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

inline uint16_t to_f16(float value) {  // to the nearest, ties to even; NaN stays NaN, 65,520 and more are infinite
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (value != value) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (size < 0x38800000) return uint16_t(sign | std::lrintf(float_of(size) * 0x1p24f));  // below 2^-14: multiples of 2^-24
  return uint16_t(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10)));
}

}  // namespace moefy
