// The steps on one tile of scores between the products: scale, bias, activation and mask, forward and backward.
#pragma once

#include "../tile.h"

namespace gr {

// The keys that query i sees: [first(i), end(i)), and itself. place(i): its position in the position bias.
struct Causal {
  static constexpr bool kCausal = true, kOwn = false;
  int64_t place(int64_t i) const { return i; }
};

// The tokens from `history` on are candidates: all stand where the history ends, and none is seen by another token.
// The first `contextual` tokens see the whole history. window: how far back a query looks; the prefix counts as one.
// The last `full` tokens of the history, and all candidates, look all the way back.
struct Masked {
  static constexpr bool kCausal = false, kOwn = true;
  int64_t history, contextual, window, full;
  int64_t place(int64_t i) const { return std::min(i, history); }
  int64_t first(int64_t i) const {
    const int64_t at = place(i);
    const bool all = at - window < contextual || (full > 0 && at >= history - full);
    return all ? 0 : at - window;
  }
  int64_t end(int64_t i) const { return i < contextual ? history : std::min(i + 1, history); }
};

// Masked, where the keys are those of the history alone: what a candidate sees of itself is added elsewhere.
struct History : Masked {
  static constexpr bool kOwn = false;
};

// The columns of a tile that a row sees: [begin, end), and `own` if it lies outside of them, else -1.
struct Seen {
  int64_t begin, end, own;
  // The columns to activate, in whole vectors.
  int64_t from() const { return own >= 0 ? 0 : begin / kEdge * kEdge; }
  int64_t to(int64_t columns) const { return own >= 0 ? columns : round_up(end, kEdge); }
};

// Rows [row, row + rows) and columns [col, col + cols) of the scores; m and n are rows and cols rounded up to kEdge.
// Rows are numbered as tokens: of queries against a cache, the first one is the number of cached tokens.
// Passed by value: the compiler then keeps the bounds of the loops in registers (10 % in bfloat16).
template <typename M> struct Tile {
  M mask;
  int64_t row, col, rows, cols, m, n;
  Tile(const M& seen_by, int64_t first, int64_t stop, int64_t j, int64_t keys)
      : mask(seen_by), row(first), col(j * kTile), rows(std::min(kTile, stop - row)), cols(std::min(kTile, keys - col)),
        m(round_up(rows, kEdge)), n(round_up(cols, kEdge)) {}
  Tile(const M& seen_by, int64_t i, int64_t j, int64_t count) : Tile(seen_by, i * kTile, count, j, count) {}
  Seen seen(int64_t r) const {
    const int64_t i = row + r, own = i - col;
    if constexpr (M::kCausal) {
      return {0, std::min(n, own + 1), -1};
    } else {
      const int64_t begin = std::clamp<int64_t>(mask.first(i) - col, 0, n);
      const int64_t end = std::clamp(mask.end(i) - col, begin, n);
      return {begin, end, M::kOwn && i >= mask.history && own >= 0 && own < n ? own : -1};
    }
  }
};

// The key tiles of the query tile `own`: [begin, end), and itself.
struct KeyTiles {
  int64_t begin, end, own;
  int64_t start() const { return begin < end ? begin : own; }
  int64_t next(int64_t j) const { return j + 1 < end ? j + 1 : std::max(j + 1, own); }
  int64_t stop() const { return std::max(end, own + 1); }
};

// The tiles of keys, itself left out, that some token of [row, stop) sees: [begin, end).
template <typename M> KeyTiles key_tiles(const M& mask, int64_t row, int64_t stop, int64_t own) {
  if constexpr (M::kCausal) {
    return {0, (stop + kTile - 1) / kTile, own};
  } else {
    int64_t first = stop, end = 0;
    for (; row < stop; ++row) {
      first = std::min(first, mask.first(row));
      end = std::max(end, mask.end(row));
    }
    return {first / kTile, (end + kTile - 1) / kTile, own};
  }
}
template <typename M> KeyTiles key_tiles(const M& mask, int64_t i, int64_t count) {
  return key_tiles(mask, i * kTile, std::min(count, (i + 1) * kTile), i);
}

// The biases of the scores of one sequence. Token i's row of `buckets` starts at i (i + 1) / 2 and has i + 1 entries;
// or, against a cache, all rows have `stride` entries and that of token `first` comes first.
struct Bias {
  const float* position;  // the entry of distance 0, or null
  const float* time;      // table, or null
  const uint8_t* buckets;
  int64_t stride = 0, first = 0;
  const uint8_t* row(int64_t i) const { return buckets + (stride ? (i - first) * stride : i * (i + 1) / 2); }
  // The bias of candidate i's score with itself, whose bucket is in `column` of its row.
  float own(int64_t i, int64_t column) const {
    return (position ? *position : 0.f) + (time ? time[row(i)[column]] : 0.f);
  }
};

// The private gradient sums of one task. position: the entry of distance 0 of a table of this sequence's length.
// time: kLanes tables of time_size entries, so that neighbouring scores never wait for each other's sum.
struct BiasGradient {
  float* position;
  float* time;
  int64_t time_size;
};

template <typename M> void scale_scores(const Tile<M> tile, float alpha, float* __restrict s) {
  for (int64_t r = 0; r < tile.m; ++r)
    for (int64_t c = 0; c < tile.n; ++c) s[r * kTile + c] *= alpha;
}

template <typename M> void add_bias(const Tile<M> tile, const Bias& bias, float* __restrict s) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row + r;
    const Seen seen = tile.seen(r);
    float* __restrict row = s + r * kTile;
    if (bias.position) {
      const float* __restrict table = bias.position - tile.mask.place(i) + tile.col;
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] += table[c];
      if (seen.own >= 0) row[seen.own] += *bias.position;
    }
    if (bias.time) {
      const uint8_t* __restrict bucket = bias.row(i) + tile.col;
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] += bias.time[bucket[c]];
      if (seen.own >= 0) row[seen.own] += bias.time[bucket[seen.own]];
    }
  }
}

