// Routing, sorting by expert, and the two phases:
//   up    hidden[pair] = act(x[token] . up[expert])     pieces of (expert, <= 48 rows, units), taken one by one
//   down  y[:, columns] = bias + sum hidden . down      slices of columns, all experts in order: no reduction, no race
// Every value is computed by one thread in one order (tiles.h), so the number of threads changes no bit.
//
// Threads do not meet at barriers. The work is a row of steps made of jobs; whoever ends the last job of a step opens
// the next one. A thread that the system has not scheduled yet holds nobody up: the others do its share. With
// barriers and with the wait of libgomp, a call of 0.2 ms took 8-36 ms while another program used one of two cores.
#include "run.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "bf16.h"
#include "memory.h"
#include "team.h"

namespace moefy {
namespace {

constexpr int kUnits = 8;                       // most units of a piece: 96 KB of sums for 48 rows
constexpr int64_t kHiddenBytes = 24 << 20;      // hidden values of a token tile stay in a 32 MB L3
constexpr int64_t kMostTokens = 1024;           // of a tile: weights are read once per tile
constexpr int64_t kPieceBytes = 192 << 10;      // weights of a piece when there are few rows
constexpr int kChunk = 64;                      // tokens that one job of copying, selecting or sorting handles

int64_t slice_bytes() {  // of y in the down phase: half of L2
  static const int64_t bytes = [] {
    const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return int64_t(l2 > 0 ? l2 : 512 << 10) / 2;
  }();
  return bytes;
}

class Run {
 public:
  Run(const Call& call, Workspace& workspace);
  void work(int thread, int threads);
  bool valid() const { return !invalid_; }

 private:
  struct Tokens {  // of a tile, or of a chunk of a tile
    int64_t first;
    int count;
  };
  enum Phase { kCopy, kScore, kChoose, kScatter, kUp, kDown, kPhases };  // the steps of a tile

  Tokens tile_of(int64_t step) const {
    const int64_t first = step / kPhases * tile_;
    return {first, int(std::min<int64_t>(tile_, c_.tokens - first))};
  }
  int chunks(Tokens tile) const { return int(ceil_div(tile.count, kChunk)); }

  void reserve(int threads);
  void open(int64_t step);
  void job(int64_t step, int job, int thread);
  void copy_x(Tokens tile, int job);
  const char* row32(Tokens tile, int t) const;
  const char* expert_row(Tokens tile, int t) const;
  int score_jobs(Tokens tile) const;
  void score(Tokens tile, int job, int thread);
  void choose(Tokens tile, int job, int thread);
  int choose_one(int64_t token, const float* scores, int32_t* scratch, int32_t* chosen, float* weight);
  void plan(Tokens tile);
  void add_pieces(const Bank& bank, bool shared, int expert, int row, int rows);
  void scatter(Tokens tile, int job);
  void up(Tokens tile, const Piece& piece, int thread);
  void down(Tokens tile, int slice, int thread);
  void add_down(const Bank& bank, int expert, int first, int rows, bool shared, float* y, int64_t stride, int token0,
                int panel0, int panel1);
  void write_y(Tokens tile, const float* y, int64_t stride, int token0, int token1, int column0, int column1);

  float* thread_sums(int thread) { return ws_.threads.as<float>() + thread * thread_floats_; }
  int32_t* thread_keys(int thread) { return reinterpret_cast<int32_t*>(thread_sums(thread) + sums_floats_); }
  float* thread_y(int thread) { return thread_sums(thread) + sums_floats_ + keys_floats_; }

