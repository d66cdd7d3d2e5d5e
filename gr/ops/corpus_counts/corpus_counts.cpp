// How many items of a corpus score above a query's target, as much as it, or not a number: reference.py defines it.
//
// Scores are made in blocks that stay in the cache, and counted there, so nothing of size [queries, items] exists. One
// kernel makes every score, the target's too: a score has the same bits wherever its item stands, so that equal items
// tie, and at any number of threads and of slices of the corpus. A panel is kPanel queries, lane by lane.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

namespace gr::corpus_counts {
namespace {

// kVectors times kItems sums, the queries and one item fit the registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kItems = 6;
constexpr int64_t kPanel = kLanes * kVectors, kBlock = 40 * kItems;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// a * x + sum in each lane. The intrinsics say what is meant: compilers tuned for Zen otherwise multiply, then add.
inline Lanes multiply_add(Lanes a, float x, Lanes sum) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), _mm512_set1_ps(x), reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<Lanes>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), _mm256_set1_ps(x), reinterpret_cast<__m256>(sum)));
#else
  return a * x + sum;
#endif
}

// scores [kItems, kPanel]: of a panel [D, kPanel] with kItems items.
__attribute__((noinline)) void score(const float* panel, const float* const* items, int64_t D, float* scores) {
  Lanes sums[kItems][kVectors] = {};
  const float* rows[kItems];
  std::copy_n(items, kItems, rows);
  for (int64_t d = 0; d < D; ++d) {
    Lanes query[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) query[v] = load(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kItems; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(query[v], rows[i][d], sums[i][v]);
  }
  std::memcpy(scores, sums, sizeof(sums));
}

// scores [count rounded up to kItems, kPanel]: of a panel with `count` items that lie one after the other.
void score_block(const float* panel, const float* items, int64_t count, int64_t D, float* scores) {
  for (int64_t first = 0; first < count; first += kItems) {
    const float* rows[kItems];
    for (int64_t i = 0; i < kItems; ++i) rows[i] = items + std::min(first + i, count - 1) * D;  // the rest is not read
    score(panel, rows, D, scores + first * kPanel);
  }
}

// Queries [Q, D] as panels [D, kPanel], zeros behind the last one.
struct Panels {
  int64_t count, D;
  at::Tensor storage;
  explicit Panels(const at::Tensor& queries)
      : count((queries.size(0) + kPanel - 1) / kPanel), D(queries.size(1)),
        storage(at::zeros({count, D, kPanel}, queries.options())) {
    const float* from = queries.const_data_ptr<float>();
    float* to = storage.mutable_data_ptr<float>();
    for (int64_t q = 0; q < queries.size(0); ++q)
      for (int64_t d = 0; d < D; ++d) to[(q / kPanel * D + d) * kPanel + q % kPanel] = from[q * D + d];
  }
  const float* at(int64_t panel) const { return storage.const_data_ptr<float>() + panel * D * kPanel; }
};

// The seen items of each (block, panel), by a counting sort: entry e of a bucket is a place in the block's scores.
struct Seen {
  int64_t panels;
  std::vector<int64_t> starts, places;
  Seen(const at::Tensor& query, const at::Tensor& column, int64_t panels, int64_t blocks)
      : panels(panels), starts(blocks * panels + 1, 0), places(query.numel()) {
    const int64_t *queries = query.const_data_ptr<int64_t>(), *columns = column.const_data_ptr<int64_t>();
    const auto bucket = [&](int64_t s) { return columns[s] / kBlock * panels + queries[s] / kPanel; };
    for (int64_t s = 0; s < query.numel(); ++s) ++starts[bucket(s) + 1];
    for (size_t b = 1; b < starts.size(); ++b) starts[b] += starts[b - 1];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t s = 0; s < query.numel(); ++s)
      places[next[bucket(s)]++] = columns[s] % kBlock * kPanel + queries[s] % kPanel;
  }
  void hide(int64_t block, int64_t panel, float* scores) const {
    const int64_t bucket = block * panels + panel;
    for (int64_t e = starts[bucket]; e < starts[bucket + 1]; ++e) scores[places[e]] = -std::numeric_limits<float>::infinity();
  }
};

