// HSTU attention on CPU: O_i = sum over the keys j that i sees (all j <= i without a mask) of
// silu(alpha q_i . k_j + position[j - i] + time[bucket(i, j)]) / divisor_i v_j.
//
// One task per (sequence, head), longest first. A task owns its rows of every output and its private sums for the two
// bias tables, which are added up in task order afterwards: results do not depend on the number of threads.
// Tiles that are hidden entirely are skipped, and only the inputs are kept for the backward pass.
#include "forward.h"
#include "sequences.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

namespace gr::hstu_attention {
namespace {

// The rows of one (sequence, head) in q, k, v and in the output or its gradient.
template <typename S, typename M> struct Head {
  Rows<S> q, k, v, g;  // g: gradient of the output, backward only
  Width<S> dq, dv;     // widths of q and k, and of v
  const float* scale;  // 1 / divisor: one for each row if scale_step is 1, one for all if 0
  int64_t scale_step, count, tiles;
  float alpha;
  Bias bias;
  M mask;
  void row_scales(const Tile<M>& tile, float* out) const {
    for (int64_t r = 0; r < kTile; ++r) out[r] = r < tile.rows ? scale[(tile.row + r) * scale_step] : 0.f;
  }
};

template <typename S, typename M>
void forward_task(const Head<S, M>& head, Scratch& scratch, S* out, int64_t stride) {
  using Mask = std::conditional_t<M::kCausal, M, History>;
  const Width<S>&d = head.dq, &dv = head.dv;
  const Mask mask = keys_of_history(head.mask);
  const int64_t keys = history_of(head.mask, head.count), key_count = (keys + kTile - 1) / kTile;
  scratch.reset();
  const TileBuffers<S> buffers(d, dv, scratch);
  S* k_packed = scratch.take<S>(key_count * kTile * d.ld);
  S* v_packed = scratch.take<S>(key_count * kTile * dv.ld);
  S* q = scratch.take<S>(kTile * d.ld);
  float* o = scratch.take<float>(kTile * dv.ld);
  for (int64_t j = 0; j < key_count; ++j)
    buffers.pack_keys(head.k, head.v, j, k_packed + j * kTile * d.ld, v_packed + j * kTile * dv.ld);
  for (int64_t i = 0; i < head.tiles; ++i) {
    const int64_t row = i * kTile, stop = std::min(head.count, row + kTile);
    const KeyTiles tiles = key_tiles(mask, row, stop, i);
    head.q.load(row, d, q);
    if (tiles.begin >= tiles.end) std::fill(o, o + kTile * dv.ld, 0.f);
    for (int64_t j = tiles.begin; j < tiles.end; ++j)
      buffers.attend(Tile<Mask>(mask, row, stop, j, keys), q, k_packed + j * kTile * d.ld, v_packed + j * kTile * dv.ld,
                     head.alpha, head.bias, j > tiles.begin, o);
    for (int64_t r = 0; r < stop - row; ++r) {
      const int64_t token = row + r;
      if (token >= keys)
        add_own(d, dv, q + r * d.ld, head.k.row(token), head.v.row(token), head.alpha, head.bias.own(token, token),
                o + r * dv.ld);
      store(o + r * dv.ld, head.scale[token * head.scale_step], dv, out + token * stride);
    }
  }
}

// The places where one task writes its gradients.
template <typename S> struct Gradients {
  S *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  BiasGradient bias;
};

// Buffers of one backward task. *_packed are right operands, *_t are transposed left operands, of one tile each or of
// all tiles one after another; dk_t and dv_t are the transposed gradients [width, kTile] of every key tile.
template <typename S> struct BackwardBuffers {
  S *rows, *k_packed, *k_packed_t, *v_packed_t, *q, *q_t, *g, *g_t, *p_right, *ds_left, *ds_right;
  float *s, *dp, *dq, *dk_t, *dv_t, *scale, *turned;
  template <typename M> BackwardBuffers(const Head<S, M>& head, Scratch& scratch) {
    const int64_t d = head.dq.ld, dv = head.dv.ld, wide = std::max(d, dv), all = head.tiles * kTile;
    scratch.reset();
    rows = scratch.take<S>(kTile * wide);
    k_packed = scratch.take<S>(all * d), k_packed_t = scratch.take<S>(all * d), v_packed_t = scratch.take<S>(all * dv);
    q = scratch.take<S>(kTile * d), q_t = scratch.take<S>(kTile * d);
    g = scratch.take<S>(kTile * dv), g_t = scratch.take<S>(kTile * dv);
    p_right = scratch.take<S>(kTile * kTile), ds_left = scratch.take<S>(kTile * kTile);
    ds_right = scratch.take<S>(kTile * kTile);
    s = scratch.take<float>(kTile * kTile), dp = scratch.take<float>(kTile * kTile);
    dq = scratch.take<float>(kTile * d), dk_t = scratch.take<float>(all * d), dv_t = scratch.take<float>(all * dv);
    scale = scratch.take<float>(kTile), turned = scratch.take<float>(kTile * wide);
    for (int64_t j = 0; j < head.tiles; ++j) {
      head.k.load(j * kTile, head.dq, rows);
      pack_transposed(rows, head.dq, k_packed_t + j * kTile * d);
      pack(rows, kTile, d, d, k_packed + j * kTile * d);
      head.v.load(j * kTile, head.dv, rows);
      pack_transposed(rows, head.dv, v_packed_t + j * kTile * dv);
    }
    if (!M::kCausal) {
      std::fill(dk_t, dk_t + all * d, 0.f);
      std::fill(dv_t, dv_t + all * dv, 0.f);
    }
  }
};

// Queries outer, keys inner: S = Q K^T, dP = G V^T, then dV^T += G^T P, dK^T += Q^T dS, dQ += dS K. Five products a
// tile, and no computed tile is ever transposed: P and dS are right operands of the transposed sums.
template <typename S, typename M>
void backward_task(const Head<S, M>& head, Scratch& scratch, const Gradients<S>& out) {
  const Width<S>&d = head.dq, &dv = head.dv;
  const BackwardBuffers<S> b(head, scratch);
  for (int64_t i = 0; i < head.tiles; ++i) {
    const Tile<M> last(head.mask, i, i, head.count);
    const KeyTiles keys = key_tiles(head.mask, i, head.count);
    head.q.load(i * kTile, d, b.q);
    head.g.load(i * kTile, dv, b.g);
    transpose(b.q, kTile, d.used, d.ld, b.q_t, kTile);
    transpose(b.g, kTile, dv.used, dv.ld, b.g_t, kTile);
    head.row_scales(last, b.scale);
    for (int64_t j = keys.start(); j < keys.stop(); j = keys.next(j)) {
      const Tile<M> tile(head.mask, i, j, head.count);
      const bool add = !M::kCausal || j < i;  // the causal order meets a key tile first on the diagonal
      const int64_t k_at = j * kTile * d.ld, v_at = j * kTile * dv.ld;
      multiply<S>(tile.m, tile.n, d.used, b.q, d.ld, b.k_packed_t + k_at, kTile, b.s, kTile, false);
      multiply<S>(tile.m, tile.n, dv.used, b.g, dv.ld, b.v_packed_t + v_at, kTile, b.dp, kTile, false);
      if (head.alpha != 1.f) scale_scores(tile, head.alpha, b.s);
      add_bias(tile, head.bias, b.s);
      activate_gradient(tile, b.scale, b.s, b.dp);
      add_bias_gradient(tile, head.bias, b.dp, out.bias);
      const S *p = right(tile, b.s, b.p_right), *ds = right(tile, b.dp, b.ds_right);
      const S* ds_rows = left(tile, b.dp, b.ds_left);
      multiply<S>(dv.used, tile.n, tile.m, b.g_t, kTile, p, kTile, b.dv_t + v_at, kTile, add);
      multiply<S>(d.used, tile.n, tile.m, b.q_t, kTile, ds, kTile, b.dk_t + k_at, kTile, add);
      multiply<S>(tile.m, d.used, tile.n, ds_rows, kTile, b.k_packed + k_at, d.ld, b.dq, d.ld,
                  j > keys.start());
    }
    if (head.alpha != 1.f) scale(b.dq, kTile * d.ld, head.alpha);
    for (int64_t r = 0; r < last.rows; ++r)
      cast(b.dq + r * d.ld, out.q + (i * kTile + r) * out.q_stride, d.real);
  }
  if (head.alpha != 1.f) scale(b.dk_t, head.tiles * kTile * d.ld, head.alpha);
  for (int64_t j = 0; j < head.tiles; ++j) {
    const int64_t rows = std::min(kTile, head.count - j * kTile);
    store_transposed(b.dk_t + j * kTile * d.ld, rows, d, b.turned, out.k + j * kTile * out.k_stride, out.k_stride);
    store_transposed(b.dv_t + j * kTile * dv.ld, rows, dv, b.turned, out.v + j * kTile * out.v_stride, out.v_stride);
  }
}

// The arguments shared by both directions. The Python caller checks shapes, offsets, dtypes and the unit stride of the
// last dimension.
struct Arguments {
  const at::Tensor &q, &k, &v, &scale;
  const std::optional<at::Tensor>&position, &time, &buckets, &pair_offsets;
  float alpha;
  Sequences sequences;
  // A sequence uses the past side of the position table; with a contextual prefix it uses the future side too.
  int64_t sides() const { return sequences.contextual_len > 0 ? 2 : 1; }
  int64_t heads() const { return q.size(1); }
};

template <typename S, typename M>
Head<S, M> head_of(const Arguments& a, int64_t sequence, int64_t head, const at::Tensor* g) {
  const int64_t first = a.sequences.first(sequence), count = a.sequences.length(sequence);
  const int64_t scale_step = a.scale.numel() == 1 ? 0 : 1;
  Bias bias{nullptr, nullptr, nullptr};
  if (a.position) bias.position = a.position->const_data_ptr<float>() + a.position->numel() / 2;
  if (a.time) {
    bias.time = a.time->const_data_ptr<float>();
    bias.buckets = a.buckets->const_data_ptr<uint8_t>() + a.pair_offsets->const_data_ptr<int64_t>()[sequence];
  }
  return {rows_of<S>(a.q, first, count, head),
          rows_of<S>(a.k, first, count, head),
          rows_of<S>(a.v, first, count, head),
          g ? rows_of<S>(*g, first, count, head) : Rows<S>{nullptr, 0, 0},
          Width<S>(a.q.size(2)),
          Width<S>(a.v.size(2)),
          a.scale.const_data_ptr<float>() + first * scale_step,
          scale_step,
          count,
          (count + kTile - 1) / kTile,
          a.alpha,
          bias,
          a.sequences.mask<M>(sequence)};
}

// Calls f<element type, mask>().
template <typename F> void by_type(const Arguments& a, F f) {
  AT_DISPATCH_SWITCH(
      a.q.scalar_type(), "hstu_attention",
      AT_DISPATCH_CASE(at::kFloat, [&] { a.sequences.masked() ? f.template operator()<float, Masked>()
                                                              : f.template operator()<float, Causal>(); })
          AT_DISPATCH_CASE(at::kBFloat16, [&] { a.sequences.masked() ? f.template operator()<at::BFloat16, Masked>()
                                                                     : f.template operator()<at::BFloat16, Causal>(); }));
}

using Optional = std::optional<at::Tensor>;

at::Tensor forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
                   const at::Tensor& scale, const Optional& position, const Optional& time, const Optional& buckets,
                   const Optional& pair_offsets, double alpha, const Optional& num_targets, int64_t max_attn_len,
    int64_t contextual_len, int64_t min_full_attn_seq_len) {
  const Arguments a{q, k, v, scale, position, time, buckets, pair_offsets, static_cast<float>(alpha),
                    {offsets, num_targets, max_attn_len, contextual_len, min_full_attn_seq_len}};
  auto out = at::empty(v.sizes(), v.options());
  by_type(a, [&]<typename S, typename M>() {
    for_each_task(a.sequences, a.heads(), [&](int64_t b, int64_t h, Scratch& scratch) {
      const int64_t first = a.sequences.first(b);
      forward_task(head_of<S, M>(a, b, h, nullptr), scratch, row_in<S>(out, first, h), out.stride(0));
    });
  });
  return out;
}

// Adds up the tasks' private sums, sequence by sequence and head by head, in double.
void sum_bias_gradients(const Arguments& a, const at::Tensor& position_sums, const at::Tensor& time_sums,
                        at::Tensor& dposition, at::Tensor& dtime) {
  const int64_t heads = a.heads(), size = dtime.numel();
  const float *position = position_sums.const_data_ptr<float>(), *time = time_sums.const_data_ptr<float>();
  double *position_out = dposition.mutable_data_ptr<double>(), *time_out = dtime.mutable_data_ptr<double>();
  for (int64_t b = 0; b < a.sequences.count(); ++b) {
    const int64_t first = a.sequences.first(b), count = a.sequences.length(b), entries = a.sides() * count;
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = position + first * heads * a.sides() + h * entries;
      double* to = position_out + dposition.numel() / 2 + 1 - count;
      for (int64_t i = 0; a.position && i < std::min(entries, 2 * count - 1); ++i) to[i] += from[i];
      for (int64_t i = 0; a.time && i < size; ++i) time_out[i] += time[(b * heads + h) * size + i];
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& g, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& offsets,
    const at::Tensor& scale, const Optional& position, const Optional& time, const Optional& buckets,
    const Optional& pair_offsets, double alpha, const Optional& num_targets, int64_t max_attn_len,
    int64_t contextual_len, int64_t min_full_attn_seq_len) {
  const Arguments a{q, k, v, scale, position, time, buckets, pair_offsets, static_cast<float>(alpha),
                    {offsets, num_targets, max_attn_len, contextual_len, min_full_attn_seq_len}};
  const int64_t heads = a.heads(), time_size = time ? time->numel() : 0;
  auto dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options());
  auto dv = at::empty(v.sizes(), v.options());
  auto position_sums = at::zeros({position ? q.size(0) * heads * a.sides() : 0}, scale.options());
  auto time_sums = at::zeros({a.sequences.count() * heads, time_size}, scale.options());
  by_type(a, [&]<typename S, typename M>() {
    for_each_task(a.sequences, a.heads(), [&](int64_t b, int64_t h, Scratch& scratch) {
      const auto head = head_of<S, M>(a, b, h, &g);
      const int64_t first = a.sequences.first(b);
      std::vector<float> lanes(kLanes * time_size);
      BiasGradient sums{nullptr, time ? lanes.data() : nullptr, time_size};
      if (position)
        sums.position = position_sums.mutable_data_ptr<float>() + (first * heads + h * head.count) * a.sides() +
                        head.count - 1;
      backward_task<S, M>(head, scratch, {row_in<S>(dq, first, h), row_in<S>(dk, first, h), row_in<S>(dv, first, h),
                                       dq.stride(0), dk.stride(0), dv.stride(0), sums});
      float* total = time_sums.mutable_data_ptr<float>() + (b * heads + h) * time_size;
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t i = 0; i < time_size; ++i) total[i] += lanes[lane * time_size + i];
    });
  });
  auto dposition = at::zeros({position ? position->numel() : 0}, scale.options().dtype(at::kDouble));
  auto dtime = at::zeros({time_size}, scale.options().dtype(at::kDouble));
  sum_bias_gradients(a, position_sums, time_sums, dposition, dtime);
  return {dq, dk, dv, dposition, dtime};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "hstu_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor scale, Tensor? position_bias, "
      "Tensor? time_bias, Tensor? buckets, Tensor? pair_offsets, float alpha=1.0, Tensor? num_targets=None, "
      "int max_attn_len=0, int contextual_len=0, int min_full_attn_seq_len=0) -> Tensor");
  m.def(
      "hstu_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor scale, "
      "Tensor? position_bias, Tensor? time_bias, Tensor? buckets, Tensor? pair_offsets, float alpha=1.0, "
      "Tensor? num_targets=None, int max_attn_len=0, int contextual_len=0, int min_full_attn_seq_len=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("hstu_attention", &forward);
  m.impl("hstu_attention_backward", &backward);
}

}  // namespace gr::hstu_attention
