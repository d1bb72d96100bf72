// The function table of one instruction set, written once on Lanes. Included by each isa_*.cpp after its lanes_*.h.
//
// These units are compiled with flags that other machines cannot run. Everything is in an anonymous namespace and
// nothing of the standard library is used: a shared inline function compiled here could be the copy the linker keeps.
#pragma once
#include "activations.h"
#include "sparse.h"

namespace {

using namespace moefy;

// Steps that all row tiles of a task make before the next ones. With a panel of weights of 32 KB (AVX2), or four
// (AVX-512), L1 is too small for them and for rows of x; but L2 feeds such tiles as well, and rows are read in long
// streams: the up phase takes 7-8 % less than with 128 steps (AVX2, Zen 3), 2-6 % (AVX-512, Zen 4). Fewer rows wait for
// DRAM, and with four panels the weights of the first tile are few with 128 steps, and the others' asked for in time:
// up to 16 % less at 24 rows and below. With two products in a cycle a tile of four panels reads 21 bytes of weights in
// each, faster than L2 gives them: with 64 KB at a time the up phase makes 147 to 151 GFLOP/s on a quiet core of an
// Emerald Rapids, with 128 KB 131 to 133 (of 172 at most; D 2,048: 115 and 114), and 4 to 11 % more on a busy one.
inline int chunk_of(int rows) {
  return rows <= 24 ? 512 / max_panels(max_rows()) : twice() ? 256 : 512;
}

// A tile of few rows waits for DRAM and, where it has one or two panels, reads as many streams. Four panels in turns,
// 1 KB of each, are four: 16 tokens take 8-15 % less in the up phase with AVX2 (fp32; bf16 weights, all of a call, 2-9 %;
// int8 nothing).
constexpr int kTurn = 1024;
constexpr int kStreams = 4;

template <class Format>
void multiply_in_turns(Product job, int chunks, void (*run)(const Product&)) {
  const int steps = job.steps;
  const char *weights = job.weights, *next = job.next;
  const char* in[kDownRows];
  const char* const* rows = job.in;
  job.in = in;
  for (int c = 0; c < chunks; ++c) {
    const int k = int(int64_t(steps) * c / chunks), end = int(int64_t(steps) * (c + 1) / chunks);
    job.steps = end - k;
    job.weights = weights + size_t(k) * Format::kBytes;
    job.next = c + 1 < chunks ? weights + size_t(end) * Format::kBytes : next;
    for (int r = 0; r < job.rows; ++r) in[r] = rows[r] + size_t(k) * Format::kInputBytes;
    run(job);
    job.add = true;
  }
}

template <class Format>
void multiply_in_chunks(Product job) {
  if (job.rows == 0 || job.panels == 0) return;
  if (job.rows > max_rows()) {
    return multiply_in_turns<Format>(job, int(ceil_div(job.steps, chunk_of(job.rows))), multiply<Format>);
  }
  const int turns = int(ceil_div(size_t(job.steps) * Format::kBytes, kTurn));
  const bool few_streams = max_panels(job.rows) <= kStreams / 2 && job.panels > 1;
  if (!few_streams || turns < 2 * kStreams) return multiply<Format>(job);
  const int panels = job.panels;
  const char *weights = job.weights, *next = job.next;
  float* const* all = job.out;
  float* out[kMaxRows];
  job.out = out;
  for (int p = 0; p < panels; p += kStreams) {
    job.panels = panels - p < kStreams ? panels - p : kStreams;
    job.weights = weights + p * job.panel_bytes;
    job.next = p + kStreams < panels ? job.weights + kStreams * job.panel_bytes : next;
    for (int r = 0; r < job.rows; ++r) out[r] = all[r] + p * kLanes;
    multiply_in_turns<Format>(job, turns, multiply_pieces<Format>);
  }
}

// ---- up: sums -> bias, scale, activation, gate -> hidden

template <class L>  // a template, since only lanes with dot have it
void store_bf16(L h, char* out) {
  h.store_bf16(out);
}

// Sums of a panel as multiply leaves them: 8 neurons x 2 lanes, to be added.
struct PairedSums {
  static constexpr int kFloats = kLanes;  // of a panel
  static Lanes load(const float* first, const float* second) {  // 8 neurons of each; the second may be null
    return Lanes::pair_sum(Lanes::load(first), second ? Lanes::load(second) : Lanes::zero());
  }
  static void store(const UpTask& task, Lanes h, char* out, int column) {
    if constexpr (Lanes::kHasDot) {
      if (task.dot) return store_bf16(h, out + 2 * column);
    }
    h.store(reinterpret_cast<float*>(out) + column);
  }
};

template <class Sums, Activation A, bool Gated>
void finish_row(const UpTask& task, const float* sums, float weight, char* out) {
  const Bank& bank = *task.bank;
  const size_t base = size_t(task.expert) * bank.hidden_stride();
  const int panels = bank.unit_panels(), all = bank.up_panels();
  const Lanes w = Lanes::set(weight);
  for (int unit = task.unit0; unit < task.unit1; ++unit, sums += panels * Sums::kFloats) {
    const size_t n = base + size_t(unit) * kLanes;
    // Only the first half of the last unit exists when the neurons end there.
    const bool half = (unit + 1) * panels > all;
    const auto sum = [&](int first) {
      return Sums::load(sums + first * Sums::kFloats, half ? nullptr : sums + (first + panels / 2) * Sums::kFloats);
    };
    const auto affine = [&](Lanes x, const float* scale, const float* bias) {
      if (scale) x = x * Lanes::load(scale + n);
      if (bias) x = x + Lanes::load(bias + n);
      return x;
    };
    Lanes h;
    if constexpr (Gated) {
      const Lanes up = affine(sum(1), bank.up_scale, bank.up_bias);
      h = activate<A>(affine(sum(0), bank.gate_scale, bank.gate_bias)) * (bank.activate_up ? activate<A>(up) : up);
    } else {
      h = activate<A>(affine(sum(0), bank.up_scale, bank.up_bias));
    }
    if (bank.absolute) h = Lanes::abs(h);
    if (task.weight) h = h * w;
    if (bank.down_scale) h = h * Lanes::load(bank.down_scale + n);
    Sums::store(task, h, out, (unit - task.unit0) * kLanes);
  }
}

using FinishRow = void (*)(const UpTask&, const float*, float, char*);

template <class Sums, Activation A>
constexpr FinishRow kFinish[2] = {finish_row<Sums, A, false>, finish_row<Sums, A, true>};

template <class Sums>
FinishRow finish_of(const Bank& bank) {
  switch (bank.act) {
    case Activation::relu: return kFinish<Sums, Activation::relu>[bank.gated];
    case Activation::relu2: return kFinish<Sums, Activation::relu2>[bank.gated];
    case Activation::gelu: return kFinish<Sums, Activation::gelu>[bank.gated];
    case Activation::gelu_tanh: return kFinish<Sums, Activation::gelu_tanh>[bank.gated];
    case Activation::silu: return kFinish<Sums, Activation::silu>[bank.gated];
    case Activation::quick_gelu: return kFinish<Sums, Activation::quick_gelu>[bank.gated];
    case Activation::sigmoid: return kFinish<Sums, Activation::sigmoid>[bank.gated];
    case Activation::tanh: return kFinish<Sums, Activation::tanh>[bank.gated];
    case Activation::identity: break;
  }
  return kFinish<Sums, Activation::identity>[bank.gated];
}

// The expert whose weights are most likely read next: threads take what is there.
int after(int expert, const Bank& bank) { return expert + 1 < bank.experts ? expert + 1 : expert; }

template <class F32, class Bf16, class I8, class F16, template <class> class Dot, class Do>
void with_format(Weights type, bool dot, const Do& run) {
  if constexpr (Lanes::kHasDot) {
    if (dot) return run(Dot<Lanes>{});
  }
  switch (type) {
    case Weights::f32: return run(F32{});
    case Weights::bf16: return run(Bf16{});
    case Weights::i8: return run(I8{});
    case Weights::f16: return run(F16{});
  }
}

template <class Do>
void with_up_format(const Bank& bank, bool dot, const Do& run) {
  with_format<UpF32, UpBf16, UpI8, UpF16, UpDot>(bank.up_type, dot, run);
}

void up(const UpTask& task) {
  const Bank& bank = *task.bank;
  const int panel0 = task.unit0 * bank.unit_panels();
  const int end = task.unit1 * bank.unit_panels();
  const bool whole = end >= bank.up_panels();  // the task ends where the expert does
  const int panels = (whole ? bank.up_panels() : end) - panel0;
  float* sums[kRows];
  for (int r = 0; r < task.rows; ++r) sums[r] = task.scratch + size_t(r) * panels * kLanes;
  const size_t bytes = bank.up_panel_bytes();
  const auto weights = [&](int expert, int panel) {
    return bank.up + (size_t(expert) * bank.up_panels() + panel) * bytes;
  };
  const Product job{task.rows, panels, bank.up_steps(), task.x, weights(task.expert, panel0), bytes, sums, false,
                    whole ? weights(after(task.expert, bank), 0) : weights(task.expert, end)};
  with_up_format(bank, task.dot, [&](auto format) { multiply_in_chunks<decltype(format)>(job); });
  const FinishRow finish = finish_of<PairedSums>(bank);
  for (int r = 0; r < task.rows; ++r) finish(task, sums[r], task.weight ? task.weight[r] : 1.f, task.out[r]);
}

// A panel is one stream of memory and one chain of sums, and one stream does not get what DRAM has: a token of 128
// experts of 8 takes 9 % less with four experts at once (bf16 weights 20 %), and no less with eight.
template <class Format, int P>
void panels_for_row(const char* in, const char* const* weights, float* const* out, int steps) {
  Lanes sum[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = Lanes::zero();
  for (int k = 0; k < steps; ++k) {
#pragma GCC unroll 2
    for (int part = 0; part < Format::kParts; ++part) {
      const Lanes x = Format::input(in, k, part);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        sum[p] = Format::multiply(x, Format::weights(weights[p] + size_t(k) * Format::kBytes, part), sum[p]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p].store(out[p]);
}

template <class Format>
void panels_for_row(int panels, const char* in, const char* const* weights, float* const* out, int steps) {
  switch (panels) {
    case 4: return panels_for_row<Format, 4>(in, weights, out, steps);
    case 3: return panels_for_row<Format, 3>(in, weights, out, steps);
    case 2: return panels_for_row<Format, 2>(in, weights, out, steps);
    default: return panels_for_row<Format, 1>(in, weights, out, steps);
  }
}

void up_row(const UpTask* tasks, int count) {
  const Bank& bank = *tasks->bank;
  const char* weights[kRowPanels];
  float* sums[kRowPanels];
  int panels = 0;
  for (int i = 0; i < count; ++i)
    for (int p = 0; p < bank.up_panels(); ++p, ++panels) {
      weights[panels] = bank.up + (size_t(tasks[i].expert) * bank.up_panels() + p) * bank.up_panel_bytes();
      sums[panels] = tasks[i].scratch + p * kLanes;
    }
  with_up_format(bank, tasks->dot, [&](auto format) {
    panels_for_row<decltype(format)>(panels, tasks->x[0], weights, sums, bank.up_steps());
  });
  const FinishRow finish = finish_of<PairedSums>(bank);
  for (int i = 0; i < count; ++i) {
    const UpTask& task = tasks[i];
    finish(task, task.scratch, task.weight ? task.weight[0] : 1.f, task.out[0]);
  }
}

void down(const DownTask& task) {
  const Bank& bank = *task.bank;
  const size_t bytes = bank.down_panel_bytes();
  const auto weights = [&](int expert) {
    return bank.down + (size_t(expert) * bank.down_panels() + task.panel0) * bytes;
  };
  const Product job{task.rows, task.panel1 - task.panel0, bank.down_steps(), task.hidden, weights(task.expert), bytes,
                    task.y, true, weights(task.next)};
  const bool zeros = bank.act == Activation::relu || bank.act == Activation::relu2;
  with_format<DownF32, DownBf16, DownI8, DownF16, DownDot>(bank.down_type, task.dot, [&](auto format) {
    using Format = decltype(format);
    if (!zeros || !multiply_nonzero<Format>(job)) multiply_in_chunks<Format>(job);
  });
}

// ---- routing

// The order of the floats as the order of integers; NaN is lower than everything.
int32_t key_of(float score) {
  int32_t bits;
  score += 0.0f;  // -0 is 0
  __builtin_memcpy(&bits, &score, sizeof bits);
  if (score != score) return INT32_MIN;
  return bits ^ ((bits >> 31) & INT32_MAX);
}

int count_above(const int32_t* keys, int count, int32_t limit) {
  int above = 0;
  for (int i = 0; i < count; ++i) above += keys[i] > limit;
  return above;
}

// The k highest of `keys`; among equal ones the first. Bisection on the key: each step is one vectorised count and
// it ends when a limit has exactly k above it, after about 12 counts of 128 keys; 0.25 us with everything, where
// nth_element takes 1 us. A guess from the scores instead of the middle needs 5 counts, and as long. `chosen` has room
// for one more than k.
int highest(const int32_t* keys, int count, int k, int32_t* chosen) {
  int32_t least = keys[0], most = keys[0];
  for (int i = 0; i < count; ++i) {
    least = keys[i] < least ? keys[i] : least;
    most = keys[i] > most ? keys[i] : most;
  }
  int64_t low = int64_t(least) - 1, high = most;  // at least k keys are above low, at most k above high
  int above_high = 0;
  while (high - low > 1 && above_high < k) {
    const int64_t middle = low + (high - low) / 2;
    const int above = count_above(keys, count, int32_t(middle));
    if (above <= k) above_high = above;
    (above > k ? low : high) = middle;
  }
  const int32_t limit = int32_t(high);
  int found = 0;
  if (above_high == k) {
    for (int i = 0; i < count; ++i) {
      chosen[found] = i;
      found += keys[i] > limit;
    }
    return k;
  }
  for (int i = 0, ties = k - above_high; i < count && found < k; ++i) {
    const bool tie = keys[i] == limit && ties > 0;
    chosen[found] = i;
    found += keys[i] > limit || tie;
    ties -= tie;
  }
  return found;
}

int select(const float* scores, int experts, const Selection& rule, int32_t* keys, int32_t* chosen) {
  for (int i = 0; i < experts; ++i) keys[i] = key_of(scores[i]);
  int k = rule.top_k;
  if (rule.by_threshold) {
    k = 0;
    for (int i = 0; i < experts; ++i) k += scores[i] > rule.threshold;
    k = k < rule.least ? rule.least : k;
    k = k > rule.most ? rule.most : k;
  }
  if (k >= experts) {
    for (int i = 0; i < experts; ++i) chosen[i] = i;
    return experts;
  }
  return k > 0 ? highest(keys, experts, k, chosen) : 0;
}

void gate(const float* scores, int experts, const float* scale, const int32_t* chosen, int count, float* scratch,
          float* weight) {
  float most = -__builtin_inff();
  for (int i = 0; i < experts; ++i) most = scores[i] > most ? scores[i] : most;
  const int padded = int(round_up(experts, kLanes));
  for (int i = 0; i < padded; ++i) scratch[i] = i < experts ? scores[i] - most : -1e30f;
  float total = 0;
  for (int i = 0; i < padded; i += kLanes) exp(Lanes::load(scratch + i)).store(scratch + i);
  for (int i = 0; i < experts; ++i) total += scratch[i];
  for (int i = 0; i < count; ++i) weight[i] = 1.f + scratch[chosen[i]] / total * scale[chosen[i]];
}

constexpr Kernels make_table(const char* name) {
  return {name, kWide, Lanes::kHasDot, false, up, up_row, down, nullptr, nullptr, select, gate};
}

}  // namespace
