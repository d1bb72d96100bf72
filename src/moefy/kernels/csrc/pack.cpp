#include "pack.h"

#include <cmath>

#include "small_floats.h"
#include "team.h"

namespace moefy {
namespace {

float value(Source source, size_t i) {
  if (source.type == Weights::f32) return static_cast<const float*>(source.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(source.data)[i];
  return source.type == Weights::bf16 ? from_bf16(half) : from_f16(half);
}

// Where the value of neuron n of a panel and input k is, in elements from the start of the panel. A block holds 8
// neurons x 2 k; bf16 puts k, k+1 in the low halves and k+2, k+3 in the high halves.
size_t in_panel(const Bank& bank, int n, int k) {
  const int depth = block_depth(bank.up_type), group = 2 * depth, r = k % group;
  return size_t(k / group) * kLanes * depth + size_t(2 * n + r % 2) * depth + r / 2;
}

// The same from the start of the expert; tiled panels of an even and an odd number share rows.
size_t up_position(const Bank& bank, int panel, int n, int k) {
  const size_t values = bank.up_panel_bytes() / value_bytes(bank.up_type);
  if (!bank.tiled) return panel * values + in_panel(bank, n, k);
  const int first = panel & ~1, columns = first + 1 < bank.up_panels() ? 2 * kNeurons : kNeurons;
  return first * values + (size_t(k / 2) * columns + (panel - first) * kNeurons + n) * 2 + k % 2;
}

size_t down_position(const Bank& bank, int n, int column) {
  const int depth = block_depth(bank.down_type);
  return size_t(n / depth) * kLanes * depth + size_t(column) * depth + n % depth;
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
      for (int k = 0; k < bank.width; ++k) visit(e, n, k, e * elements + up_position(bank, panel, n % kNeurons, k));
  });
}

template <class Visit>
void each_down(const Bank& bank, int threads, const Visit& visit) {
  const size_t elements = size_t(bank.down_steps()) * kLanes * block_depth(bank.down_type);
  const int panels = bank.down_panels();
  parallel(threads, int64_t(bank.experts) * panels, [&](int64_t i) {
    const int e = int(i / panels), p = int(i % panels), first = bank.joined ? e * bank.neurons : 0;
    const size_t panel = size_t(bank.joined ? p : i) * elements;
    for (int n = 0; n < bank.neurons; ++n)
      for (int c = 0; c < kLanes && p * kLanes + c < bank.width; ++c)
        visit(e, n, p * kLanes + c, panel + down_position(bank, first + n, c));
  });
}

int8_t rounded(float v) {  // a scale that is denormal can be less than it should be, or 0
  return v == v ? int8_t(std::lrintf(v > 127 ? 127 : v < -127 ? -127 : v)) : 0;
}

struct Put {  // writes one weight in the bank's format
  Weights type;
  char* to;
  Source from;
  void operator()(size_t element, size_t index, float scale) const {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    if (type == from.type && type != Weights::f32) {
      halves[element] = static_cast<const uint16_t*>(from.data)[index];
      return;
    }
    switch (type) {
      case Weights::f32: reinterpret_cast<float*>(to)[element] = value(from, index); break;
      case Weights::bf16: halves[element] = to_bf16(value(from, index)); break;
      case Weights::f16: halves[element] = to_f16(value(from, index)); break;
      case Weights::i8: reinterpret_cast<int8_t*>(to)[element] = rounded(value(from, index) / scale); break;
    }
  }
};

}  // namespace

