// Softmax attention on CPU, in float32: O_i = sum over the keys j that i sees of softmax_j(alpha q_i . k_j) v_j, with
// dropout of the weights.
//
// One task per sequence and head of keys, longest first; the heads of queries that share the keys follow one another in
// it, so results do not depend on the number of threads. Of a tile of queries the scores with all keys are held at once.
// The backward pass makes the weights again, from the logarithm of each query's sum.
#include "../dropout.h"
#include "../hstu_attention/sequences.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

namespace gr::softmax_attention {
namespace {

struct Call {
  const at::Tensor &q, &k, &v;
  Sequences sequences;
  float alpha;
  bool drops;
  DropoutMask dropout;
  int64_t groups() const { return k.size(1); }
  int64_t shared_by() const { return q.size(1) / k.size(1); }
  float base2() const { return alpha * kLog2E; }  // scores times this are exponents of two
  // The row of the dropout mask that the weights of a query have.
  uint32_t key(int64_t token, int64_t head) const { return dropout.key(token * q.size(1) + head); }
};

// One task: what its sequence and head of keys have in common.
template <typename M> struct Task {
  const Call& call;
  int64_t group, first, count, tiles;
  M mask;
  Width<float> d, dv;
  Task(const Call& of, int64_t sequence, int64_t head)
      : call(of), group(head), first(of.sequences.first(sequence)), count(of.sequences.length(sequence)),
        tiles((count + kTile - 1) / kTile), mask(of.sequences.mask<M>(sequence)), d(of.q.size(2)), dv(of.v.size(2)) {}
  Rows<float> rows(const at::Tensor& x, int64_t head) const { return rows_of<float>(x, first, count, head); }
  Rows<float> keys() const { return rows(call.k, group); }
  Rows<float> values() const { return rows(call.v, group); }
  // Of query tile i, the tiles of keys that some query of it sees.
  std::vector<Tile<M>> seen_tiles(int64_t i) const {
    std::vector<Tile<M>> seen;
    const KeyTiles keys = key_tiles(mask, i, count);
    for (int64_t j = keys.start(); j < keys.stop(); j = keys.next(j)) seen.emplace_back(mask, i, j, count);
    return seen;
  }
};

constexpr int64_t kScores = kTile * kTile;  // of a tile

// A tile on the causal diagonal is computed in halves: none of its first kHalf rows sees one of its later columns. What is
// not computed there is hidden before it is read.
constexpr int64_t kHalf = kTile / 2;
template <typename M> bool halved(const Tile<M>& tile) { return M::kCausal && tile.row == tile.col && tile.m > kHalf; }

// s [m, n] <- a [m, k] b [k, n].
template <typename M> void products(const Tile<M>& tile, int64_t k, const float* a, const float* b, float* s, int64_t lda) {
  const int64_t from = halved(tile) ? kHalf : 0;
  if (from) multiply<float>(from, from, k, a, lda, b, kTile, s, kTile, false);
  multiply<float>(tile.m - from, tile.n, k, a + from * lda, lda, b, kTile, s + from * kTile, kTile, false);
}

// c [m, width] (+)= s [m, n] b [n, width].
template <typename M>
void sums_of_rows(const Tile<M>& tile, const float* s, const float* b, const Width<float>& width, float* c, bool add) {
  const int64_t from = halved(tile) ? kHalf : 0;
  if (from) multiply<float>(from, width.used, from, s, kTile, b, width.ld, c, width.ld, add);
  multiply<float>(tile.m - from, width.used, tile.n, s + from * kTile, kTile, b, width.ld, c + from * width.ld, width.ld, add);
}

// c [width, n] += a [width, m] s [m, n].
template <typename M>
void sums_of_columns(const Tile<M>& tile, const float* a, const float* s, const Width<float>& width, float* c) {
  const int64_t from = halved(tile) ? kHalf : 0;
  if (from) multiply<float>(width.used, from, tile.m, a, kTile, s, kTile, c, kTile, true);
  multiply<float>(width.used, tile.n - from, tile.m - from, a + from, kTile, s + from * kTile + from, kTile, c + from, kTile,
                  true);
}

// The loops over a row are functions of plain values: the compiler then vectorises them.
inline void largest_of(const float* __restrict row, int64_t columns, float* __restrict lanes) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = row[c + lane] > lanes[lane] ? row[c + lane] : lanes[lane];
}
inline void powers_of_two(float by, float minus, int64_t columns, float* __restrict row) {
  for (int64_t c = 0; c < columns; ++c) row[c] = power_of_two(row[c] * by - minus);
}
inline float sum_of(const float* __restrict row, int64_t columns) {
  float sum = 0.f;
  for (int64_t c = 0; c < columns; ++c) sum += row[c];
  return sum;
}
inline float dot(const float* __restrict a, const float* __restrict b, int64_t columns) {
  float sum = 0.f;
  for (int64_t c = 0; c < columns; ++c) sum += a[c] * b[c];
  return sum;
}
inline void store(const float* __restrict o, float by, int64_t columns, float* __restrict out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = o[c] * by;
}
inline void drop(const DropoutMask mask, uint32_t key, int64_t first, int64_t columns, float* __restrict row) {
  for (int64_t c = 0; c < columns; ++c) row[c] = mask.kept(key, first + c) ? row[c] * mask.scale : 0.f;
}
// g <- the gradient of the scores, of the weights p and their gradient g; with dropout p <- the weights that were kept.
inline void score_gradient(float dot, int64_t begin, int64_t end, const float* __restrict p, float* __restrict g) {
  for (int64_t c = begin; c < end; ++c) g[c] = p[c] * (g[c] - dot);
}
inline void score_gradient(const DropoutMask mask, uint32_t key, int64_t first, float dot, int64_t begin, int64_t end,
                           float* __restrict p, float* __restrict g) {
  for (int64_t c = begin; c < end; ++c) {
    const float by = mask.kept(key, first + c) ? mask.scale : 0.f;
    g[c] = p[c] * (g[c] * by - dot);
    p[c] *= by;
  }
}

// Row r of the tiles, whose scores lie in s one tile after another: s <- 2^(s base2 - largest), zero where hidden.
// Returns the sum and the logarithm to the base 2 of the sum of 2^(s base2).
template <typename M>
std::pair<float, float> exponentials(const std::vector<Tile<M>>& tiles, int64_t r, float base2, float* s) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
  for (size_t t = 0; t < tiles.size(); ++t) {
    float* row = s + t * kScores + r * kTile;
    hide(tiles[t].seen(r), tiles[t].n, row, -std::numeric_limits<float>::infinity());
    largest_of(row, tiles[t].n, lanes);
  }
  const float largest = *std::max_element(lanes, lanes + kLanes) * base2;
  float sum = 0.f;
  for (size_t t = 0; t < tiles.size(); ++t) {
    float* row = s + t * kScores + r * kTile;
    powers_of_two(base2, largest, tiles[t].n, row);
    hide(tiles[t].seen(r), tiles[t].n, row);
    sum += sum_of(row, tiles[t].n);
  }
  return {sum, largest + std::log2(sum)};
}

