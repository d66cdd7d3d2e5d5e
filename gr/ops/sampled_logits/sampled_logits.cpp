// logits[t, s] = queries[t] . items[index[t, s]] without the gathered [T, S, D] tensor, and its two gradients.
//
// Rows are copied once into vectors of kLanes floats, zero padded, so that every loop below has whole vectors.
// Work is cut by shapes, never by the number of threads, so results are the same bits on any number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace gr::sampled_logits {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTokensPerTask = 64;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// A matrix [rows, D] as [rows, vectors] of Lanes. Row r starts at data + r * vectors.
struct Padded {
  int64_t vectors;
  at::Tensor storage;
  Lanes* data;
  // Zeros, and one vector more than needed, since the data is aligned by hand.
  Padded(int64_t rows, int64_t width, const at::TensorOptions& options)
      : vectors((width + kLanes - 1) / kLanes), storage(at::zeros({rows * vectors * kLanes + kLanes}, options)) {
    const auto address = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr<float>());
    data = reinterpret_cast<Lanes*>((address + sizeof(Lanes) - 1) / sizeof(Lanes) * sizeof(Lanes));
  }
  explicit Padded(const at::Tensor& x) : Padded(x.size(0), x.size(1), x.options()) {
    const int64_t width = x.size(1);
    const float* from = x.const_data_ptr<float>();
    at::parallel_for(0, x.size(0), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) std::memcpy(data + r * vectors, from + r * width, width * sizeof(float));
    });
  }
};

// Lane l of the result: the sum of lanes l and l ^ K, of y where bit K of l is set and of x elsewhere.
template <int K, size_t... L> Lanes fold(Lanes x, Lanes y, std::index_sequence<L...>) {
  return __builtin_shufflevector(x, y, (L & K ? kLanes + L : L)...) +
         __builtin_shufflevector(x, y, (L & K ? kLanes + (L ^ K) : L ^ K)...);
}

// Lane l of the result is the sum of all lanes of x[l].
inline Lanes sum_each(Lanes* x) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int i = 0; i < 8; ++i) x[i] = fold<8>(x[i], x[i + 8], lanes);
  for (int i = 0; i < 4; ++i) x[i] = fold<4>(x[i], x[i + 4], lanes);
  for (int i = 0; i < 2; ++i) x[i] = fold<2>(x[i], x[i + 2], lanes);
  return fold<1>(x[0], x[1], lanes);
}

// Calls f with the number of vectors in a row as a compile-time constant where it is small (else 0: read at run time).
template <typename F> void by_vectors(int64_t vectors, F f) {
  switch (vectors) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
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

at::Tensor forward(const at::Tensor& queries, const at::Tensor& items, const at::Tensor& index) {
  const int64_t tokens = index.size(0), samples = index.size(1);
  auto out = at::empty({tokens, samples}, queries.options());
  const Padded q(queries), table(items);
  const int64_t* ids = index.const_data_ptr<int64_t>();
  float* logits = out.mutable_data_ptr<float>();
  by_vectors(q.vectors, [&]<int kVectors>() {
    const int64_t vectors = kVectors ? kVectors : q.vectors;
    at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t* row = ids + t * samples;
        check_row(row, samples, items.size(0));
        const Lanes* a = q.data + t * vectors;
        for (int64_t s = 0; s < samples; s += kLanes) {
          const int64_t have = std::min(kLanes, samples - s);
          Lanes products[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) {
            const Lanes* b = table.data + row[s + std::min(i, have - 1)] * vectors;
            Lanes sum = a[0] * b[0];
            for (int64_t v = 1; v < vectors; ++v) sum += a[v] * b[v];
            products[i] = sum;
          }
          const Lanes sums = sum_each(products);
          float* to = logits + t * samples + s;
          // A copy of fixed size is one store, a copy of variable size is a call.
          if (have == kLanes) std::memcpy(to, &sums, sizeof(sums));
          else std::memcpy(to, &sums, have * sizeof(float));
        }
      }
    });
  });
  return out;
}

// d queries[t] = sum_s g[t, s] items[index[t, s]].
at::Tensor queries_gradient(const at::Tensor& g, const at::Tensor& queries, const Padded& table,
                            const at::Tensor& index) {
  const int64_t tokens = index.size(0), samples = index.size(1), width = queries.size(1);
  auto out = at::empty(queries.sizes(), queries.options());
  const float* weights = g.const_data_ptr<float>();
  const int64_t* ids = index.const_data_ptr<int64_t>();
  float* to = out.mutable_data_ptr<float>();
  by_vectors(table.vectors, [&]<int kVectors>() {
    const int64_t vectors = kVectors ? kVectors : table.vectors;
    at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      std::vector<Lanes> wide(kVectors ? 0 : vectors);
      for (int64_t t = begin; t < end; ++t) {
        Lanes registers[kVectors ? kVectors : 1];
        Lanes* sum = kVectors ? registers : wide.data();
        for (int64_t v = 0; v < vectors; ++v) sum[v] = Lanes{};
        for (int64_t s = 0; s < samples; ++s) {
          const Lanes* b = table.data + ids[t * samples + s] * vectors;
          const float w = weights[t * samples + s];
          for (int64_t v = 0; v < vectors; ++v) sum[v] += w * b[v];
        }
        std::memcpy(to + t * width, sum, width * sizeof(float));
      }
    });
  });
  return out;
}