  const Call& c_;
  Workspace& ws_;
  const Kernels& k_;
  const bool dot_;
  const int experts_, capacity_;
  int tile_, score_stride_ = 0;
  int64_t steps_ = 0;
  bool weighted_, copy32_, copy16_;
  int64_t x_stride_ = 0;
  int64_t sums_floats_ = 0, keys_floats_ = 0, y_floats_ = 0, thread_floats_ = 0;
  int column_slices_ = 1, token_slices_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<bool> invalid_{false};
};

Run::Run(const Call& call, Workspace& workspace)
    : c_(call),
      ws_(workspace),
      k_(*call.kernels),
      dot_(call.bf16 && call.kernels->has_dot && (call.routed ? call.routed : call.shared) &&
           (call.routed ? call.routed : call.shared)->type == Weights::bf16),
      experts_(call.routed ? call.routed->experts : 0),
      capacity_(experts_ ? call.capacity : 0) {
  const Bank* weights = c_.routed ? c_.routed : c_.shared;
  weighted_ = capacity_ && (c_.gate_weights || c_.expert_scale);
  const int group = weights && weights->type == Weights::bf16 ? 4 : 2;  // k values that are read at once
  copy32_ = (!dot_ || c_.router) && (c_.bf16 || c_.x_column != 1 || c_.width % group != 0);
  copy16_ = dot_;
  x_stride_ = round_up(c_.width, kLanes);
  score_stride_ = c_.router ? c_.router->hidden_stride() : experts_;

  int64_t bytes = 4;
  if (c_.routed) bytes += int64_t(capacity_) * c_.routed->hidden_stride() * 4;
  if (c_.shared) bytes += int64_t(c_.shared->hidden_stride()) * 4;
  const int64_t most = std::clamp<int64_t>(kHiddenBytes / bytes, kRows, kMostTokens);
  tile_ = int(ceil_div(c_.tokens, std::max<int64_t>(1, ceil_div(c_.tokens, most))));
  reserve(allowed(c_.threads));
  open(0);
}

void Run::reserve(int threads) {
  const int64_t pairs = int64_t(tile_) * capacity_;
  steps_ = ceil_div(c_.tokens, tile_) * kPhases;
  if (steps_ > ws_.step_count) ws_.steps = std::make_unique<Step[]>(steps_), ws_.step_count = steps_;
  for (int64_t i = 0; i < steps_; ++i) ws_.steps[i].next = ws_.steps[i].done = 0, ws_.steps[i].open = false;
  if (copy32_) ws_.x32.reserve(tile_ * x_stride_ * 4);
  if (copy16_) ws_.x16.reserve(tile_ * x_stride_ * 2);
  if (c_.router) ws_.scores.reserve(int64_t(tile_) * score_stride_ * 4);
  if (c_.routed) {
    ws_.chosen.reserve(pairs * 4);
    ws_.chosen_count.reserve(tile_ * 4);
    ws_.counts.reserve(ceil_div(tile_, kChunk) * experts_ * 4);
    ws_.offsets.reserve((experts_ + 1) * 4);
    ws_.pair_token.reserve(pairs * 4);
    if (weighted_) ws_.weight.reserve(pairs * 4), ws_.pair_weight.reserve(pairs * 4);
    ws_.hidden.reserve(pairs * c_.routed->hidden_stride() * 4);
  }
  if (c_.shared) ws_.shared_hidden.reserve(int64_t(tile_) * c_.shared->hidden_stride() * 4);

  // Slices of y: as wide as fits, but at least two for every thread; of tokens too when columns are too few.
  const int panels = int(ceil_div(c_.width, kLanes));
  const int wanted = int(ceil_div(panels, std::max<int64_t>(1, slice_bytes() / (int64_t(tile_) * kLanes * 4))));
  column_slices_ = std::min(panels, int(round_up(std::max(wanted, 2 * threads), threads)));
  token_slices_ = int(std::clamp<int64_t>(2 * threads / std::max(1, column_slices_), 1, ceil_div(tile_, kRows)));
  y_floats_ = ceil_div(panels, std::max(1, column_slices_)) * kLanes * ceil_div(tile_, token_slices_);
  sums_floats_ = int64_t(kRows) * kUnits * 4 * kLanes;
  keys_floats_ = 2 * round_up(experts_, kLanes);
  thread_floats_ = round_up(sums_floats_ + keys_floats_ + y_floats_, 1024);
  ws_.threads.reserve(threads * thread_floats_ * 4);
}

// ---- inputs

float to_f32(float x) { return x; }
float to_f32(uint16_t x) { return from_bf16(x); }

template <class T>
void copy_row(const T* from, int64_t step, int width, int64_t padded, float* to) {
  if (step == 1)
    for (int i = 0; i < width; ++i) to[i] = to_f32(from[i]);
  else
    for (int i = 0; i < width; ++i) to[i] = to_f32(from[i * step]);
  std::fill(to + width, to + padded, 0.f);
}

// Swaps the middle two of every four values: in a block of bf16 weights k and k+2 share a lane.
void copy_row_swapped(const uint16_t* from, int64_t step, int width, int64_t padded, uint16_t* to) {
  for (int k = 0; k < padded; k += 4) {
    uint16_t x[4] = {0, 0, 0, 0};
    if (step == 1 && k + 4 <= width)
      std::memcpy(x, from + k, sizeof x);
    else
      for (int i = 0; i < 4 && k + i < width; ++i) x[i] = from[(k + i) * step];
    const uint16_t swapped[4] = {x[0], x[2], x[1], x[3]};
    std::memcpy(to + k, swapped, sizeof swapped);
  }
}

void Run::copy_x(Tokens tile, int job) {
  for (int t = job * kChunk; t < std::min(tile.count, (job + 1) * kChunk); ++t) {
    const int64_t at = (tile.first + t) * c_.x_row;
    const uint16_t* from16 = static_cast<const uint16_t*>(c_.x) + at;
    float* row = ws_.x32.as<float>() + t * x_stride_;
    if (copy32_ && c_.bf16) copy_row(from16, c_.x_column, c_.width, x_stride_, row);
    if (copy32_ && !c_.bf16) copy_row(static_cast<const float*>(c_.x) + at, c_.x_column, c_.width, x_stride_, row);
    if (copy16_) copy_row_swapped(from16, c_.x_column, c_.width, x_stride_, ws_.x16.as<uint16_t>() + t * x_stride_);
  }
}

const char* Run::row32(Tokens tile, int t) const {
  const float* row = copy32_ ? ws_.x32.as<float>() + t * x_stride_
                             : static_cast<const float*>(c_.x) + (tile.first + t) * c_.x_row;
  return reinterpret_cast<const char*>(row);
}

const char* Run::expert_row(Tokens tile, int t) const {
  return copy16_ ? ws_.x16.as<char>() + t * x_stride_ * 2 : row32(tile, t);
}

// ---- routing

// Few rows: every unit is a job, so that all threads read weights.
int score_groups(const Bank& router, int rows) { return int(ceil_div(router.units(), rows < kRows ? 1 : kUnits)); }

int Run::score_jobs(Tokens tile) const {
  return c_.router && capacity_ ? int(ceil_div(tile.count, kRows)) * score_groups(*c_.router, tile.count) : 0;
}

void Run::score(Tokens tile, int job, int thread) {
  const int units = c_.router->units(), row_groups = int(ceil_div(tile.count, kRows));
  const int unit_groups = score_groups(*c_.router, tile.count), g = job % unit_groups, r = job / unit_groups;
  const int row = tile.count * r / row_groups, end = tile.count * (r + 1) / row_groups;
  const int unit = units * g / unit_groups;
  const char* x[kRows];
  char* out[kRows];
  for (int t = row; t < end; ++t) {
    x[t - row] = row32(tile, t);
    out[t - row] = reinterpret_cast<char*>(ws_.scores.as<float>() + int64_t(t) * score_stride_ + unit * kLanes);
  }
  k_.up({c_.router, 0, unit, units * (g + 1) / unit_groups, end - row, x, thread_sums(thread), out, nullptr, false});
}

// Chosen experts of one token, without gaps; returns their number.
int Run::choose_one(int64_t token, const float* scores, int32_t* scratch, int32_t* chosen, float* weight) {
  int count = 0;
  if (c_.chosen) {
    for (int j = 0; j < capacity_; ++j) {
      const int32_t e = c_.chosen[token * capacity_ + j];
      if (e >= experts_) invalid_ = true;
      if (e < 0 || e >= experts_) continue;
      if (c_.gate_weights) weight[count] = c_.gate_weights[token * capacity_ + j];
      chosen[count++] = e;
    }
  } else {
    int32_t* found = scratch + round_up(experts_, kLanes);  // may write one more than it keeps
    count = k_.select(scores, experts_, c_.rule, scratch, found);
    std::copy(found, found + count, chosen);
  }
  if (c_.expert_scale) k_.gate(scores, experts_, c_.expert_scale, chosen, count, reinterpret_cast<float*>(scratch), weight);
  return count;
}

void Run::choose(Tokens tile, int job, int thread) {
  int32_t* counts = ws_.counts.as<int32_t>() + int64_t(job) * experts_;
  std::fill(counts, counts + experts_, 0);
  for (int t = job * kChunk; t < std::min(tile.count, (job + 1) * kChunk); ++t) {
    const int64_t token = tile.first + t;
    const float* scores = c_.router   ? ws_.scores.as<float>() + int64_t(t) * score_stride_
                          : c_.scores ? c_.scores + token * experts_
                                      : nullptr;
    int32_t* chosen = ws_.chosen.as<int32_t>() + int64_t(t) * capacity_;
    const int count = choose_one(token, scores, thread_keys(thread), chosen,
                                 weighted_ ? ws_.weight.as<float>() + int64_t(t) * capacity_ : nullptr);
    ws_.chosen_count.as<int32_t>()[t] = count;
    for (int j = 0; j < count; ++j) ++counts[chosen[j]];
    if (!c_.chosen_out) continue;
    int32_t* out = c_.chosen_out + token * capacity_;
    std::copy(chosen, chosen + count, out);
    std::fill(out + count, out + capacity_, -1);
  }
}

// Counts become the places where each chunk puts its tokens of each expert; the pieces of the up phase.
void Run::plan(Tokens tile) {
  ws_.pieces.clear();
  if (c_.shared) add_pieces(*c_.shared, true, 0, 0, tile.count);
  if (!c_.routed) return;
  int32_t* offsets = ws_.offsets.as<int32_t>();
  int32_t* counts = ws_.counts.as<int32_t>();
  int32_t place = 0;
  for (int e = 0; e < experts_; ++e) {
    offsets[e] = place;
    for (int chunk = 0; chunk < chunks(tile); ++chunk) {
      int32_t& count = counts[int64_t(chunk) * experts_ + e];
      const int32_t rows = count;
      count = place;
      place += rows;
    }
    const int32_t rows = place - offsets[e];
    if (c_.counts_out) c_.counts_out[e] += rows;
    if (rows) add_pieces(*c_.routed, false, e, offsets[e], rows);
  }
  offsets[experts_] = place;
}

void Run::add_pieces(const Bank& bank, bool shared, int expert, int row, int rows) {
  const int64_t unit_bytes = int64_t(bank.unit_panels()) * bank.up_panel_bytes();
  const int most = rows > 12 ? kUnits : int(std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(1, unit_bytes), 1, kUnits));
  const int units = bank.units(), unit_groups = int(ceil_div(units, most)), row_groups = int(ceil_div(rows, kRows));
  for (int r = 0; r < row_groups; ++r)
    for (int g = 0; g < unit_groups; ++g) {
      const int first = int(int64_t(rows) * r / row_groups), end = int(int64_t(rows) * (r + 1) / row_groups);
      ws_.pieces.push_back({shared, expert, row + first, end - first, int(int64_t(units) * g / unit_groups),
                            int(int64_t(units) * (g + 1) / unit_groups)});
    }
}

void Run::scatter(Tokens tile, int job) {
  int32_t* place = ws_.counts.as<int32_t>() + int64_t(job) * experts_;
  for (int t = job * kChunk; t < std::min(tile.count, (job + 1) * kChunk); ++t) {
    const int32_t* chosen = ws_.chosen.as<int32_t>() + int64_t(t) * capacity_;
    const int count = ws_.chosen_count.as<int32_t>()[t];
    for (int j = 0; j < count; ++j) {
      const int32_t at = place[chosen[j]]++;
      ws_.pair_token.as<int32_t>()[at] = t;
      if (weighted_) ws_.pair_weight.as<float>()[at] = ws_.weight.as<float>()[int64_t(t) * capacity_ + j];
    }
  }
}

// ---- the two phases

void Run::up(Tokens tile, const Piece& piece, int thread) {
  const Bank& bank = piece.shared ? *c_.shared : *c_.routed;
  const size_t value = dot_ ? 2 : 4, stride = bank.hidden_stride() * value;
  char* hidden = (piece.shared ? ws_.shared_hidden : ws_.hidden).as<char>() + piece.unit0 * kLanes * value;
  const char* x[kRows];
  char* out[kRows];
  for (int r = 0; r < piece.rows; ++r) {
    const int pair = piece.row + r;
    x[r] = expert_row(tile, piece.shared ? pair : ws_.pair_token.as<int32_t>()[pair]);
    out[r] = hidden + size_t(pair) * stride;
  }
  const float* weight = weighted_ && !piece.shared ? ws_.pair_weight.as<float>() + piece.row : nullptr;
  k_.up({&bank, piece.expert, piece.unit0, piece.unit1, piece.rows, x, thread_sums(thread), out, weight, dot_});
}

void Run::add_down(const Bank& bank, int expert, int first, int rows, bool shared, float* y, int64_t stride, int token0,
                   int panel0, int panel1) {
  const size_t row_bytes = size_t(bank.hidden_stride()) * (dot_ ? 2 : 4);
  const char* base = (shared ? ws_.shared_hidden : ws_.hidden).as<char>();
  const int32_t* token = ws_.pair_token.as<int32_t>();
  const char* hidden[kRows];
  float* out[kRows];
  const int groups = int(ceil_div(rows, kRows));
  for (int g = 0; g < groups; ++g) {
    const int begin = first + int(int64_t(rows) * g / groups), end = first + int(int64_t(rows) * (g + 1) / groups);
    for (int i = begin; i < end; ++i) {
      hidden[i - begin] = base + size_t(i) * row_bytes;
      out[i - begin] = y + int64_t((shared ? i : token[i]) - token0) * stride;
    }
    k_.down({&bank, expert, panel0, panel1, end - begin, hidden, out, dot_});
  }
}

void Run::down(Tokens tile, int slice, int thread) {
  const int panels = int(ceil_div(c_.width, kLanes));
  const int cs = slice % column_slices_, ts = slice / column_slices_;
  const int panel0 = panels * cs / column_slices_, panel1 = panels * (cs + 1) / column_slices_;
  const int token0 = int(int64_t(tile.count) * ts / token_slices_), token1 = int(int64_t(tile.count) * (ts + 1) / token_slices_);
  const int column0 = panel0 * kLanes, column1 = std::min(panel1 * kLanes, c_.width);
  const int64_t stride = (panel1 - panel0) * kLanes;
  float* y = thread_y(thread);
  for (int t = 0; t < token1 - token0; ++t) {
    if (c_.down_bias)
      std::memcpy(y + t * stride, c_.down_bias + column0, stride * 4);
    else
      std::memset(y + t * stride, 0, stride * 4);
  }

  if (c_.shared) add_down(*c_.shared, 0, token0, token1 - token0, true, y, stride, token0, panel0, panel1);
  const int32_t* offsets = ws_.offsets.as<int32_t>();
  const int32_t* token = ws_.pair_token.as<int32_t>();
  for (int e = 0; e < experts_; ++e) {
    int first = offsets[e], end = offsets[e + 1];
    if (token_slices_ > 1) {  // tokens of an expert are in ascending order
      first = int(std::lower_bound(token + first, token + end, token0) - token);
      end = int(std::lower_bound(token + first, token + end, token1) - token);
    }
    if (first < end) add_down(*c_.routed, e, first, end - first, false, y, stride, token0, panel0, panel1);
  }
  write_y(tile, y, stride, token0, token1, column0, column1);
}

void Run::write_y(Tokens tile, const float* y, int64_t stride, int token0, int token1, int column0, int column1) {
  for (int t = token0; t < token1; ++t, y += stride) {
    const int64_t at = (tile.first + t) * c_.width + column0;
    if (c_.bf16)
      for (int i = 0; i < column1 - column0; ++i) static_cast<uint16_t*>(c_.y)[at + i] = to_bf16(y[i]);
    else
      std::memcpy(static_cast<float*>(c_.y) + at, y, size_t(column1 - column0) * 4);
  }
}

// ---- steps

// Opens the first step from `step` on that has jobs. One thread at a time is here.
void Run::open(int64_t step) {
  for (; step < steps_; ++step) {
    Step& s = ws_.steps[step];
    const Tokens tile = tile_of(step);
    switch (step % kPhases) {
      case kCopy: s.total = copy32_ || copy16_ ? chunks(tile) : 0; break;
      case kScore: s.total = score_jobs(tile); break;
      case kChoose: s.total = c_.routed ? chunks(tile) : 0; break;
      case kScatter:
        plan(tile);
        s.total = c_.routed ? chunks(tile) : 0;
        break;
      case kUp: s.total = int(ws_.pieces.size()); break;
      case kDown: s.total = column_slices_ * token_slices_; break;
    }
    s.open.store(true, std::memory_order_release);
    if (s.total > 0) return;
  }
}

void Run::job(int64_t step, int job, int thread) {
  const Tokens tile = tile_of(step);
  switch (step % kPhases) {
    case kCopy: return copy_x(tile, job);
    case kScore: return score(tile, job, thread);
    case kChoose: return choose(tile, job, thread);
    case kScatter: return scatter(tile, job);
    case kUp: return up(tile, ws_.pieces[job], thread);
    case kDown: return down(tile, job, thread);
  }
}

template <class Ready>
void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 2000) sched_yield();  // 20-80 us: longer than any step should keep a thread waiting
  }
}

// Every thread of the team runs this.
void Run::work(int thread, int threads) {
  arrived_.fetch_add(1, std::memory_order_relaxed);
  for (int64_t step = 0; step < steps_; ++step) {
    Step& s = ws_.steps[step];
    wait_until([&] { return s.open.load(std::memory_order_acquire); });
    for (int i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.total;) {
      job(step, i, thread);
      if (s.done.fetch_add(1, std::memory_order_acq_rel) + 1 == s.total) open(step + 1);
    }
  }
  // libgomp's own wait at the end of the region spins for milliseconds on a core that a late thread may need.
  wait_until([&] { return arrived_.load(std::memory_order_relaxed) == threads; });
}

Workspaces workspaces;

}  // namespace

bool forward(const Call& call) {
  if (call.tokens == 0 || call.width == 0) return true;
  std::unique_ptr<Workspace> workspace = workspaces.take();
  Run run(call, *workspace);
  const int threads = allowed(call.threads);
  if (threads == 1) {
    run.work(0, 1);
  } else {
#pragma omp parallel num_threads(threads)
    run.work(omp_get_thread_num(), omp_get_num_threads());
  }
  workspaces.give_back(std::move(workspace));
  return run.valid();
}

}  // namespace moefy
