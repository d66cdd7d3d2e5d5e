// logits[t, s] = queries[t] . items[index[t, s]] without the gathered [T, S, D] tensor, and its two gradients; and the
// sampled softmax of these logits, which keeps the weights of its gradient instead of the logits, and makes the gradient
// of the queries, but for a factor, in its forward pass.
//
// Rows are read as vectors of kLanes floats; where the width is no multiple of that they are copied once, zero padded,
// so that every loop below has whole vectors. The gradient of an item adds up its pairs in the order of the tokens,
// whoever adds them, so results are the same bits on any number of threads.
#include "../tile.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace gr::sampled_logits {
namespace {

// As wide as this CPU's registers: wider vectors are cut by the compiler, and spill on the way.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kAhead = 8;  // pairs between the prefetch of a row and its use
constexpr int64_t kLineFloats = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

// A matrix [rows, D] as [rows, vectors] of Lanes. Row r starts at data + r * vectors.
struct Padded {
  int64_t vectors;
  at::Tensor storage;
  Lanes* data;
  // Zeros.
  Padded(int64_t rows, int64_t width, const at::TensorOptions& options)
      : vectors((width + kLanes - 1) / kLanes), storage(at::zeros({rows, vectors * kLanes}, options)) {
    data = reinterpret_cast<Lanes*>(storage.mutable_data_ptr<float>());
  }
  // A copy of x, or x itself where its rows are whole vectors; then it is not written to.
  explicit Padded(const at::Tensor& x) : vectors((x.size(1) + kLanes - 1) / kLanes) {
    const int64_t width = x.size(1), padded = vectors * kLanes;
    storage = width == padded ? x : at::empty({x.size(0), padded}, x.options());
    data = reinterpret_cast<Lanes*>(const_cast<float*>(storage.const_data_ptr<float>()));
    if (width == padded) return;
    const float* from = x.const_data_ptr<float>();
    float* to = storage.mutable_data_ptr<float>();
    at::parallel_for(0, x.size(0), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(to + r * padded, from + r * width, width * sizeof(float));
        std::fill(to + r * padded + width, to + (r + 1) * padded, 0.f);
      }
    });
  }
};

// Lane l of the result: the sum of lanes l and l ^ K, of y where bit K of l is set and of x elsewhere.
template <int K, size_t... L> Lanes fold(Lanes x, Lanes y, std::index_sequence<L...>) {
  return __builtin_shufflevector(x, y, (L & K ? kLanes + L : L)...) +
         __builtin_shufflevector(x, y, (L & K ? kLanes + (L ^ K) : L ^ K)...);
}

// Lane l of the result is the sum of all lanes of x[l].
template <int K = kLanes / 2> inline Lanes sum_each(Lanes* x) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int i = 0; i < K; ++i) x[i] = fold<K>(x[i], x[i + K], lanes);
  if constexpr (K > 1) return sum_each<K / 2>(x);
  else return x[0];
}

template <int kVectors> inline void prefetch(const Lanes* row, int64_t vectors) {
  const float* at = reinterpret_cast<const float*>(row);
  for (int64_t f = 0; f < (kVectors ? kVectors : vectors) * kLanes; f += kLineFloats) __builtin_prefetch(at + f);
}

// sum[v] += w * row[v]. All gradients go through it, so that every order of work rounds alike.
template <int kVectors> inline void add(Lanes* sum, float w, const Lanes* row, int64_t vectors) {
  for (int64_t v = 0; v < (kVectors ? kVectors : vectors); ++v) sum[v] += w * row[v];
}

// Calls f with the number of vectors in a row as a compile-time constant where it is small (else 0: read at run time).
template <typename F> void by_vectors(int64_t vectors, F f) {
  switch (vectors) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 4: return f.template operator()<4>();
    case 7: return f.template operator()<7>();  // width 50, the research models', where a vector has 8 floats
    case 8: return f.template operator()<8>();
    default: return f.template operator()<0>();
  }
}

void check_row(const int64_t* index, int64_t samples, int64_t items) {
  int64_t low = 0, high = 0;
  for (int64_t s = 0; s < samples; ++s) low = std::min(low, index[s]), high = std::max(high, index[s]);
  TORCH_CHECK_INDEX(low >= 0 && high < items, "index_TS must lie in [0, ", items, "), the rows of items_KD; found ",
                    low < 0 ? low : high);
}

void check_items(const at::Tensor& items) {
  TORCH_CHECK(items.size(0) < INT32_MAX, "sampled logits take fewer than 2^31 items, not ", items.size(0));
}