template <typename M> void forward_task(const Task<M>& task, Scratch& scratch, at::Tensor& out, at::Tensor& logs) {
  const Width<float>&d = task.d, &dv = task.dv;
  const Call& call = task.call;
  scratch.reset();
  float *rows = scratch.take<float>(kTile * std::max(d.ld, dv.ld)), *k_packed = scratch.take<float>(task.tiles * kTile * d.ld);
  float *v_packed = scratch.take<float>(task.tiles * kTile * dv.ld), *q = scratch.take<float>(kTile * d.ld);
  float *s = scratch.take<float>(task.tiles * kScores), *o = scratch.take<float>(kTile * dv.ld);
  for (int64_t j = 0; j < task.tiles; ++j) {
    task.keys().load(j * kTile, d, rows);
    pack_transposed(rows, d, k_packed + j * kTile * d.ld);
    task.values().load(j * kTile, dv, v_packed + j * kTile * dv.ld);
  }
  for (int64_t h = task.group * call.shared_by(); h < (task.group + 1) * call.shared_by(); ++h)
    for (int64_t i = 0; i < task.tiles; ++i) {
      const std::vector<Tile<M>> tiles = task.seen_tiles(i);
      task.rows(call.q, h).load(i * kTile, d, q);
      for (size_t t = 0; t < tiles.size(); ++t)
        products(tiles[t], d.used, q, k_packed + tiles[t].col * d.ld, s + t * kScores, d.ld);
      float sums[kTile];
      for (int64_t r = 0; r < tiles[0].rows; ++r) {
        const int64_t token = task.first + i * kTile + r;
        float* log = logs.mutable_data_ptr<float>() + token * logs.stride(0) + h;
        std::tie(sums[r], *log) = exponentials(tiles, r, call.base2(), s);
        for (size_t t = 0; call.drops && t < tiles.size(); ++t)
          drop(call.dropout, call.key(token, h), tiles[t].col, tiles[t].n, s + t * kScores + r * kTile);
      }
      for (size_t t = 0; t < tiles.size(); ++t)
        sums_of_rows(tiles[t], s + t * kScores, v_packed + tiles[t].col * dv.ld, dv, o, t > 0);
      float* to = row_in<float>(out, task.first + i * kTile, h);
      for (int64_t r = 0; r < tiles[0].rows; ++r) store(o + r * dv.ld, 1.f / sums[r], dv.real, to + r * out.stride(0));
    }
}

