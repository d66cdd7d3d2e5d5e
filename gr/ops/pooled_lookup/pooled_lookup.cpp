// Sums of the rows of bags, over the tables of many features, and the update of these rows: reference.py beside it is
// the definition. B bags a feature, F features, D the width of a table's rows.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "../row_update/row_update.h"

namespace gr::pooled_lookup {
namespace {

constexpr int64_t kAhead = 8, kBagsPerTask = 64, kDigitBits = 11;

// The bags of one feature: ids[offset[b]] .. ids[offset[b + 1]] of a table, and the first of its columns in the output.
struct Feature {
  const int64_t* offset;
  int64_t table, column;
};

struct Bags {
  std::vector<Feature> features;
  const int64_t* ids;
  int64_t count, columns;
};

Bags bags_of(at::TensorList weights, at::IntArrayRef tables, const at::Tensor& ids, const at::Tensor& offsets) {
  TORCH_CHECK_VALUE(ids.is_contiguous() && offsets.is_contiguous(), "ids and offsets must be contiguous");
  for (const at::Tensor& weight : weights)
    TORCH_CHECK_VALUE(weight.is_contiguous() && weight.scalar_type() == weights[0].scalar_type(),
                      "tables must be contiguous and of one dtype");
  const int64_t F = tables.size(), B = F ? (offsets.numel() - 1) / F : 0;
  TORCH_CHECK_VALUE(F && offsets.numel() == F * B + 1, "offsets_FB must have ", F, " x B + 1 numbers, not ", offsets.numel());
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[F * B] <= ids.numel(), "offsets_FB must lie in [0, ", ids.numel(), "]");
  for (int64_t i = 0; i < F * B; ++i) TORCH_CHECK_VALUE(offset[i] <= offset[i + 1], "offsets_FB must not fall");
  Bags bags{{}, ids.const_data_ptr<int64_t>(), B, 0};
  for (int64_t f = 0; f < F; ++f) {
    bags.features.push_back({offset + f * B, tables[f], bags.columns});
    bags.columns += weights[tables[f]].size(1);
  }
  return bags;
}

// Checked before any row is read: an id outside a table would read past it.
void check_ids(const Bags& bags, at::TensorList weights) {
  for (const Feature& feature : bags.features) {
    const uint64_t rows = weights[feature.table].size(0);
    const int64_t begin = feature.offset[0], end = feature.offset[bags.count];
    bool inside = true;
    for (int64_t i = begin; i < end; ++i) inside &= static_cast<uint64_t>(bags.ids[i]) < rows;
    if (inside) continue;
    const int64_t* wrong = std::find_if(bags.ids + begin, bags.ids + end,
                                        [rows](int64_t id) { return static_cast<uint64_t>(id) >= rows; });
    TORCH_CHECK_INDEX(false, "ids_T must lie in [0, ", rows, "), the rows of their table; found ", *wrong);
  }
}

template <typename W, typename A> void pool(const Bags& bags, at::TensorList weights, A* out) {
  at::parallel_for(0, bags.count, kBagsPerTask, [&](int64_t first, int64_t last) {
    // Features take turns over a few bags, so that what is written stays in the cache until its lines are whole.
    for (int64_t begin = first; begin < last; begin += kBagsPerTask)
      for (const Feature& feature : bags.features) {
        const at::Tensor& weight = weights[feature.table];
        const W* rows = weight.const_data_ptr<W>();
        const int64_t D = weight.size(1), stop = feature.offset[bags.count], end = std::min(begin + kBagsPerTask, last);
        for (int64_t b = begin; b < end; ++b) {
          A* __restrict sum = out + b * bags.columns + feature.column;
          std::fill(sum, sum + D, A(0));
          for (int64_t i = feature.offset[b]; i < feature.offset[b + 1]; ++i) {
            if (i + kAhead < stop) row_update::prefetch<0>(rows + bags.ids[i + kAhead] * D, D);
            const W* __restrict row = rows + bags.ids[i] * D;
            for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<A>(row[d]);
          }
        }
      }
  });
}

at::Tensor pooled_lookup(at::TensorList weights, at::IntArrayRef tables, const at::Tensor& ids, const at::Tensor& offsets) {
  const Bags bags = bags_of(weights, tables, ids, offsets);
  check_ids(bags, weights);
  const at::ScalarType dtype = weights[0].scalar_type();
  const at::Tensor out = at::empty({bags.count, bags.columns}, dtype == at::kDouble ? at::kDouble : at::kFloat);
  switch (dtype) {
    case at::kFloat: pool<float>(bags, weights, out.mutable_data_ptr<float>()); break;
    case at::kDouble: pool<double>(bags, weights, out.mutable_data_ptr<double>()); break;
    case at::kHalf: pool<c10::Half>(bags, weights, out.mutable_data_ptr<float>()); break;
    case at::kBFloat16: pool<c10::BFloat16>(bags, weights, out.mutable_data_ptr<float>()); break;
    default: TORCH_CHECK_VALUE(false, "no lookup in a table of ", dtype);
  }
  return out;
}

// The ids of one table with the places of their gradients.
struct Ids {
  std::vector<int64_t> id, place;
  explicit Ids(int64_t count) : id(count), place(count) {}
};

// By id, those of one id in their order: digit by digit, least first.
Ids sorted(Ids ids, int64_t rows) {
  const int bits = std::bit_width(static_cast<uint64_t>(rows - 1));
  const int passes = (bits + kDigitBits - 1) / kDigitBits, digit = passes ? (bits + passes - 1) / passes : 0;
  const int64_t count = ids.id.size(), mask = (int64_t{1} << digit) - 1;
  Ids next(count);
  std::vector<int64_t> starts(mask + 2);
  for (int shift = 0; shift < passes * digit; shift += digit) {
    std::fill(starts.begin(), starts.end(), 0);
    for (int64_t i = 0; i < count; ++i) ++starts[(ids.id[i] >> shift & mask) + 1];
    for (int64_t d = 0; d < mask; ++d) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t to = starts[ids.id[i] >> shift & mask]++;
      next.id[to] = ids.id[i];
      next.place[to] = ids.place[i];
    }
    std::swap(ids, next);
  }
  return ids;
}