// Adds the gradients of tokens [first, last) to a table.
void scatter(const at::Tensor& g, const Padded& q, const at::Tensor& index, int64_t first, int64_t last,
             const Padded& sums) {
  const int64_t samples = index.size(1);
  const float* weights = g.const_data_ptr<float>();
  const int64_t* ids = index.const_data_ptr<int64_t>();
  by_vectors(q.vectors, [&]<int kVectors>() {
    const int64_t vectors = kVectors ? kVectors : q.vectors;
    for (int64_t t = first; t < last; ++t)
      for (int64_t s = 0; s < samples; ++s) {
        const Lanes* a = q.data + t * vectors;
        Lanes* b = sums.data + ids[t * samples + s] * vectors;
        const float w = weights[t * samples + s];
        for (int64_t v = 0; v < vectors; ++v) b[v] += w * a[v];
      }
  });
}

// Small tables: every part of the tokens has a private table; the tables are added up in order.
at::Tensor items_gradient_by_parts(const at::Tensor& g, const Padded& q, const at::Tensor& items,
                                   const at::Tensor& index, int64_t parts) {
  const int64_t tokens = index.size(0), rows = items.size(0), width = items.size(1), vectors = q.vectors;
  std::vector<Padded> tables;
  for (int64_t p = 0; p < parts; ++p) tables.emplace_back(rows, width, items.options());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      scatter(g, q, index, tokens * p / parts, tokens * (p + 1) / parts, tables[p]);
  });
  auto out = at::empty(items.sizes(), items.options());
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Lanes* sum = tables[0].data + r * vectors;
      for (int64_t p = 1; p < parts; ++p)
        for (int64_t v = 0; v < vectors; ++v) sum[v] += tables[p].data[r * vectors + v];
      std::memcpy(to + r * width, sum, width * sizeof(float));
    }
  });
  return out;
}

// Large tables: the (token, sample) pairs are sorted by item (counting sort), then every item sums its own pairs.
at::Tensor items_gradient_by_item(const at::Tensor& g, const Padded& q, const at::Tensor& items,
                                  const at::Tensor& index) {
  const int64_t pairs = index.numel(), samples = index.size(1), rows = items.size(0), width = items.size(1);
  const float* weights = g.const_data_ptr<float>();
  const int64_t* ids = index.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(rows + 1), order(pairs);
  for (int64_t i = 0; i < pairs; ++i) ++starts[ids[i] + 1];
  for (int64_t r = 0; r < rows; ++r) starts[r + 1] += starts[r];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) order[next[ids[i]]++] = i;
  auto out = at::zeros(items.sizes(), items.options());
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> sum(q.vectors);
    for (int64_t r = begin; r < end; ++r) {
      if (starts[r] == starts[r + 1]) continue;
      std::fill(sum.begin(), sum.end(), Lanes{});
      for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
        const Lanes* a = q.data + order[i] / samples * q.vectors;
        const float w = weights[order[i]];
        for (int64_t v = 0; v < q.vectors; ++v) sum[v] += w * a[v];
      }
      std::memcpy(to + r * width, sum.data(), width * sizeof(float));
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& g, const at::Tensor& queries, const at::Tensor& items,
                                            const at::Tensor& index) {
  // A private table costs a pass over K rows to clear and one to add: at most one for every kWorth K scattered rows.
  constexpr int64_t kWorth = 32, kMostParts = 16, kMostBytes = int64_t{256} << 20;
  const Padded q(queries);
  auto dq = queries_gradient(g, queries, Padded(items), index);
  const int64_t rows = std::max<int64_t>(items.size(0), 1);
  const int64_t parts = std::min(index.numel() / (kWorth * rows), kMostParts);
  const int64_t bytes = parts * rows * q.vectors * static_cast<int64_t>(sizeof(Lanes));
  if (parts < 1 || bytes > kMostBytes) return {dq, items_gradient_by_item(g, q, items, index)};
  return {dq, items_gradient_by_parts(g, q, items, index, parts)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("sampled_logits(Tensor queries, Tensor items, Tensor index) -> Tensor");
  m.def("sampled_logits_backward(Tensor grad, Tensor queries, Tensor items, Tensor index) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("sampled_logits", &forward);
  m.impl("sampled_logits_backward", &backward);
}

}  // namespace gr::sampled_logits