// Of one tile of scores s and products dp of the gradient with the values: s <- the weights after dropout, dp <- the
// gradient of the scores without alpha. logs, dots: of each row, from the forward pass and of the output with its gradient.
template <typename M>
void weights_gradient(const Call& call, const Tile<M> tile, const float* logs, const float* dots, const uint32_t* keys,
                      float* s, float* dp) {
  const float base2 = call.base2();
  for (int64_t r = 0; r < tile.m; ++r) {
    float *p = s + r * kTile, *g = dp + r * kTile;
    const Seen seen = r < tile.rows ? tile.seen(r) : Seen{0, 0, -1};
    const int64_t from = seen.from(), to = seen.to(tile.n);
    powers_of_two(base2, logs[r], to - from, p + from);
    if (call.drops)
      score_gradient(call.dropout, keys[r], tile.col, dots[r], from, to, p, g);
    else
      score_gradient(dots[r], from, to, p, g);
    hide(seen, tile.n, p);
    hide(seen, tile.n, g);
  }
}

// What a backward task holds: *_packed are right operands, *_t are transposed; of all key tiles, or of one tile.
struct BackwardBuffers {
  float *rows, *k_packed, *k_packed_t, *v_packed_t, *dk_t, *dv_t, *q, *q_t, *g, *g_t, *o, *s, *dp, *dq;
  template <typename M> BackwardBuffers(const Task<M>& task, Scratch& scratch) {
    const Width<float>&d = task.d, &dv = task.dv;
    const int64_t all = task.tiles * kTile;
    scratch.reset();
    rows = scratch.take<float>(kTile * std::max(d.ld, dv.ld));
    k_packed = scratch.take<float>(all * d.ld), k_packed_t = scratch.take<float>(all * d.ld);
    v_packed_t = scratch.take<float>(all * dv.ld);
    dk_t = scratch.take<float>(all * d.ld), dv_t = scratch.take<float>(all * dv.ld);
    q = scratch.take<float>(kTile * d.ld), q_t = scratch.take<float>(kTile * d.ld);
    g = scratch.take<float>(kTile * dv.ld), g_t = scratch.take<float>(kTile * dv.ld);
    o = scratch.take<float>(kTile * dv.ld), s = scratch.take<float>(kScores), dp = scratch.take<float>(kScores);
    dq = scratch.take<float>(kTile * d.ld);
    for (int64_t j = 0; j < task.tiles; ++j) {
      task.keys().load(j * kTile, d, k_packed + j * kTile * d.ld);
      pack_transposed(k_packed + j * kTile * d.ld, d, k_packed_t + j * kTile * d.ld);
      task.values().load(j * kTile, dv, rows);
      pack_transposed(rows, dv, v_packed_t + j * kTile * dv.ld);
    }
    std::fill(dk_t, dk_t + all * d.ld, 0.f);
    std::fill(dv_t, dv_t + all * dv.ld, 0.f);
  }
};

struct Gradients {
  at::Tensor q, k, v;
};

// One head of queries: dQ of its tiles, and its part of dK^T and dV^T.
template <typename M>
void backward_head(const Task<M>& task, int64_t h, const at::Tensor& grad, const at::Tensor& out, const at::Tensor& logs,
                   const BackwardBuffers& b, Gradients& to) {
  const Width<float>&d = task.d, &dv = task.dv;
  const Call& call = task.call;
  for (int64_t i = 0; i < task.tiles; ++i) {
    task.rows(call.q, h).load(i * kTile, d, b.q);
    task.rows(grad, h).load(i * kTile, dv, b.g);
    task.rows(out, h).load(i * kTile, dv, b.o);
    transpose(b.q, kTile, d.ld, d.ld, b.q_t, kTile);
    transpose(b.g, kTile, dv.ld, dv.ld, b.g_t, kTile);
    const std::vector<Tile<M>> tiles = task.seen_tiles(i);
    const int64_t rows = tiles[0].rows;
    float row_logs[kTile], dots[kTile];
    uint32_t keys[kTile];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = task.first + i * kTile + r;
      row_logs[r] = logs.const_data_ptr<float>()[token * logs.stride(0) + h];
      keys[r] = call.key(token, h);
      dots[r] = dot(b.g + r * dv.ld, b.o + r * dv.ld, dv.ld);
    }
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Tile<M>& tile = tiles[t];
      const int64_t k_at = tile.col * d.ld, v_at = tile.col * dv.ld;
      products(tile, d.used, b.q, b.k_packed_t + k_at, b.s, d.ld);
      products(tile, dv.used, b.g, b.v_packed_t + v_at, b.dp, dv.ld);
      weights_gradient(call, tile, row_logs, dots, keys, b.s, b.dp);
      sums_of_columns(tile, b.g_t, b.s, dv, b.dv_t + v_at);
      sums_of_columns(tile, b.q_t, b.dp, d, b.dk_t + k_at);
      sums_of_rows(tile, b.dp, b.k_packed + k_at, d, b.dq, t > 0);
    }
    scale(b.dq, kTile * d.ld, call.alpha);
    float* dq = row_in<float>(to.q, task.first + i * kTile, h);
    for (int64_t r = 0; r < rows; ++r) cast(b.dq + r * d.ld, dq + r * to.q.stride(0), d.real);
  }
}

