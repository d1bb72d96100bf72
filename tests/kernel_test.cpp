// The kernel without Python: every instruction set of the machine, weight type and a range of shapes against loops in
// double. Made for the sanitizers: all buffers have their exact size, so that any access beyond them is seen, and y
// is filled with NaN, with guards before and after it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "pack.h"
#include "run.h"
#include "small_floats.h"

using namespace moefy;

namespace {

std::mt19937 generator(1);
int failures = 0, checks = 0;

std::vector<float> random(size_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& v : values) v = normal(generator);
  return values;
}

struct Matrices {  // one bank: (E, M, D) as packed, read back
  int E, M, D;
  std::vector<float> gate, up, down, gate_bias, up_bias;
};

struct Problem {
  int E, M, D, S, K, T;
  bool gated;
  Weights up, down;
  bool bf16;
  bool zeros;  // ReLU, with biases that make six of seven hidden values 0
};

Matrices make(int E, int M, int D, bool gated) {
  const size_t size = size_t(E) * M * D;
  const float scale = 1 / std::sqrt(float(D));
  Matrices m{E, M, D, {}, random(size, scale), random(size, scale), {}, random(size_t(E) * M, 1)};
  if (gated) m.gate = random(size, scale), m.gate_bias = random(size_t(E) * M, 1);
  return m;
}

PackedBank pack(Matrices& m, const Problem& p, bool tiled, const float* columns) {
  const Activation act = p.zeros ? Activation::relu : Activation::silu;
  const Shape shape{m.E, m.M, m.D, act, false, false, p.up, p.down, tiled};
  const bool gated = !m.gate.empty();
  PackedBank packed(shape, {gated ? m.gate.data() : nullptr}, {m.up.data()}, {m.down.data()},
                    columns, gated ? m.gate_bias.data() : nullptr, m.up_bias.data(), 2);
  const auto read = [&](Matrix which, std::vector<float>& to) {
    if (to.empty()) return;
    const Weights type = which == Matrix::down ? p.down : p.up;
    if (value_bytes(type) != 2) return packed.unpack(which, to.data(), 2);
    std::vector<uint16_t> half(to.size());
    packed.unpack(which, half.data(), 2);
    for (size_t i = 0; i < to.size(); ++i) to[i] = type == Weights::bf16 ? from_bf16(half[i]) : from_f16(half[i]);
  };
  read(Matrix::gate, m.gate), read(Matrix::up, m.up), read(Matrix::down, m.down);
  for (size_t i = 0; columns && i < m.down.size(); ++i) m.down[i] *= columns[i % size_t(m.D)];
  return packed;
}

double act(double a, bool relu) { return relu ? std::max(0.0, a) : a / (1 + std::exp(-a)); }

void add_expert(const Matrices& m, int e, bool relu, const float* x, std::vector<double>& y, std::vector<double>& size) {
  for (int n = 0; n < m.M; ++n) {
    const size_t row = (size_t(e) * m.M + n) * m.D;
    double up = m.up_bias[size_t(e) * m.M + n], gate = m.gate.empty() ? 0 : m.gate_bias[size_t(e) * m.M + n];
    for (int k = 0; k < m.D; ++k) up += double(x[k]) * m.up[row + k];
    for (int k = 0; k < m.D && !m.gate.empty(); ++k) gate += double(x[k]) * m.gate[row + k];
    const double h = m.gate.empty() ? act(up, relu) : act(gate, relu) * up;
    for (int k = 0; k < m.D; ++k) y[k] += h * m.down[row + k], size[k] += (std::fabs(h) + 1) * std::fabs(m.down[row + k]);
  }
}

