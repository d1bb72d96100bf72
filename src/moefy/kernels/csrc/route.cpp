// Before the phases: copies of x where they are needed, scores, selection, and sorting the pairs (token, expert).
#include <cassert>

#include "small_floats.h"
#include "call.h"

namespace moefy {

// ---- inputs

static float to_f32(float x) { return x; }
static float to_f32(uint16_t x) { return from_bf16(x); }

template <class T>
static void copy_row(const T* from, int64_t step, int width, int64_t padded, float* to) {
  if (step == 1)
    for (int i = 0; i < width; ++i) to[i] = to_f32(from[i]);
  else
    for (int i = 0; i < width; ++i) to[i] = to_f32(from[i * step]);
  std::fill(to + width, to + padded, 0.f);
}

// Swaps the middle two of every four values: in a block of bf16 weights k and k+2 share a lane. Four at a time, as bits
// of one word: one by one took 10 % of a call of 1,024 tokens (GLU D576, Zen 4).
static void put_swapped(const uint16_t* from, uint16_t* to) {
  constexpr uint64_t kOuter = 0xffff00000000ffff, kSecond = 0xffff0000, kThird = 0xffff00000000;
  uint64_t four;
  std::memcpy(&four, from, sizeof four);
  four = (four & kOuter) | (four & kSecond) << 16 | (four & kThird) >> 16;
  std::memcpy(to, &four, sizeof four);
}

static void copy_row_swapped(const uint16_t* from, int64_t step, int width, int64_t padded, uint16_t* to) {
  const int whole = step == 1 ? width / 4 * 4 : 0;
  for (int k = 0; k < whole; k += 4) put_swapped(from + k, to + k);
  for (int k = whole; k < padded; k += 4) {
    uint16_t x[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4 && k + i < width; ++i) x[i] = from[(k + i) * step];
    put_swapped(x, to + k);
  }
}

void Run::copy_x(Tokens tile, int job) {
  for (int t = job * kChunk; t < std::min(tile.count, (job + 1) * kChunk); ++t) {
    const int64_t at = (tile.first + t) * c_.x_row;
    const uint16_t* from16 = static_cast<const uint16_t*>(c_.x) + at;
    if (copy32_) {
      float* row = ws_.x32.as<float>() + t * x_stride_;
      if (c_.bf16)
        copy_row(from16, c_.x_column, c_.width, x_stride_, row);
      else
        copy_row(static_cast<const float*>(c_.x) + at, c_.x_column, c_.width, x_stride_, row);
    }
    if (!copy16_) continue;
    uint16_t* row16 = ws_.x16.as<uint16_t>() + t * x_stride_;
    if (!tiled_) copy_row_swapped(from16, c_.x_column, c_.width, x_stride_, row16);
    for (int i = 0; tiled_ && i < c_.width; ++i) row16[i] = from16[i * c_.x_column];
  }
}

const char* Run::row32(Tokens tile, int t) const {
  const float* row = copy32_ ? ws_.x32.as<float>() + t * x_stride_
                             : static_cast<const float*>(c_.x) + (tile.first + t) * c_.x_row;
  return reinterpret_cast<const char*>(row);
}

const char* Run::expert_row(Tokens tile, int t) const {
  if (copy16_) return ws_.x16.as<char>() + t * x_stride_ * 2;
  if (dot_) return static_cast<const char*>(c_.x) + (tile.first + t) * c_.x_row * 2;  // tiles are gathered from it
  return row32(tile, t);
}

// ---- routing

// Few rows: every unit is a job, so that all threads read weights.
static int score_groups(const Bank& router, int rows, bool tiled) {
  return int(ceil_div(router.units(), rows < kRows ? 1 : tiled ? split_units(router) : kUnits));
}

int Run::score_jobs(Tokens tile) const {
  if (!c_.router || !capacity_) return 0;
  return int(ceil_div(tile.count, score_rows())) * score_groups(*c_.router, tile.count, tiled_scores_);
}

void Run::score(Tokens tile, int job, int thread) {
  const int units = c_.router->units(), row_groups = int(ceil_div(tile.count, score_rows()));
  const int unit_groups = score_groups(*c_.router, tile.count, tiled_scores_), g = job % unit_groups, r = job / unit_groups;
  const int row = tile.count * r / row_groups, end = tile.count * (r + 1) / row_groups;
  const int unit = int(int64_t(units) * g / unit_groups);  // 64 bits: a million experts overflow 32
  const char* x[kScoreRows];
  char* out[kScoreRows];
  for (int t = row; t < end; ++t) {
    x[t - row] = tiled_scores_ ? expert_row(tile, t) : row32(tile, t);
    out[t - row] = reinterpret_cast<char*>(ws_.scores.as<float>() + int64_t(t) * score_stride_ + unit * kLanes);
  }
  k_.up({c_.router, 0, unit, int(int64_t(units) * (g + 1) / unit_groups), end - row, x, thread_sums(thread), out, nullptr,
         tiled_scores_});
}

// Chosen experts of one token, without gaps; returns their number.
int Run::choose_one(int64_t token, const float* scores, int32_t* scratch, int32_t* chosen, float* weight) {
  int count = 0;
  if (c_.chosen) {
    int32_t* seen = scratch;
    std::fill(seen, seen + experts_, 0);
    for (int j = 0; j < capacity_; ++j) {
      const int32_t e = c_.chosen[token * capacity_ + j];
      if (e < 0) continue;
      if (e >= experts_ || seen[e]++) {  // two rows of one token and expert would write over each other
        invalid_ = true;
        continue;
      }
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
    if (c_.counts_out) c_.counts_out[e] += place - offsets[e];
  }
  offsets[experts_] = place;
  if (multiply_all(tile, place)) return add_all(tile);
  for (int e = 0; e < experts_; ++e) {
    const int32_t rows = offsets[e + 1] - offsets[e];
    if (rows && together_ > 1)
      add_single(e, offsets[e]);
    else if (rows)
      add_pieces(*c_.routed, false, e, offsets[e], rows);
  }
}

// A row of x costs an expert as much to gather as six tiles of columns for that row. So with small experts it can be
// cheaper to multiply every token with every expert.
bool Run::multiply_all(Tokens tile, int pairs) const {
  if (!joined_ || tile.count < kJoinedRows) return false;
  const int64_t columns = ceil_div(c_.routed->up_panels(), 2);
  return pairs * (columns + 6) >= int64_t(experts_) * tile.count * columns;
}

static int experts_at_once(const Bank& bank) { return std::min(4 * most_units(true) / bank.up_panels(), kTiledRows); }

// So that adding one allocates nothing: threads run then, and what is thrown among them ends the process.
int64_t Run::most_pieces() const {
  const auto by_expert = [](const Bank& bank, int64_t experts, int64_t rows) {
    return bank.units() * (experts + rows / most_rows(bank.tiled));
  };
  const int64_t pairs = int64_t(tile_) * capacity_, shared = c_.shared ? by_expert(*c_.shared, 1, tile_) : 0;
  int64_t routed = c_.routed ? by_expert(*c_.routed, std::min<int64_t>(experts_, pairs), pairs) : 0;
  if (joined_)
    routed = std::max(routed, ceil_div(experts_, experts_at_once(*c_.routed)) * ceil_div(tile_, kTiledRows));
  return shared + routed;
}

void Run::add(const Piece& piece) {
  assert(ws_.pieces.size() < ws_.pieces.capacity());
  ws_.pieces.push_back(piece);
}

void Run::add_all(Tokens tile) {
  const int groups = int(ceil_div(experts_, experts_at_once(*c_.routed))), blocks = int(ceil_div(tile.count, kTiledRows));
  for (int g = 0; g < groups; ++g)
    for (int b = 0; b < blocks; ++b) {
      const int expert = int(int64_t(experts_) * g / groups), row = tile.count * b / blocks;
      Piece piece{false, expert, row, tile.count * (b + 1) / blocks - row, 0, c_.routed->units()};
      piece.experts = int(int64_t(experts_) * (g + 1) / groups) - expert, piece.all = true;
      add(piece);
    }
}

void Run::add_pieces(const Bank& bank, bool shared, int expert, int row, int rows) {
  const int64_t unit_bytes = int64_t(bank.unit_panels()) * bank.up_panel_bytes();
  const int64_t few = std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(1, unit_bytes), 1, kUnits);
  const int most = rows > 12 ? most_units(bank.tiled) : int(few), units = bank.units();
  const int unit_groups = int(ceil_div(units, most)), row_groups = int(ceil_div(rows, most_rows(bank.tiled)));
  for (int r = 0; r < row_groups; ++r)
    for (int g = 0; g < unit_groups; ++g) {
      const int first = int(int64_t(rows) * r / row_groups), end = int(int64_t(rows) * (r + 1) / row_groups);
      add({shared, expert, row + first, end - first, int(int64_t(units) * g / unit_groups),
           int(int64_t(units) * (g + 1) / unit_groups)});
    }
}

void Run::add_single(int expert, int row) {
  if (!ws_.pieces.empty() && !ws_.pieces.back().shared && ws_.pieces.back().experts < together_)
    ++ws_.pieces.back().experts;
  else
    add({false, expert, row, 1, 0, c_.routed->units()});
}

// Zeros where a token has no expert. A chunk of tokens is whole blocks of kJoinedRows.
void Run::clear_joined(Tokens tile, int job) {
  const int first = job * kChunk, end = std::min(tile.count, (job + 1) * kChunk), parts = joined_parts();
  std::memset(ws_.hidden.as<char>() + first * joined_row(), 0, (end - first) * joined_row());
  uint8_t* needed = ws_.needed.as<uint8_t>() + first / kJoinedRows * parts;
  std::memset(needed, 0, ceil_div(end - first, kJoinedRows) * parts);
  const int neurons = c_.routed->neurons, depth = TileCut(c_.routed->down_neurons()).depth;
  for (int t = first; t < end; ++t) {
    const int32_t* chosen = ws_.chosen.as<int32_t>() + int64_t(t) * capacity_;
    uint8_t* block = needed + (t - first) / kJoinedRows * parts;
    for (int j = 0; j < ws_.chosen_count.as<int32_t>()[t]; ++j)
      for (int part = chosen[j] * neurons / depth; part <= ((chosen[j] + 1) * neurons - 1) / depth; ++part)
        block[part] = 1;
  }
}

void Run::scatter(Tokens tile, int job) {
  if (joined_) clear_joined(tile, job);
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

}  // namespace moefy