Ids ids_of(const Bags& bags, int64_t table) {
  int64_t count = 0, next = 0;
  for (const Feature& feature : bags.features)
    if (feature.table == table) count += feature.offset[bags.count] - feature.offset[0];
  Ids ids(count);
  for (const Feature& feature : bags.features) {
    if (feature.table != table) continue;
    for (int64_t b = 0; b < bags.count; ++b)
      for (int64_t i = feature.offset[b]; i < feature.offset[b + 1]; ++i, ++next) {
        ids.id[next] = bags.ids[i];
        ids.place[next] = b * bags.columns + feature.column;
      }
  }
  return ids;
}

void pooled_update(const at::Tensor& gradient, at::TensorList weights, at::TensorList states, at::IntArrayRef tables,
                   const at::Tensor& ids, const at::Tensor& offsets, int64_t rule, at::ArrayRef<double> numbers) {
  const Bags bags = bags_of(weights, tables, ids, offsets);
  TORCH_CHECK_VALUE(gradient.is_contiguous() && gradient.numel() == bags.count * bags.columns,
                    "the gradient must be contiguous, ", bags.count, " x ", bags.columns);
  const int64_t count = weights.size(), kinds = states.size() / count;
  for (size_t i = 0; i < states.size(); ++i)
    TORCH_CHECK_VALUE(states[i].is_contiguous() && states[i].size(0) == weights[i / kinds].size(0),
                      "states must be contiguous, with the rows of their table");
  // Tables run side by side; where there is one, its rows do.
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t rows = weights[t].size(0);
      const Ids own = sorted(ids_of(bags, t), rows);
      const int64_t looked_up = own.id.size();
      const row_update::Batch batch{weights[t], gradient, states.slice(t * kinds, kinds), own.id.data(), own.place.data(),
                                    looked_up, 1, row_update::runs_of(own.id.data(), looked_up, rows)};
      row_update::update_rows(rule, batch, row_update::Numbers(numbers), {});
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("pooled_lookup(Tensor[] weights, int[] tables, Tensor ids, Tensor offsets) -> Tensor");
  m.def(
      "pooled_update(Tensor gradient, Tensor(a!)[] weights, Tensor(b!)[] states, int[] tables, Tensor ids, "
      "Tensor offsets, int rule, float[] numbers) -> ()");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("pooled_lookup", &pooled_lookup);
  m.impl("pooled_update", &pooled_update);
}

}  // namespace gr::pooled_lookup
