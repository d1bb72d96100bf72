// Activations on 16 lanes. Needs Lanes (lanes_*.h) to be defined before.
#pragma once
#include "ffn.h"

namespace {

using moefy::Activation;

// coefficients from the highest power down
inline Lanes polynomial(Lanes, Lanes sum) { return sum; }
template <class... Rest>
Lanes polynomial(Lanes x, Lanes sum, float next, Rest... rest) {
  return polynomial(x, Lanes::fma(sum, x, Lanes::set(next)), rest...);
}
template <class... Rest>
Lanes polynomial(Lanes x, float highest, Rest... rest) {
  return polynomial(x, Lanes::set(highest), rest...);
}

// Cephes' expf: relative error 2e-7. Clamped so that neither end leaves the normal floats.
inline Lanes exp(Lanes x) {
  x = Lanes::min(Lanes::set(88.3f), Lanes::max(Lanes::set(-87.3f), x));
  const Lanes n = Lanes::round(x * Lanes::set(1.44269504f));
  Lanes r = Lanes::fma(n, Lanes::set(-0.693359375f), x);
  r = Lanes::fma(n, Lanes::set(2.12194440e-4f), r);
  Lanes p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f);
  p = Lanes::fma(r * r, p, r + Lanes::set(1.f));
  return p * Lanes::exp2(n);
}

inline Lanes sigmoid(Lanes x) { return Lanes::set(1.f) / (Lanes::set(1.f) + exp(Lanes::zero() - x)); }

// Eigen's rational approximation of erf on [-4, 4], where it reaches 1 in single precision.
inline Lanes erf(Lanes x) {
  x = Lanes::min(Lanes::set(4.f), Lanes::max(Lanes::set(-4.f), x));
  const Lanes z = x * x;
  const Lanes p = polynomial(z, -2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f,
                             -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f,
                             -1.60960333262415e-02f);
  const Lanes q = polynomial(z, -1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                             -7.37332916720468e-03f, -1.42647390514189e-02f);
  return x * p / q;
}

// Cephes' tanhf: a polynomial where 2 sigmoid(2x) - 1 would cancel.
inline Lanes tanh(Lanes x) {
  const Lanes z = x * x;
  const Lanes p = polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                             -3.33332819422e-1f);
  const Lanes large = Lanes::fma(Lanes::set(2.f), sigmoid(x + x), Lanes::set(-1.f));
  return Lanes::below(Lanes::abs(x), Lanes::set(0.625f), Lanes::fma(p * z, x, x), large);
}

template <Activation A>
inline Lanes activate(Lanes x) {
  if constexpr (A == Activation::relu) return Lanes::max(Lanes::zero(), x);
  if constexpr (A == Activation::relu2) {
    const Lanes y = Lanes::max(Lanes::zero(), x);
    return y * y;
  }
  if constexpr (A == Activation::gelu)
    return Lanes::set(0.5f) * x * (Lanes::set(1.f) + erf(x * Lanes::set(0.70710678118654752f)));
  if constexpr (A == Activation::gelu_tanh) {  // x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    const Lanes u = x * Lanes::fma(x * x, Lanes::set(2 * 0.79788456f * 0.044715f), Lanes::set(2 * 0.79788456f));
    return x * sigmoid(u);
  }
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  if constexpr (A == Activation::quick_gelu) return x * sigmoid(Lanes::set(1.702f) * x);
  if constexpr (A == Activation::sigmoid) return sigmoid(x);
  if constexpr (A == Activation::tanh) return tanh(x);
  return x;
}

}  // namespace
