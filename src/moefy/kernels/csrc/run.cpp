// Routing, sorting by expert, and the two phases:
//   up    hidden[pair] = act(x[token] . up[expert])     pieces of (expert, <= 48 rows, units), taken one by one;
//                                                       of a single token several small experts at once
//   down  y[:, columns] = sum hidden . down + bias      slices of columns, all experts in order: no reduction, no race
// Every value is computed by one thread in one order (tiles.h), so the number of threads changes no bit.
//
// Threads do not meet at barriers. The work is a row of steps made of jobs; whoever ends the last job of a step opens
// the next one. A thread that the system has not scheduled yet holds nobody up: the others do its share. With
// barriers and with the wait of libgomp, a call of 0.2 ms took 8-36 ms while another program used one of two cores.
#include <sched.h>
#include <unistd.h>

#include <chrono>

#include "small_floats.h"
#include "call.h"
#include "team.h"

namespace moefy {

namespace {

int64_t most_slice_bytes() {  // of y in the down phase: half of L2
  static const int64_t bytes = [] {
    const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return int64_t(l2 > 0 ? l2 : 512 << 10) / 2;
  }();
  return bytes;
}

// Panels in a slice of y. 64 KB: up to 32 tokens a thread works on one slice and reads long pieces of weights (1 to 16
// tokens take 2-10 % less than with two), and more tokens are many slices, with which threads end together though one
// is slower (128 to 512 tokens take 0-2 % less than with 256 KB, and 2-9 % on a busy machine). But at least four panels
// and 4 KB of an expert's weights: with less, experts of 8 take 3-6 % more (Zen 3, L2 of 512 KB); 8 KB where L2 has 1 MB
// for as much more of y: 128 and 256 tokens of those take another 0-4 % less, others as long (Zen 4). And about eight
// panels where a core makes two products of 512 bits in a cycle: where zeros are left out (sparse.h) a tile has a sum for
// each panel, and with four of them a product would wait for the one before (80 % zeros, 256 and 1,024 tokens: the down phase takes 26
// and 33 % less than with four, without zeros 9 and 11 %; Emerald Rapids).
int64_t slice_panels(int64_t panel_bytes, const Bank* routed, bool wide_core, bool widest) {
  const int64_t least = most_slice_bytes() >= int64_t(512) << 10 ? int64_t(8) << 10 : int64_t(4) << 10;
  const int64_t read = routed ? ceil_div(least, std::max<int64_t>(1, routed->down_panel_bytes())) : 1;
  const int64_t wide = std::max({(int64_t(64) << 10) / panel_bytes, int64_t(wide_core ? 8 : 4), read});
  const int64_t most = std::max<int64_t>(1, most_slice_bytes() / panel_bytes);
  return widest ? most : std::min(wide, most);
}

// Rows of y are an odd number of cache lines: the same columns of many rows are worked on one after another.
int64_t y_stride(int panels) { return int64_t(panels | 1) * kLanes; }

const Bank* weights_of(const Call& call) { return call.routed ? call.routed : call.shared; }

}  // namespace

Run::Run(const Call& call, Workspace& workspace)
    : c_(call),
      ws_(workspace),
      k_(*call.kernels),
      tiled_(weights_of(call) && weights_of(call)->tiled),
      dot_(call.bf16 && call.kernels->has_dot && weights_of(call) && weights_of(call)->is_bf16()),
      experts_(call.routed ? call.routed->experts : 0),
      capacity_(experts_ ? call.capacity : 0) {
  const Bank* weights = weights_of(c_);
  weighted_ = capacity_ && (c_.gate_weights || c_.expert_scale);
  const int group = weights && weights->up_type == Weights::bf16 ? 4 : 2;  // k values that are read at once
  tiled_scores_ = tiled_ && dot_ && c_.router && c_.router->up_type == Weights::f32;
  copy32_ = (!dot_ || (c_.router && !tiled_scores_)) && (c_.bf16 || c_.x_column != 1 || c_.width % group != 0);
  copy16_ = dot_ && (!tiled_ || c_.x_column != 1);
  hidden_bytes_ = hidden_bytes(tiled_, dot_);
  joined_ = capacity_ && c_.routed->joined;
  x_stride_ = round_up(c_.width, kLanes);
  score_stride_ = c_.router ? c_.router->hidden_stride() : experts_;

  int64_t bytes = 4;
  if (c_.routed) bytes += joined_ ? joined_row() : int64_t(capacity_) * c_.routed->hidden_stride() * hidden_bytes_;
  if (c_.shared) bytes += int64_t(c_.shared->hidden_stride()) * hidden_bytes_;
  const int64_t most = std::clamp<int64_t>(kHiddenBytes / bytes, kRows, kMostTokens);
  tile_ = int(ceil_div(c_.tokens, std::max<int64_t>(1, ceil_div(c_.tokens, most))));
  const int threads = allowed(c_.threads);
  if (c_.tokens == 1 && experts_) {
    const int panels = tiled_ ? 2 * kRowPanels : kRowPanels;  // AMX's panels are read in pairs
    together_ = std::min({panels / c_.routed->up_panels(), capacity_ / (4 * threads), kRowPanels});
  }
  reserve(threads);
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
    if (joined_) ws_.needed.reserve(ceil_div(tile_, kJoinedRows) * joined_parts());
    ws_.hidden.reserve(joined_ ? round_up(tile_, kJoinedRows) * joined_row()
                               : pairs * c_.routed->hidden_stride() * hidden_bytes_);
  }
  ws_.pieces.reserve(most_pieces());
  if (c_.shared) ws_.shared_hidden.reserve(int64_t(tile_) * c_.shared->hidden_stride() * hidden_bytes_);