// logits[s] = a . table[ids[s]]
template <int kVectors>
void dots(const Lanes* a, const Padded& table, const int32_t* ids, int64_t samples, float* logits) {
  const int64_t vectors = kVectors ? kVectors : table.vectors;
  for (int64_t s = 0; s < samples; s += kLanes) {
    const int64_t have = std::min(kLanes, samples - s);
    Lanes products[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      prefetch<kVectors>(table.data + ids[std::min(s + i + kAhead, samples - 1)] * vectors, vectors);
      const Lanes* b = table.data + ids[s + std::min(i, have - 1)] * vectors;
      Lanes sum = a[0] * b[0];
      for (int64_t v = 1; v < vectors; ++v) sum += a[v] * b[v];
      products[i] = sum;
    }
    const Lanes sums = sum_each(products);
    // A copy of fixed size is one store, a copy of variable size is a call.
    if (have == kLanes) std::memcpy(logits + s, &sums, sizeof(sums));
    else std::memcpy(logits + s, &sums, have * sizeof(float));
  }
}

at::Tensor forward(const at::Tensor& queries, const at::Tensor& items, const at::Tensor& index) {
  check_items(items);
  const int64_t tokens = index.size(0), samples = index.size(1);
  auto out = at::empty({tokens, samples}, queries.options());
  const Padded q(queries), table(items);
  const int64_t* ids = index.const_data_ptr<int64_t>();
  float* logits = out.mutable_data_ptr<float>();
  by_vectors(q.vectors, [&]<int kVectors>() {
    at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> row(samples);
      for (int64_t t = begin; t < end; ++t) {
        check_row(ids + t * samples, samples, items.size(0));
        std::copy(ids + t * samples, ids + (t + 1) * samples, row.begin());
        dots<kVectors>(q.data + t * q.vectors, table, row.data(), samples, logits + t * samples);
      }
    });
  });
  return out;
}

// The (token, sample) pairs. The gradient of a logit is its weight, times the token's rate where there are rates.
struct Pairs {
  int64_t tokens, samples;
  const float *weights, *rates;
  const int32_t* ids;
  float rate(int64_t t) const { return rates ? rates[t] : 1.f; }
};

// d queries[t] = sum_s g[t, s] items[index[t, s]] (kQueries) and sums[index[t, s]] += g[t, s] queries[t] (kItems, which
// one thread alone may do), in one pass over the pairs.
template <int kVectors, bool kQueries, bool kItems>
void one_pass(const Pairs& pairs, const Padded& q, const Padded& table, Padded* sums, int64_t begin, int64_t end,
              float* dqueries, int64_t width) {
  const int64_t vectors = kVectors ? kVectors : q.vectors;
  std::vector<float> wide(kVectors || !kQueries ? 0 : vectors * kLanes);
  for (int64_t t = begin; t < end; ++t) {
    Lanes registers[kVectors ? kVectors : 1];
    Lanes* sum = kVectors ? registers : reinterpret_cast<Lanes*>(wide.data());
    if constexpr (kQueries)
      for (int64_t v = 0; v < vectors; ++v) sum[v] = Lanes{};
    const Lanes* a = q.data + t * vectors;
    const int32_t* row = pairs.ids + t * pairs.samples;
    const float* weights = pairs.weights + t * pairs.samples;
    const float rate = pairs.rate(t);
    for (int64_t s = 0; s < pairs.samples; ++s) {
      const int64_t soon = row[std::min(s + kAhead, pairs.samples - 1)] * vectors;
      const float weight = weights[s] * rate;
      if constexpr (kItems) {
        prefetch<kVectors>(sums->data + soon, vectors);
        add<kVectors>(sums->data + row[s] * vectors, weight, a, vectors);
      }
      if constexpr (kQueries) {
        prefetch<kVectors>(table.data + soon, vectors);
        add<kVectors>(sum, weight, table.data + row[s] * vectors, vectors);
      }
    }
    if constexpr (kQueries) std::memcpy(dqueries + t * width, sum, width * sizeof(float));
  }
}

// The loss of one token from its logits, the target's first; a negative that is the target does not count. The logits
// become the weights, d loss / d product: scale (p - 1) for the target, scale p for a negative.
inline float softmax_row(float* __restrict x, const int32_t* __restrict ids, int64_t samples, float scale) {
  const int32_t target = ids[0];
  float most = x[0] *= scale;
  for (int64_t s = 1; s < samples; ++s) {
    x[s] *= scale;
    const float counted = ids[s] == target ? -std::numeric_limits<float>::max() : x[s];
    most = counted > most ? counted : most;
  }
  const float own = x[0] - most;
  float others = 0.f;
  for (int64_t s = 1; s < samples; ++s) {
    x[s] = ids[s] == target ? 0.f : power_of_two((x[s] - most) * kLog2E);
    others += x[s];
  }
  const float total = others + std::exp(own), rate = scale / total;
  for (int64_t s = 1; s < samples; ++s) x[s] *= rate;
  x[0] = -others * rate;
  return std::log(total) - own;
}

