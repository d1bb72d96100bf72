// Aligned memory that grows, and what a call needs besides weights.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "ffn.h"

namespace moefy {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { reserve(bytes); }
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() { std::free(data_); }

  // Contents are lost when it grows.
  void reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    std::free(data_);
    data_ = nullptr, bytes_ = 0;
    const size_t align = bytes >= kHuge ? kHuge : kAlign;
    if (posix_memalign(&data_, align, bytes) != 0) {
      data_ = nullptr;
      throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    bytes_ = bytes;
  }
  void clear() {
    if (bytes_) std::memset(data_, 0, bytes_);
  }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kHuge = size_t(2) << 20;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// One piece of the first phase.
struct Piece {
  bool shared;
  int expert, row, rows, unit0, unit1;  // row: of the pairs sorted by expert, or of the tokens for the shared expert
  // With a single token: as many chosen ones, from `expert` on, a row each. All products of joined experts: as many
  // experts, for `rows` tokens.
  int experts = 1;
  bool all = false;
};

// A step of a call: `total` jobs that any thread takes; the thread that ends the last one opens the next step.
struct Step {
  std::atomic<int> next{0}, done{0};
  std::atomic<bool> open{false};
  int total = 0;
};

// Scratch of one call, bounded by the token tile (run.cpp). Calls take one and give it back, so all layers share it.
struct Workspace {
  Memory x32, x16, scores, chosen, chosen_count, weight, counts, offsets, pair_token, pair_weight;
  Memory hidden, shared_hidden, needed;
  Memory threads;  // a slice for every thread: sums of the up phase, keys of the selection, y of the down phase
  std::vector<Piece> pieces;
  std::unique_ptr<Step[]> steps;
  int64_t step_count = 0;
};

// A few slots that change hands by atomic exchange: no lock that a fork could leave taken.
class Workspaces {
 public:
  std::unique_ptr<Workspace> take() {
    for (auto& slot : slots_)
      if (Workspace* found = slot.exchange(nullptr)) return std::unique_ptr<Workspace>(found);
    return std::make_unique<Workspace>();
  }
  void give_back(std::unique_ptr<Workspace> workspace) {
    for (auto& slot : slots_) {
      Workspace* empty = nullptr;
      if (slot.compare_exchange_strong(empty, workspace.get())) {
        workspace.release();
        return;
      }
    }
  }
  ~Workspaces() {
    for (auto& slot : slots_) delete slot.exchange(nullptr);
  }

 private:
  std::atomic<Workspace*> slots_[4] = {};
};

}  // namespace moefy