  // Slices of y; of tokens too when columns are few. AMX was measured with the widest that fit, two for every thread.
  const int panels = int(ceil_div(c_.width, kLanes)), least = tiled_ ? 2 * threads : threads;
  const int64_t wide = slice_panels(int64_t(tile_) * kLanes * 4, c_.routed, k_.wide && two_products(), tiled_);
  column_slices_ = std::min(panels, int(round_up(std::max<int64_t>(ceil_div(panels, wide), least), threads)));
  token_slices_ = int(std::clamp<int64_t>(least / std::max(1, column_slices_), 1, ceil_div(tile_, kRows)));
  y_floats_ = y_stride(int(ceil_div(panels, std::max(1, column_slices_)))) *
              (ceil_div(tile_, token_slices_) + (joined_ ? kJoinedRows : 0));  // slices begin at whole blocks
  sums_floats_ = int64_t(kRows) * kUnits * 4 * kLanes;
  if (tiled_) sums_floats_ = std::max(sums_floats_, int64_t(kTiledRows) * most_units(true) * 4 * kNeurons);
  if (tiled_) sums_floats_ += tile_scratch(c_.width, dot_) / 4;
  if (tiled_scores_) sums_floats_ = std::max(sums_floats_, split_scratch(*c_.router) / 4);
  for (const Bank* bank : {c_.routed, c_.shared})
    if (tiled_ && bank) sums_floats_ = std::max(sums_floats_, row_scratch(bank->down_neurons()) / 4);
  keys_floats_ = 2 * round_up(experts_, kLanes);
  thread_floats_ = round_up(sums_floats_ + keys_floats_ + y_floats_, 1024);
  ws_.threads.reserve(threads * thread_floats_ * 4);
}

// ---- the two phases

// Where the hidden values of one token and expert begin.
char* Run::hidden_of(const Bank& bank, int expert, int pair, int token) const {
  char* hidden = (&bank == c_.shared ? ws_.shared_hidden : ws_.hidden).as<char>();
  if (bank.joined) return hidden + token * joined_row() + size_t(expert) * bank.neurons * 2;
  return hidden + size_t(pair) * bank.hidden_stride() * hidden_bytes_;
}

void Run::up_experts(Tokens tile, const Piece& piece, int thread) {
  const Bank& bank = *c_.routed;
  const int32_t* offsets = ws_.offsets.as<int32_t>();
  const char* x = expert_row(tile, 0);
  char* out[kRowPanels];
  UpTask tasks[kRowPanels];
  for (int i = 0, e = piece.expert; i < piece.experts; ++i, ++e) {
    while (offsets[e] == offsets[e + 1]) ++e;  // not chosen
    const int pair = piece.row + i;
    out[i] = hidden_of(bank, e, pair, 0);
    tasks[i] = {&bank, e, 0, bank.units(), 1, &x, thread_sums(thread) + i * bank.up_panels() * kLanes, &out[i],
                weighted_ ? ws_.pair_weight.as<float>() + pair : nullptr, dot_};
  }
  k_.up_row(tasks, piece.experts);
}