template <typename M>
void backward_task(const Task<M>& task, Scratch& scratch, const at::Tensor& grad, const at::Tensor& out,
                   const at::Tensor& logs, Gradients& to) {
  const BackwardBuffers b(task, scratch);
  const int64_t shared_by = task.call.shared_by();
  for (int64_t h = task.group * shared_by; h < (task.group + 1) * shared_by; ++h)
    backward_head(task, h, grad, out, logs, b, to);
  scale(b.dk_t, task.tiles * kTile * task.d.ld, task.call.alpha);
  for (int64_t j = 0; j < task.tiles; ++j) {
    const int64_t rows = std::min(kTile, task.count - j * kTile), token = task.first + j * kTile;
    store_transposed(b.dk_t + j * kTile * task.d.ld, rows, task.d, b.rows, row_in<float>(to.k, token, task.group),
                     to.k.stride(0));
    store_transposed(b.dv_t + j * kTile * task.dv.ld, rows, task.dv, b.rows, row_in<float>(to.v, token, task.group),
                     to.v.stride(0));
  }
}

// Calls f.operator()<mask>(task, scratch) for each task.
template <typename F> void for_each(const Call& call, F f) {
  for_each_task(call.sequences, call.groups(), [&](int64_t b, int64_t g, Scratch& scratch) {
    call.sequences.masked() ? f(Task<Masked>(call, b, g), scratch) : f(Task<Causal>(call, b, g), scratch);
  });
}

using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& offsets, double alpha, const Optional& num_targets,
                                           int64_t max_attn_len, int64_t contextual_len, int64_t min_full_attn_seq_len,
                                           double dropout, int64_t seed) {
  const Call call{q, k, v, {offsets, num_targets, max_attn_len, contextual_len, min_full_attn_seq_len},
                  static_cast<float>(alpha), dropout > 0, DropoutMask(dropout, seed)};
  auto out = at::empty({q.size(0), q.size(1), v.size(2)}, v.options()), logs = at::empty({q.size(0), q.size(1)}, v.options());
  for_each(call, [&](const auto& task, Scratch& scratch) { forward_task(task, scratch, out, logs); });
  return {out, logs};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& out, const at::Tensor& logs, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& offsets, double alpha, const Optional& num_targets, int64_t max_attn_len,
    int64_t contextual_len, int64_t min_full_attn_seq_len, double dropout, int64_t seed) {
  const Call call{q, k, v, {offsets, num_targets, max_attn_len, contextual_len, min_full_attn_seq_len},
                  static_cast<float>(alpha), dropout > 0, DropoutMask(dropout, seed)};
  Gradients to{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()), at::empty(v.sizes(), v.options())};
  for_each(call, [&](const auto& task, Scratch& scratch) { backward_task(task, scratch, grad, out, logs, to); });
  return {to.q, to.k, to.v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "softmax_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, float alpha, Tensor? num_targets, int max_attn_len, "
      "int contextual_len, int min_full_attn_seq_len, float dropout, int seed) -> (Tensor, Tensor)");
  m.def(
      "softmax_attention_backward(Tensor grad, Tensor out, Tensor logs, Tensor q, Tensor k, Tensor v, Tensor offsets, "
      "float alpha, Tensor? num_targets, int max_attn_len, int contextual_len, int min_full_attn_seq_len, float dropout, "
      "int seed) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("softmax_attention", &forward);
  m.impl("softmax_attention_backward", &backward);
}

}  // namespace gr::softmax_attention
