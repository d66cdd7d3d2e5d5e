// The sums of what tasks have each added up, which do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace gr {

inline void add_to(const float* __restrict x, double* __restrict sums, int64_t n) {
  for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<double>(x[c]);
}

// float [...] of parts [tasks, ...], added in the order of tasks, in double.
inline at::Tensor sum_tasks(const at::Tensor& parts) {
  constexpr int64_t kColumns = 512;
  const int64_t tasks = parts.size(0);
  auto out = at::empty(parts.sizes().slice(1), parts.options());
  const int64_t n = out.numel();
  const float* from = parts.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, (n + kColumns - 1) / kColumns, 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, have = std::min(kColumns, n - first);
      double sums[kColumns] = {};
      for (int64_t task = 0; task < tasks; ++task) add_to(from + task * n + first, sums, have);
      std::transform(sums, sums + have, to + first, [](double sum) { return static_cast<float>(sum); });
    }
  });
  return out;
}

}  // namespace gr
