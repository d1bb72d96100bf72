#include "pack.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "small_floats.h"
#include "team.h"

namespace moefy {
namespace {

int8_t rounded(float v) {  // a scale that is denormal can be less than it should be, or 0
  constexpr float whole = 0x1.8p23f;  // added, it leaves no place for a fraction; lrintf is a call, 3 ns a weight
  return v == v ? int8_t((v > 127 ? 127 : v < -127 ? -127 : v) + whole - whole) : 0;
}

// The types of weights, for loops that are compiled for each: one weight takes 1 ns so, and 4 where every one asks.
struct F32 {
  using Stored = float;
  static float value(float stored) { return stored; }
  static float made(float value, float) { return value; }
};
struct Bf16 {
  using Stored = uint16_t;
  static float value(uint16_t stored) { return from_bf16(stored); }
  static uint16_t made(float value, float) { return to_bf16(value); }
};
struct F16 {
  using Stored = uint16_t;
  static float value(uint16_t stored) { return from_f16(stored); }
  static uint16_t made(float value, float) { return to_f16(value); }
};
struct I8 {
  using Stored = int8_t;
  static int8_t made(float value, float scale) { return rounded(value / scale); }
};

// run(type) with the type of a source, which is no int8
template <class Run>
void with_source(Weights type, const Run& run) {
  if (type == Weights::f32) return run(F32());
  if (type == Weights::bf16) return run(Bf16());
  run(F16());
}

template <class Run>
void with_type(Weights type, const Run& run) {
  if (type == Weights::i8) return run(I8());
  with_source(type, run);
}

// Where a neuron's weights are in its panel, in elements: block by block, of a few successive inputs each.
struct Places {
  size_t first, block;  // the first one, and from block to block
  int depth;            // a block is 2 * depth inputs

  // visit(k, element). A block holds 8 neurons x 2 k; bf16 puts k, k+1 in the low halves and k+2, k+3 in the high halves.
  template <int Depth, class Visit>
  MOEFY_INLINE void each_of(int width, const Visit& visit) const {
    size_t at = first;
    int k = 0;
    for (; k + 2 * Depth <= width; k += 2 * Depth, at += block)
      for (int r = 0; r < 2 * Depth; ++r) visit(k + r, at + r % 2 * Depth + r / 2);
    for (int r = 0; k + r < width; ++r) visit(k + r, at + r % 2 * Depth + r / 2);
  }
  template <class Visit>
  MOEFY_INLINE void each(int width, const Visit& visit) const {
    depth == 1 ? each_of<1>(width, visit) : each_of<2>(width, visit);
  }
};

// Those of neuron n of a panel, from the start of the expert; tiled panels of an even and an odd number share rows.
Places places(const Bank& bank, int panel, int n) {
  const size_t values = bank.up_panel_bytes() / value_bytes(bank.up_type);
  const int depth = block_depth(bank.up_type);
  if (!bank.tiled) return {panel * values + size_t(2 * n) * depth, size_t(kLanes) * depth, depth};
  const int first = panel & ~1, columns = first + 1 < bank.up_panels() ? 2 * kNeurons : kNeurons;
  return {first * values + size_t((panel - first) * kNeurons + n) * 2, size_t(columns) * 2, 1};
}

// visit(expert, neuron, k, element of bank.up) for every weight of the gate or of the up matrix
template <class Visit>
void each_up(const Bank& bank, Matrix which, int threads, const Visit& visit) {
  const int step = bank.gated ? 2 : 1, first = bank.gated && which == Matrix::up ? 1 : 0;
  const int groups = int(ceil_div(bank.neurons, kNeurons));
  const size_t elements = bank.up_panels() * bank.up_panel_bytes() / value_bytes(bank.up_type);
  parallel(threads, int64_t(bank.experts) * groups, [&](int64_t i) {
    const int e = int(i / groups), group = int(i % groups);
    const int panel = group * step + first;
    for (int n = group * kNeurons; n < bank.neurons && n < (group + 1) * kNeurons; ++n)
      places(bank, panel, n % kNeurons).each(bank.width, [&](int k, size_t at) { visit(e, n, k, e * elements + at); });
  });
}

template <class Visit>
void each_down(const Bank& bank, int threads, const Visit& visit) {
  const int depth = block_depth(bank.down_type), panels = bank.down_panels();
  const size_t elements = size_t(bank.down_steps()) * kLanes * depth;
  parallel(threads, int64_t(bank.experts) * panels, [&](int64_t i) {
    const int e = int(i / panels), p = int(i % panels), first = bank.joined ? e * bank.neurons : 0;
    const int columns = std::min(kLanes, bank.width - p * kLanes);
    const size_t panel = size_t(bank.joined ? p : i) * elements;
    for (int n = 0; n < bank.neurons; ++n) {
      const size_t at = panel + size_t((first + n) / depth) * kLanes * depth + (first + n) % depth;
      for (int c = 0; c < columns; ++c) visit(e, n, p * kLanes + c, at + size_t(c) * depth);
    }
  });
}

// each(visit) with what writes a weight in another type: visit(expert, neuron, k, element) of `to`. scale(expert,
// neuron, k) is for int8 alone.
template <class Each, class Scale>
void convert(const Bank& bank, Source source, Weights type, char* out, const Scale& scale, const Each& each) {
  with_source(source.type, [&](auto from) {
    with_type(type, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const auto* weights = static_cast<const typename From::Stored*>(source.data);
      auto* packed = reinterpret_cast<typename To::Stored*>(out);
      each([&, weights, packed](int e, int n, int k, size_t element) {
        const auto weight = weights[(size_t(e) * bank.neurons + n) * bank.width + k];
        if constexpr (std::is_same_v<From, To>)
          packed[element] = weight;  // every bit of a NaN too
        else
          packed[element] = To::made(From::value(weight), std::is_same_v<To, I8> ? scale(e, n, k) : 1.f);
      });
    });
  });
}

}  // namespace