// losses [T], and for the gradient: weights [T, 1 + S], int32 ids [T, 1 + S] with the target's first, and, where asked
// for, slopes [T, D], d losses[t] / d queries[t]: the token's items are still in the cache.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softmax_forward(
    const at::Tensor& queries, const at::Tensor& items, const at::Tensor& positive, const at::Tensor& negative,
    double scale, bool with_slopes) {
  check_items(items);
  const int64_t tokens = negative.size(0), samples = 1 + negative.size(1);
  auto losses = at::empty({tokens}, queries.options()), weights = at::empty({tokens, samples}, queries.options());
  auto index = at::empty({tokens, samples}, positive.options().dtype(at::kInt));
  auto slopes = at::empty({with_slopes ? tokens : 0, queries.size(1)}, queries.options());
  const Padded q(queries), table(items);
  const Pairs pairs{tokens, samples, weights.const_data_ptr<float>(), nullptr, index.const_data_ptr<int32_t>()};
  const int64_t *targets = positive.const_data_ptr<int64_t>(), *drawn = negative.const_data_ptr<int64_t>();
  float *to_losses = losses.mutable_data_ptr<float>(), *to_weights = weights.mutable_data_ptr<float>();
  int32_t* to_index = index.mutable_data_ptr<int32_t>();
  by_vectors(q.vectors, [&]<int kVectors>() {
    at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t* from = drawn + t * (samples - 1);
        check_row(targets + t, 1, items.size(0));
        check_row(from, samples - 1, items.size(0));
        int32_t* ids = to_index + t * samples;
        float* row = to_weights + t * samples;
        ids[0] = static_cast<int32_t>(targets[t]);
        for (int64_t s = 1; s < samples; ++s) ids[s] = static_cast<int32_t>(from[s - 1]);
        dots<kVectors>(q.data + t * q.vectors, table, ids, samples, row);
        to_losses[t] = softmax_row(row, ids, samples, static_cast<float>(scale));
        if (with_slopes)
          one_pass<kVectors, true, false>(pairs, q, table, nullptr, t, t + 1, slopes.mutable_data_ptr<float>(),
                                          queries.size(1));
      }
    });
  });
  return {losses, weights, index, slopes};
}

// The pairs of a block of items, in the order of the tokens.
struct Pair {
  int32_t token, row;  // row counts from the block's first
  float weight;
};

// d items[k] = sum over the pairs of k of g queries[t]: the pairs are sorted by blocks of items, and a block, whose
// sums stay in the cache, has one owner.
template <int kVectors>
void by_blocks(const Pairs& pairs, const Padded& q, int64_t rows, float* ditems, int64_t width) {
  constexpr int64_t kBlockBytes = 128 << 10, kPairsPerTask = 1 << 15, kMostBlocks = 1024;
  const int64_t vectors = kVectors ? kVectors : q.vectors;
  const int64_t row_bytes = vectors * static_cast<int64_t>(sizeof(Lanes));
  int64_t shift = 0;
  while ((int64_t{2} << shift) * row_bytes <= kBlockBytes || (rows >> shift) >= kMostBlocks) ++shift;
  const int64_t blocks = (rows >> shift) + 1, count = pairs.tokens * pairs.samples;
  const int64_t tasks = (count + kPairsPerTask - 1) / kPairsPerTask;
  std::vector<int64_t> next(tasks * blocks + 1);  // where each task puts its next pair of each block
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t p = task * kPairsPerTask; p < std::min(count, (task + 1) * kPairsPerTask); ++p)
        ++next[task * blocks + (pairs.ids[p] >> shift)];
  });
  std::vector<int64_t> starts(blocks + 1);
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    starts[b] = total;
    for (int64_t task = 0; task < tasks; ++task) total += std::exchange(next[task * blocks + b], total);
  }
  starts[blocks] = total;
  std::vector<Pair> sorted(count);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t* to = next.data() + task * blocks;
      int64_t token = task * kPairsPerTask / pairs.samples, s = task * kPairsPerTask % pairs.samples;
      for (int64_t p = task * kPairsPerTask; p < std::min(count, (task + 1) * kPairsPerTask); ++p) {
        const int64_t block = pairs.ids[p] >> shift;
        sorted[to[block]++] = {static_cast<int32_t>(token), static_cast<int32_t>(pairs.ids[p] - (block << shift)),
                               pairs.weights[p] * pairs.rate(token)};
        if (++s == pairs.samples) s = 0, ++token;
      }
    }
  });
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> storage((vectors * kLanes) << shift);
    Lanes* sums = reinterpret_cast<Lanes*>(storage.data());
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b << shift, have = std::min(rows - first, int64_t{1} << shift);
      if (starts[b] == starts[b + 1]) continue;
      std::fill(storage.begin(), storage.end(), 0.f);
      for (int64_t p = starts[b]; p < starts[b + 1]; ++p) {
        prefetch<kVectors>(q.data + sorted[std::min(p + kAhead, count - 1)].token * vectors, vectors);
        add<kVectors>(sums + sorted[p].row * vectors, sorted[p].weight, q.data + sorted[p].token * vectors, vectors);
      }
      for (int64_t r = 0; r < have; ++r)
        std::memcpy(ditems + (first + r) * width, sums + r * vectors, width * sizeof(float));
    }
  });
}