void check(const Kernels& kernels, const Problem& p, int threads) {
  Matrices routed = make(p.E, p.M, p.D, p.gated), shared = make(1, p.S, p.D, p.gated);
  for (Matrices* m : {&routed, &shared})
    for (float& b : p.gated ? m->gate_bias : m->up_bias) b -= p.zeros ? 1.5f : 0.f;
  std::vector<float> router_rows = random(size_t(p.E) * p.D, 1), x = random(size_t(p.T) * p.D, 1);
  std::vector<float> columns = random(p.D, 2);
  for (float& column : columns) column = std::exp(column);
  const float* y_scale = p.up == Weights::i8 ? columns.data() : nullptr;
  const PackedBank experts = pack(routed, p, kernels.tiled, y_scale),
                   always = pack(shared, p, kernels.tiled, y_scale);
  const Shape router_shape{1, p.E, p.D, Activation::identity, false, false, Weights::f32, Weights::f32};
  const PackedBank router(router_shape, {}, {router_rows.data()}, {}, nullptr, nullptr, nullptr, 1);
  std::vector<float> bias = random(round_up(p.D, 16), 1);

  std::vector<uint16_t> half(p.bf16 ? x.size() : 0);
  for (size_t i = 0; i < half.size(); ++i) half[i] = to_bf16(x[i]), x[i] = from_bf16(half[i]);
  constexpr int kGuard = 64;
  std::vector<float> y_room(p.bf16 ? kGuard : x.size() + 2 * kGuard, NAN);
  std::vector<uint16_t> half_room(p.bf16 ? x.size() + 2 * kGuard : kGuard, 0x7fc1);
  float* y = y_room.data() + kGuard;
  uint16_t* y_half = half_room.data() + kGuard;
  std::vector<int32_t> chosen(size_t(p.T) * p.K);
  std::vector<int64_t> counts(p.E);

  Call c;
  c.kernels = &kernels;
  c.routed = &experts.bank();
  c.shared = p.S ? &always.bank() : nullptr;
  c.router = &router.bank();
  c.down_bias = bias.data(), c.y_scale = y_scale;
  c.width = p.D, c.x_row = p.D, c.tokens = p.T, c.bf16 = p.bf16, c.threads = threads;
  c.x = p.bf16 ? static_cast<const void*>(half.data()) : x.data();
  c.y = p.bf16 ? static_cast<void*>(y_half) : y;
  c.capacity = p.K, c.rule.top_k = p.K;
  c.chosen_out = chosen.data(), c.counts_out = counts.data();
  bool good = forward(c);

  int64_t total = 0;
  for (int64_t n : counts) total += n;
  good &= total == int64_t(p.T) * p.K;
  const bool dot = kernels.has_dot && experts.bank().is_bf16() && p.bf16;
  const double relative = (dot ? 1.0 / 64 : 2e-5);
  for (int t = 0; t < p.T; ++t) {
    std::vector<double> want(bias.begin(), bias.begin() + p.D), size(p.D, 1);
    if (p.S) add_expert(shared, 0, p.zeros, &x[size_t(t) * p.D], want, size);
    for (int j = 0; j < p.K; ++j) {
      add_expert(routed, chosen[size_t(t) * p.K + j], p.zeros, &x[size_t(t) * p.D], want, size);
    }
    for (int k = 0; k < p.D; ++k) {
      const size_t i = size_t(t) * p.D + k;
      const double got = p.bf16 ? from_bf16(y_half[i]) : y[i];
      good &= std::fabs(got - want[k]) <= relative * size[k] + (p.bf16 ? std::fabs(want[k]) / 128 : 0);
    }
  }
  for (int i = 0; i < kGuard; ++i)
    for (const ptrdiff_t at : {ptrdiff_t(i) - kGuard, ptrdiff_t(x.size()) + i})
      good &= p.bf16 ? y_half[at] == 0x7fc1 : std::isnan(y[at]);
  ++checks;
  if (good) return;
  ++failures;
  std::printf("wrong: %s E%d M%d D%d S%d K%d T%d gated %d weights %d %d bf16 %d zeros %d threads %d\n", kernels.name, p.E, p.M, p.D,
              p.S, p.K, p.T, p.gated, int(p.up), int(p.down), p.bf16, p.zeros, threads);
}

}  // namespace

int main() {
  const char* names[8];
  const int count = instruction_sets(names, 8);
  const int shapes[][4] = {{1, 1, 1, 0}, {3, 8, 16, 8}, {5, 7, 37, 3}, {4, 20, 130, 70}, {33, 9, 66, 0}, {70, 8, 34, 5},
                           {2, 130, 35, 261}};
  const Weights types[][2] = {{Weights::f32, Weights::f32}, {Weights::bf16, Weights::bf16}, {Weights::i8, Weights::i8},
                              {Weights::f16, Weights::f16}, {Weights::bf16, Weights::f32}};
  for (int i = 0; i < count; ++i)
    for (const auto& s : shapes)
      for (const auto& [up, down] : types)
        for (bool bf16 : {false, true})
          for (bool gated : {false, true})
            for (int T : {0, 1, 6, 49}) {
              if (T == 49 && gated == bf16) continue;  // half of them: the loops in double take most of the time
              const int K = 1 + generator() % s[0];
              check(*kernels(names[i]), {s[0], s[1], s[2], s[3], K, T, gated, up, down, bf16, generator() % 2 == 1}, 1 + T % 3);
            }
  std::printf("%d instruction sets: %d passed, %d failed\n", count, checks - failures, failures);
  return failures != 0;
}
