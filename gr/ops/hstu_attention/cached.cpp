// HSTU attention of new tokens against the cached keys and values of the tokens before them, of one sequence. Forward.
//
// New tokens are either the next ones of the history, each of which sees the cache and the new ones up to itself, or
// candidates, each of which sees the cache and itself. Results are the bits of hstu_attention on the whole sequence.
#include "forward.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

namespace gr::hstu_attention_cached {
namespace {

// Cached rows, of element type C, and after them those of the new tokens.
template <typename S, typename C> struct Keys {
  Rows<C> cached;
  Rows<S> added;
  void load(int64_t first, const Width<S>& width, S* out) const {
    const int64_t old = std::clamp<int64_t>(cached.count - first, 0, kTile);
    const int64_t fresh = std::clamp<int64_t>(cached.count + added.count - first - old, 0, kTile - old);
    if (old + fresh < kTile || width.real < width.ld)
      std::memset(static_cast<void*>(out), 0, kTile * width.ld * sizeof(S));
    for (int64_t r = 0; r < old; ++r)
      std::copy_n(cached.row(first + r), width.real, out + r * width.ld);
    for (int64_t r = 0; r < fresh; ++r)
      std::copy_n(added.row(first + old + r - cached.count), width.real, out + (old + r) * width.ld);
  }
};

// One head of a call.
template <typename S, typename C> struct Head {
  Rows<S> q, k, v;  // of the new tokens
  Keys<S, C> keys, values;
  Width<S> dq, dv;
  bool candidates;
  float scale, alpha;
  Bias bias;
  History mask;
};

// Keys outer, queries inner: a tile of keys is packed once, and the sums of all queries wait in scratch memory.
template <typename S, typename C>
void forward_task(const Head<S, C>& head, Scratch& scratch, S* out, int64_t stride) {
  const Width<S>&d = head.dq, &dv = head.dv;
  const int64_t cached = head.keys.cached.count, keys = cached + head.keys.added.count;
  const int64_t queries = head.q.count, stop = cached + queries, tiles = (queries + kTile - 1) / kTile;
  scratch.reset();
  const TileBuffers<S> buffers(d, dv, scratch);
  S *k_packed = scratch.take<S>(kTile * d.ld), *v_packed = scratch.take<S>(kTile * dv.ld);
  S* q = scratch.take<S>(tiles * kTile * d.ld);
  float* o = scratch.take<float>(tiles * kTile * dv.ld);
  std::vector<KeyTiles> seen;
  int64_t first = keys, end = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    head.q.load(i * kTile, d, q + i * kTile * d.ld);
    seen.push_back(key_tiles(head.mask, cached + i * kTile, std::min(stop, cached + (i + 1) * kTile), i));
    first = std::min(first, seen[i].begin), end = std::max(end, seen[i].end);
    if (seen[i].begin >= seen[i].end) std::fill_n(o + i * kTile * dv.ld, kTile * dv.ld, 0.f);
  }
  for (int64_t j = first; j < end; ++j) {
    buffers.pack_keys(head.keys, head.values, j, k_packed, v_packed);
    for (int64_t i = 0; i < tiles; ++i)
      if (seen[i].begin <= j && j < seen[i].end)
        buffers.attend(Tile<History>(head.mask, cached + i * kTile, stop, j, keys), q + i * kTile * d.ld, k_packed,
                       v_packed, head.alpha, head.bias, j > seen[i].begin, o + i * kTile * dv.ld);
  }
  for (int64_t r = 0; r < queries; ++r) {
    if (head.candidates)
      add_own(d, dv, q + r * d.ld, head.k.row(r), head.v.row(r), head.alpha, head.bias.own(cached + r, head.bias.stride - 1),
              o + r * dv.ld);
    store(o + r * dv.ld, head.scale, dv, out + r * stride);
  }
}

template <typename S> Rows<S> rows_of(const at::Tensor& x, int64_t head) {
  return {x.const_data_ptr<S>() + head * x.stride(1), x.stride(0), x.size(0)};
}

at::Tensor forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cached_k,
                   const at::Tensor& cached_v, const at::Tensor& length, const std::optional<at::Tensor>& position,
                   const std::optional<at::Tensor>& time, const std::optional<at::Tensor>& buckets, double scale,
                   double alpha, bool candidates, int64_t max_attn_len, int64_t contextual_len,
                   int64_t min_full_attn_seq_len) {
  const int64_t cached = std::clamp<int64_t>(*length.const_data_ptr<int64_t>(), 0, cached_k.size(0)), queries = q.size(0), heads = q.size(1), total = cached + queries;
  const History mask{{candidates ? cached : total, contextual_len, max_attn_len > 0 ? max_attn_len : total,
                      min_full_attn_seq_len}};
  Bias bias{nullptr, nullptr, nullptr, 0, cached};
  if (position) bias.position = position->const_data_ptr<float>() + position->numel() / 2;
  if (time) {
    bias.time = time->const_data_ptr<float>();
    bias.buckets = buckets->const_data_ptr<uint8_t>();
    bias.stride = buckets->size(1);
  }
  auto out = at::empty(v.sizes(), v.options());
  if (queries == 0) return out;
  const auto run = [&]<typename S, typename C>() {
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t h = begin; h < end; ++h) {
        const auto own_k = rows_of<S>(k, h), own_v = rows_of<S>(v, h);
        Keys<S, C> keys{rows_of<C>(cached_k, h), own_k}, values{rows_of<C>(cached_v, h), own_v};
        keys.cached.count = values.cached.count = cached;
        if (candidates) keys.added.count = values.added.count = 0;
        const Head<S, C> head{rows_of<S>(q, h),          own_k,      own_v, keys, values, Width<S>(q.size(2)),
                              Width<S>(v.size(2)),       candidates, static_cast<float>(scale),
                              static_cast<float>(alpha), bias,       mask};
        forward_task(head, scratch, out.mutable_data_ptr<S>() + h * out.stride(1), out.stride(0));
      }
      at::native::cpublas::brgemm_release();
    });
  };
  const auto by_cache = [&]<typename S>() {
    AT_DISPATCH_SWITCH(cached_k.scalar_type(), "hstu_attention_cached",
                       AT_DISPATCH_CASE(at::kFloat, [&] { run.template operator()<S, float>(); })
                           AT_DISPATCH_CASE(at::kBFloat16, [&] { run.template operator()<S, at::BFloat16>(); }));
  };
  AT_DISPATCH_SWITCH(q.scalar_type(), "hstu_attention_cached",
                     AT_DISPATCH_CASE(at::kFloat, [&] { by_cache.template operator()<float>(); })
                         AT_DISPATCH_CASE(at::kBFloat16, [&] { by_cache.template operator()<at::BFloat16>(); }));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "hstu_attention_cached(Tensor q, Tensor k, Tensor v, Tensor cached_k, Tensor cached_v, Tensor length, "
      "Tensor? position_bias, Tensor? time_bias, Tensor? buckets, float scale, float alpha, bool candidates, int max_attn_len, "
      "int contextual_len, int min_full_attn_seq_len) -> Tensor");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("hstu_attention_cached", &forward);
}

}  // namespace gr::hstu_attention_cached