// Adds to counts [3, kPanel] the scores above the target, equal to it, and not a number.
void count(const float* scores, int64_t items, const float* targets, int64_t* counts) {
  for (int v = 0; v < kVectors; ++v) {
    const Lanes target = load(targets + v * kLanes);
    Mask above = {}, equal = {}, wrong = {};
    for (int64_t i = 0; i < items; ++i) {
      const Lanes x = load(scores + i * kPanel + v * kLanes);
      above -= x > target;  // a true lane is -1
      equal -= x == target;
      wrong -= x != x;
    }
    for (int l = 0; l < kLanes; ++l) {
      counts[0 * kPanel + v * kLanes + l] += above[l];
      counts[1 * kPanel + v * kLanes + l] += equal[l];
      counts[2 * kPanel + v * kLanes + l] += wrong[l];
    }
  }
}

void check(const at::Tensor& queries, const at::Tensor& items) {
  TORCH_CHECK_VALUE(queries.scalar_type() == at::kFloat && items.scalar_type() == at::kFloat, "queries and items must be float32");
  TORCH_CHECK_VALUE(queries.dim() == 2 && items.dim() == 2 && queries.size(1) == items.size(1),
                    "queries [Q, D] and items [C, D] must have one width");
  TORCH_CHECK_VALUE(queries.is_contiguous() && items.is_contiguous(), "queries and items must be contiguous");
}

at::Tensor paired_scores(const at::Tensor& queries, const at::Tensor& items) {
  check(queries, items);
  TORCH_CHECK_VALUE(queries.size(0) == items.size(0), "there must be one item for each query");
  const int64_t Q = queries.size(0), D = queries.size(1);
  const Panels panels(queries);
  at::Tensor result = at::empty({Q}, queries.options());
  std::vector<float> scores((kPanel + kItems) * kPanel);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = p * kPanel, size = std::min(kPanel, Q - first);
    score_block(panels.at(p), items.const_data_ptr<float>() + first * D, size, D, scores.data());
    for (int64_t i = 0; i < size; ++i) result.mutable_data_ptr<float>()[first + i] = scores[i * kPanel + i];
  }
  return result;
}

at::Tensor corpus_counts(const at::Tensor& queries, const at::Tensor& items, const at::Tensor& targets,
                         const at::Tensor& seen_query, const at::Tensor& seen_column) {
  check(queries, items);
  const int64_t Q = queries.size(0), C = items.size(0), D = queries.size(1), blocks = (C + kBlock - 1) / kBlock;
  TORCH_CHECK_VALUE(targets.scalar_type() == at::kFloat && targets.numel() == Q && targets.is_contiguous(), "targets must be float32 [Q]");
  TORCH_CHECK_VALUE(seen_query.numel() == seen_column.numel() && seen_query.is_contiguous() && seen_column.is_contiguous(),
                    "seen items must be pairs of a query and a column");
  const Panels panels(queries);
  std::vector<float> target(panels.count * kPanel, 0.0f);
  std::copy_n(targets.const_data_ptr<float>(), Q, target.data());
  const Seen seen(seen_query, seen_column, panels.count, blocks);
  std::vector<int64_t> total(panels.count * 3 * kPanel, 0);
  std::mutex adding;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(kBlock * kPanel);
    std::vector<int64_t> counts(total.size(), 0);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = b * kBlock, size = std::min(kBlock, C - first);
        score_block(panels.at(p), items.const_data_ptr<float>() + first * D, size, D, scores.data());
        seen.hide(b, p, scores.data());
        count(scores.data(), size, target.data() + p * kPanel, counts.data() + p * 3 * kPanel);
      }
    const std::lock_guard lock(adding);
    for (size_t i = 0; i < total.size(); ++i) total[i] += counts[i];
  });
  at::Tensor result = at::empty({Q, 3}, queries.options().dtype(at::kLong));
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t kind = 0; kind < 3; ++kind)
      result.mutable_data_ptr<int64_t>()[q * 3 + kind] = total[(q / kPanel * 3 + kind) * kPanel + q % kPanel];
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("paired_scores(Tensor queries, Tensor items) -> Tensor");
  m.def("corpus_counts(Tensor queries, Tensor items, Tensor targets, Tensor seen_query, Tensor seen_column) -> Tensor");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("paired_scores", &paired_scores);
  m.impl("corpus_counts", &corpus_counts);
}

}  // namespace gr::corpus_counts