PackedBank::PackedBank(const Shape& shape, Source gate, Source up, Source down, const float* columns,
                       const float* gate_bias, const float* up_bias, int threads) {
  Bank& b = bank_;
  b.experts = shape.experts, b.neurons = shape.neurons, b.width = shape.width;
  b.gated = gate.data != nullptr, b.act = shape.act, b.activate_up = shape.activate_up;
  b.absolute = shape.absolute, b.up_type = shape.up, b.down_type = shape.down, b.tiled = shape.tiled && b.is_bf16();
  b.joined = b.tiled && down.data && b.experts > 1 && b.neurons <= kJoinedNeurons;
  if (b.up_type == Weights::i8) find_scales(gate, up, down, columns, threads);
  pack_bias(up_bias, b.up_bias, up_bias_);
  pack_bias(gate_bias, b.gate_bias, gate_bias_);

  up_ = Memory(b.up_bytes());
  b.up = up_.as<char>();
  up_.clear();
  const size_t stride = b.hidden_stride();
  const auto pack_up = [&](Matrix which, Source from, const float* scales) {
    const auto scale = [=](int e, int n, int) { return scales[e * stride + n]; };
    convert(b, from, b.up_type, b.up, scale, [&](const auto& put) { each_up(b, which, threads, put); });
  };
  pack_up(Matrix::up, up, b.up_scale);
  if (b.gated) pack_up(Matrix::gate, gate, b.gate_scale);
  if (!down.data) return;

  down_ = Memory(b.down_bytes());
  b.down = down_.as<char>();
  down_.clear();
  const auto scale = [&](int e, int n, int k) { return b.down_scale[e * stride + n] * (columns ? columns[k] : 1.f); };
  convert(b, down, b.down_type, b.down, scale, [&](const auto& put) { each_down(b, threads, put); });
}