PackedBank::PackedBank(const Shape& shape, Source gate, Source up, Source down, const float* columns,
                       const float* gate_bias, const float* up_bias, int threads) {
  Bank& b = bank_;
  b.experts = shape.experts, b.neurons = shape.neurons, b.width = shape.width;
  b.gated = gate.data != nullptr, b.act = shape.act, b.activate_up = shape.activate_up;
  b.absolute = shape.absolute, b.up_type = shape.up, b.down_type = shape.down, b.tiled = shape.tiled && b.is_bf16();
  b.joined = b.tiled && down.data && b.experts > 1 && b.neurons <= kJoinedNeurons;
  if (b.up_type == Weights::i8) find_scales(gate, up, down, columns);
  pack_bias(up_bias, b.up_bias, up_bias_);
  pack_bias(gate_bias, b.gate_bias, gate_bias_);

  up_ = Memory(b.up_bytes());
  b.up = up_.as<char>();
  up_.clear();
  const size_t stride = b.hidden_stride();
  const auto pack_up = [&](Matrix which, Source from, const float* scale) {
    const Put put{b.up_type, b.up, from};
    each_up(b, which, threads, [&](int e, int n, int k, size_t element) {
      put(element, (size_t(e) * b.neurons + n) * b.width + k, scale ? scale[e * stride + n] : 1.f);
    });
  };
  pack_up(Matrix::up, up, b.up_scale);
  if (b.gated) pack_up(Matrix::gate, gate, b.gate_scale);
  if (!down.data) return;

  down_ = Memory(b.down_bytes());
  b.down = down_.as<char>();
  down_.clear();
  const Put put{b.down_type, b.down, down};
  each_down(b, threads, [&](int e, int n, int k, size_t element) {
    const float scale = (b.down_scale ? b.down_scale[e * stride + n] : 1.f) * (columns ? columns[k] : 1.f);
    put(element, (size_t(e) * b.neurons + n) * b.width + k, scale);
  });
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

void PackedBank::find_scales(Source gate, Source up, Source down, const float* columns) {
  const auto find = [&](Source from, const float* over, float*& to, Memory& memory) {
    if (!from.data) return;
    to = rows(memory);
    for (int e = 0; e < bank_.experts; ++e)
      for (int n = 0; n < bank_.neurons; ++n) {
        float most = 0;
        const size_t row = (size_t(e) * bank_.neurons + n) * bank_.width;
        for (int k = 0; k < bank_.width; ++k) {  // no fmax: GCC 12 for Arm stops with an internal error
          const float size = std::fabs(value(from, row + k)) / (over ? over[k] : 1.f);
          // A weight that is no number has to be seen: in down by its column, elsewhere by its neuron.
          if (size > most || (size != size && !over)) most = size;
        }
        to[size_t(e) * bank_.hidden_stride() + n] = most == 0 ? 1 : most / 127;
      }
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
  const char* from = which == Matrix::down ? b.down : b.up;
  const float* scale = which == Matrix::down ? b.down_scale : which == Matrix::gate ? b.gate_scale : b.up_scale;
  const auto get = [&](int e, int n, int k, size_t element) {
    const size_t index = (size_t(e) * b.neurons + n) * b.width + k;
    switch (which == Matrix::down ? b.down_type : b.up_type) {
      case Weights::f32: static_cast<float*>(out)[index] = reinterpret_cast<const float*>(from)[element]; break;
      case Weights::bf16:
      case Weights::f16: static_cast<uint16_t*>(out)[index] = reinterpret_cast<const uint16_t*>(from)[element]; break;
      case Weights::i8:
        static_cast<float*>(out)[index] =
            float(reinterpret_cast<const int8_t*>(from)[element]) * scale[size_t(e) * b.hidden_stride() + n];
        break;
    }
  };
  if (which == Matrix::down)
    each_down(b, threads, get);
  else
    each_up(b, which, threads, get);
}

bool PackedBank::unpack_bias(Matrix which, float* out) const {
  const float* from = which == Matrix::gate ? bank_.gate_bias : bank_.up_bias;
  if (!from) return false;
  for (int e = 0; e < bank_.experts; ++e)
    std::memcpy(out + size_t(e) * bank_.neurons, from + size_t(e) * bank_.hidden_stride(), bank_.neurons * sizeof(float));
  return true;
}

}  // namespace moefy