void Run::up_all(Tokens tile, const Piece& piece, int thread) {
  const int32_t *offsets = ws_.offsets.as<int32_t>(), *token = ws_.pair_token.as<int32_t>();
  const char* x[kTiledRows];
  int32_t begin[kTiledRows], end[kTiledRows];
  for (int r = 0; r < piece.rows; ++r) x[r] = expert_row(tile, piece.row + r);
  for (int i = 0; i < piece.experts; ++i) {  // tokens of an expert are in ascending order
    const int32_t* last = token + offsets[piece.expert + i + 1];
    const int32_t* first = std::lower_bound(token + offsets[piece.expert + i], last, piece.row);
    begin[i] = int32_t(first - token), end[i] = int32_t(std::lower_bound(first, last, piece.row + piece.rows) - token);
  }
  k_.up_joined({{c_.routed, piece.expert, 0, 0, piece.rows, x, thread_sums(thread), nullptr, nullptr, dot_},
                piece.experts, begin, end, token, piece.row, weighted_ ? ws_.pair_weight.as<float>() : nullptr,
                ws_.hidden.as<char>(), joined_row()});
}

void Run::up(Tokens tile, const Piece& piece, int thread) {
  if (piece.all) return up_all(tile, piece, thread);
  if (piece.experts > 1) return up_experts(tile, piece, thread);
  const Bank& bank = piece.shared ? *c_.shared : *c_.routed;
  const size_t value = tiled_ ? 2 : hidden_bytes_;
  const char* x[kTiledRows];
  char* out[kTiledRows];
  for (int r = 0; r < piece.rows; ++r) {
    const int pair = piece.row + r, token = piece.shared ? pair : ws_.pair_token.as<int32_t>()[pair];
    x[r] = expert_row(tile, token);
    out[r] = hidden_of(bank, piece.expert, pair, token) + piece.unit0 * kLanes * value;
  }
  const float* weight = weighted_ && !piece.shared ? ws_.pair_weight.as<float>() + piece.row : nullptr;
  k_.up({&bank, piece.expert, piece.unit0, piece.unit1, piece.rows, x, thread_sums(thread), out, weight, dot_});
}

void Run::add_down(const Bank& bank, int expert, int first, int rows, bool alone, float* y, int64_t stride, int token0,
                   int panel0, int panel1, int next, char* scratch) {
  const bool shared = &bank == c_.shared;
  const size_t row_bytes = size_t(bank.hidden_stride()) * hidden_bytes_;
  const char* base = (shared ? ws_.shared_hidden : ws_.hidden).as<char>();
  const int32_t* token = ws_.pair_token.as<int32_t>();
  const char* hidden[kDownRows];
  float* out[kDownRows];
  const int groups = int(ceil_div(rows, most_down_rows(tiled_)));
  for (int g = 0; g < groups; ++g) {
    const int begin = first + int(int64_t(rows) * g / groups), end = first + int(int64_t(rows) * (g + 1) / groups);
    for (int i = begin; i < end; ++i) {
      hidden[i - begin] = base + size_t(i) * row_bytes;
      out[i - begin] = y + int64_t((shared ? i : token[i]) - token0) * stride;
    }
    k_.down({&bank, expert, next, panel0, panel1, end - begin, hidden, out, scratch, dot_, alone});
  }
}

void Run::add_joined(int thread, float* y, int64_t stride, int token0, int token1, int panel0, int panel1) {
  const uint8_t* needed = ws_.needed.as<uint8_t>() + token0 / kJoinedRows * joined_parts();
  k_.down_joined({c_.routed, panel0, panel1, token1 - token0, ws_.hidden.as<char>() + token0 * joined_row(), needed, y,
                  stride, reinterpret_cast<char*>(thread_sums(thread)), dot_});
}