float* PackedBank::rows(Memory& memory) {
  memory = Memory(size_t(bank_.experts) * bank_.hidden_stride() * sizeof(float));
  memory.clear();
  return memory.as<float>();
}

void PackedBank::pack_bias(const float* from, float*& to, Memory& memory) {
  if (!from) return;
  to = rows(memory);
  for (int e = 0; e < bank_.experts; ++e)
    std::memcpy(to + size_t(e) * bank_.hidden_stride(), from + size_t(e) * bank_.neurons, bank_.neurons * sizeof(float));
}

// A weight that is no number has to be seen: in down by its column (`over`), elsewhere by its neuron. As bits, of which
// the compiler makes a maximum of many at a time; those of a NaN are the largest.
template <class From>
static float largest(const void* weights, size_t row, int width, const float* over) {
  const auto* from = static_cast<const typename From::Stored*>(weights) + row;
  const uint32_t infinite = 0x7f800000;
  uint32_t most = 0;
  for (int k = 0; !over && k < width; ++k) most = std::max(most, bits_of(From::value(from[k])) & 0x7fffffff);
  for (int k = 0; over && k < width; ++k) {
    const uint32_t size = bits_of(From::value(from[k]) / over[k]) & 0x7fffffff;
    most = std::max(most, size > infinite ? 0 : size);
  }
  return float_of(most);
}

void PackedBank::find_scales(Source gate, Source up, Source down, const float* columns, int threads) {
  const auto find = [&](Source source, const float* over, float*& to, Memory& memory) {
    if (!source.data) return;
    to = rows(memory);
    with_source(source.type, [&](auto from) {
      parallel(threads, int64_t(bank_.experts) * bank_.neurons, [&, to](int64_t i) {
        const float most = largest<decltype(from)>(source.data, size_t(i) * bank_.width, bank_.width, over);
        to[i / bank_.neurons * bank_.hidden_stride() + i % bank_.neurons] = most == 0 ? 1 : most / 127;
      });
    });
  };
  find(gate, nullptr, bank_.gate_scale, gate_scale_);
  find(up, nullptr, bank_.up_scale, up_scale_);
  find(down, columns, bank_.down_scale, down_scale_);
}

size_t PackedBank::bytes() const {
  size_t sum = 0;
  for (const Memory* m : {&up_, &down_, &up_bias_, &gate_bias_, &up_scale_, &gate_scale_, &down_scale_}) sum += m->bytes();
  return sum;
}

void PackedBank::unpack(Matrix which, void* out, int threads) const {
  const Bank& b = bank_;
  const bool is_down = which == Matrix::down;
  const float* scale = is_down ? b.down_scale : which == Matrix::gate ? b.gate_scale : b.up_scale;
  with_type(is_down ? b.down_type : b.up_type, [&](auto type) {
    using Type = decltype(type);
    using Out = std::conditional_t<std::is_same_v<Type, I8>, float, typename Type::Stored>;
    const auto* packed = reinterpret_cast<const typename Type::Stored*>(is_down ? b.down : b.up);
    const auto get = [&, packed](int e, int n, int k, size_t element) {
      const float factor = std::is_same_v<Type, I8> ? scale[size_t(e) * b.hidden_stride() + n] : 1.f;
      Out* to = static_cast<Out*>(out) + (size_t(e) * b.neurons + n) * b.width + k;
      if constexpr (std::is_same_v<Type, I8>)
        *to = float(packed[element]) * factor;
      else
        *to = packed[element];
    };
    is_down ? each_down(b, threads, get) : each_up(b, which, threads, get);
  });
}

bool PackedBank::unpack_bias(Matrix which, float* out) const {
  const float* from = which == Matrix::gate ? bank_.gate_bias : bank_.up_bias;
  if (!from) return false;
  for (int e = 0; e < bank_.experts; ++e)
    std::memcpy(out + size_t(e) * bank_.neurons, from + size_t(e) * bank_.hidden_stride(), bank_.neurons * sizeof(float));
  return true;
}

}  // namespace moefy