template <typename M>
void add_bias_gradient(const Tile<M> tile, const Bias& bias, const float* __restrict ds, const BiasGradient& grad) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t i = tile.row + r;
    const Seen seen = tile.seen(r);
    const float* __restrict row = ds + r * kTile;
    if (grad.position) {
      float* __restrict sums = grad.position - tile.mask.place(i) + tile.col;
      for (int64_t c = seen.begin; c < seen.end; ++c) sums[c] += row[c];
      if (seen.own >= 0) *grad.position += row[seen.own];
    }
    if (grad.time) {
      const uint8_t* __restrict bucket = bias.row(i) + tile.col;
      int64_t c = seen.begin;
      for (; c + kLanes <= seen.end; c += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          grad.time[lane * grad.time_size + bucket[c + lane]] += row[c + lane];
      for (; c < seen.end; ++c) grad.time[(c % kLanes) * grad.time_size + bucket[c]] += row[c];
      if (seen.own >= 0) grad.time[bucket[seen.own]] += row[seen.own];
    }
  }
}

// The columns that the row does not see become `value`.
inline void hide(const Seen& seen, int64_t columns, float* __restrict row, float value = 0.f) {
  const float own = seen.own >= 0 ? row[seen.own] : 0.f;
  std::fill(row, row + seen.begin, value);
  std::fill(row + seen.end, row + columns, value);
  if (seen.own >= 0) row[seen.own] = own;
}

// s <- silu(s), or zero in hidden columns.
template <typename M> void activate(const Tile<M> tile, float* __restrict s) {
  for (int64_t r = 0; r < tile.m; ++r) {
    const Seen seen = tile.seen(r);
    const int64_t to = seen.to(tile.n);
    float* __restrict row = s + r * kTile;
    for (int64_t c = seen.from(); c < to; ++c) row[c] *= sigmoid(row[c]);
    hide(seen, tile.n, row);
  }
}

// s <- silu(s) scale_i, dp <- d loss / d s, both zero in hidden columns.
template <typename M>
void activate_gradient(const Tile<M> tile, const float* scale, float* __restrict s, float* __restrict dp) {
  for (int64_t r = 0; r < tile.m; ++r) {
    const Seen seen = tile.seen(r);
    const int64_t to = seen.to(tile.n);
    float *__restrict row = s + r * kTile, *__restrict drow = dp + r * kTile;
    const float scale_r = scale[r];
    for (int64_t c = seen.from(); c < to; ++c) {
      const float x = row[c], g = sigmoid(x), y = x * g;
      row[c] = y * scale_r;
      drow[c] *= (g + y * (1.f - g)) * scale_r;
    }
    hide(seen, tile.n, row);
    hide(seen, tile.n, drow);
  }
}

// A float tile as the left or the right operand of a product: itself, or a bfloat16 copy (right: rows interleaved).
template <typename M> const float* left(const Tile<M>, const float* x, float*) { return x; }
template <typename M> const float* right(const Tile<M>, const float* x, float*) { return x; }
template <typename M> const at::BFloat16* left(const Tile<M> tile, const float* x, at::BFloat16* out) {
  for (int64_t r = 0; r < tile.m; ++r) cast(x + r * kTile, out + r * kTile, tile.n);
  return out;
}
template <typename M> const at::BFloat16* right(const Tile<M> tile, const float* x, at::BFloat16* out) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t r = 0; r < tile.m; r += 2)
    for (int64_t c = 0; c < tile.n; ++c)
      pairs[r / 2 * kTile + c] =
          bfloat16_bits(x[r * kTile + c]) | static_cast<uint32_t>(bfloat16_bits(x[(r + 1) * kTile + c])) << 16;
  return out;
}

}  // namespace gr