// The gradient of the items; also that of the queries, to dqueries, unless it is null.
at::Tensor gradients(const Pairs& pairs, const at::Tensor& queries, const at::Tensor& items, float* dqueries) {
  constexpr int64_t kMostBytes = 8 << 20;  // of sums that one thread scatters to at random: they stay near the core
  const int64_t tokens = pairs.tokens, rows = items.size(0), width = items.size(1);
  TORCH_CHECK(tokens < INT32_MAX, "sampled_logits takes fewer than 2^31 tokens, not ", tokens);
  const Padded q(queries), table(items);
  auto ditems = at::zeros(items.sizes(), items.options());
  float* to_items = ditems.mutable_data_ptr<float>();
  const int64_t bytes = rows * q.vectors * static_cast<int64_t>(sizeof(Lanes));
  const bool together = at::get_num_threads() == 1 && bytes <= kMostBytes;
  by_vectors(q.vectors, [&]<int kVectors>() {
    if (together) {
      Padded sums(rows, width, items.options());
      if (dqueries) one_pass<kVectors, true, true>(pairs, q, table, &sums, 0, tokens, dqueries, width);
      else one_pass<kVectors, false, true>(pairs, q, table, &sums, 0, tokens, nullptr, width);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to_items + r * width, sums.data + r * q.vectors, width * sizeof(float));
      return;
    }
    if (dqueries)
      at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
        one_pass<kVectors, true, false>(pairs, q, table, nullptr, begin, end, dqueries, width);
      });
    by_blocks<kVectors>(pairs, q, rows, to_items, width);
  });
  return ditems;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& g, const at::Tensor& queries, const at::Tensor& items,
                                            const at::Tensor& index) {
  const at::Tensor ids = index.to(at::kInt);  // which the forward pass has checked
  const Pairs pairs{ids.size(0), ids.size(1), g.const_data_ptr<float>(), nullptr, ids.const_data_ptr<int32_t>()};
  auto dqueries = at::empty(queries.sizes(), queries.options());
  auto ditems = gradients(pairs, queries, items, dqueries.mutable_data_ptr<float>());
  return {dqueries, ditems};
}

// g [T]: the gradient of the losses.
std::tuple<at::Tensor, at::Tensor> softmax_backward(const at::Tensor& g, const at::Tensor& weights,
                                                    const at::Tensor& slopes, const at::Tensor& queries,
                                                    const at::Tensor& items, const at::Tensor& index) {
  const Pairs pairs{index.size(0), index.size(1), weights.const_data_ptr<float>(), g.const_data_ptr<float>(),
                    index.const_data_ptr<int32_t>()};
  return {at::mul(slopes, g.unsqueeze(1)), gradients(pairs, queries, items, nullptr)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("sampled_logits(Tensor queries, Tensor items, Tensor index) -> Tensor");
  m.def("sampled_logits_backward(Tensor grad, Tensor queries, Tensor items, Tensor index) -> (Tensor, Tensor)");
  m.def(
      "sampled_softmax(Tensor queries, Tensor items, Tensor positive, Tensor negative, float scale, bool with_slopes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sampled_softmax_backward(Tensor grad, Tensor weights, Tensor slopes, Tensor queries, Tensor items, Tensor index) "
      "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("sampled_logits", &forward);
  m.impl("sampled_logits_backward", &backward);
  m.impl("sampled_softmax", &softmax_forward);
  m.impl("sampled_softmax_backward", &softmax_backward);
}

}  // namespace gr::sampled_logits