void Run::down(Tokens tile, int slice, int thread) {
  const int panels = int(ceil_div(c_.width, kLanes));
  const int cs = slice % column_slices_, ts = slice / column_slices_;
  const int panel0 = int(int64_t(panels) * cs / column_slices_);
  const int panel1 = int(int64_t(panels) * (cs + 1) / column_slices_);
  const auto cut = [&](int part) {
    const int64_t token = int64_t(tile.count) * part / token_slices_;
    return int(joined_ && part < token_slices_ ? token / kJoinedRows * kJoinedRows : token);
  };
  const int token0 = cut(ts), token1 = cut(ts + 1);
  const int column0 = panel0 * kLanes, column1 = std::min(panel1 * kLanes, c_.width);
  const int64_t stride = y_stride(panel1 - panel0), columns = (panel1 - panel0) * kLanes;
  float* y = thread_y(thread);
  for (int t = 0; t < token1 - token0; ++t) std::memset(y + t * stride, 0, columns * 4);

  char* scratch = reinterpret_cast<char*>(thread_sums(thread));
  // Whether a row is the only one is asked of the tile, since slices depend on the threads.
  if (c_.shared)
    add_down(*c_.shared, 0, token0, token1 - token0, tile.count == 1, y, stride, token0, panel0, panel1, 0, scratch);
  if (joined_ && token0 < token1) add_joined(thread, y, stride, token0, token1, panel0, panel1);
  const int32_t* offsets = ws_.offsets.as<int32_t>();
  const int32_t* token = ws_.pair_token.as<int32_t>();
  for (int e = 0, next = 0; e < experts_ && !joined_; ++e) {
    int first = offsets[e], end = offsets[e + 1];
    if (first == end) continue;
    const bool alone = end - first == 1;
    for (next = std::max(next, e + 1); next < experts_ && offsets[next] == offsets[next + 1];) ++next;
    if (next == experts_) next = e;
    if (token_slices_ > 1) {  // tokens of an expert are in ascending order
      first = int(std::lower_bound(token + first, token + end, token0) - token);
      end = int(std::lower_bound(token + first, token + end, token1) - token);
    }
    if (first < end) add_down(*c_.routed, e, first, end - first, alone, y, stride, token0, panel0, panel1, next, scratch);
  }
  if (c_.y_scale || c_.down_bias) finish_y(y, stride, token1 - token0, column0, column1);
  write_y(tile, y, stride, token0, token1, column0, column1);
}

// The scale of y where down's columns were divided by one, then the bias: last, since sums that began at a large bias
// would lose small contributions one by one.
void Run::finish_y(float* y, int64_t stride, int rows, int column0, int column1) {
  const float* scale = c_.y_scale ? c_.y_scale + column0 : nullptr;
  const float* bias = c_.down_bias ? c_.down_bias + column0 : nullptr;
  const int columns = column1 - column0;
  for (int r = 0; r < rows; ++r, y += stride) {
    for (int i = 0; scale && i < columns; ++i) y[i] *= scale[i];
    for (int i = 0; bias && i < columns; ++i) y[i] += bias[i];
  }
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
      case kSelect: s.total = c_.routed ? chunks(tile) : 0; break;
      case kSort:
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
    case kSelect: return choose(tile, job, thread);
    case kSort: return scatter(tile, job);
    case kUp: return up(tile, ws_.pieces[job], thread);
    case kDown: return down(tile, job, thread);
  }
}

template <class Ready>
static void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 2000) sched_yield();  // 20-80 us: longer than any step should keep a thread waiting
  }
}

// Every thread of the team runs this.
void Run::work(int thread, int threads) {
  using Clock = std::chrono::steady_clock;
  const auto timed = [&](int64_t step, const auto& run) {
    if (!c_.phases_out) return run();
    const Clock::time_point start = Clock::now();
    run();
    const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start);
    spent_[step % kPhases].fetch_add(spent.count(), std::memory_order_relaxed);
  };
  arrived_.fetch_add(1, std::memory_order_relaxed);
  for (int64_t step = 0; step < steps_; ++step) {
    Step& s = ws_.steps[step];
    wait_until([&] { return s.open.load(std::memory_order_acquire); });
    for (int i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.total;) {
      timed(step, [&] { job(step, i, thread); });
      if (s.done.fetch_add(1, std::memory_order_acq_rel) + 1 == s.total) timed(step + 1, [&] { open(step + 1); });
    }
  }
  // libgomp's own wait at the end of the region spins for milliseconds on a core that a late thread may need.
  wait_until([&] { return arrived_.load(std::memory_order_relaxed) == threads; });
}

bool Run::finish() const {
  for (int phase = 0; c_.phases_out && phase < kPhases; ++phase) c_.phases_out[phase] += spent_[phase];
  return !invalid_;
}

static Workspaces workspaces;

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
  return run.finish();
}

}  // namespace moefy
