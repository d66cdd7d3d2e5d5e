// RMSNorm of rows, in one pass over a row that stays in cache.
#include "rms_norm.h"
#include "task_sums.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace gr::rms_norm {
namespace {

constexpr int64_t kRows = 64;  // rows a task: the gradients of the weight are summed by task, then in the order of tasks

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t rows = x.size(0), width = x.size(1);
  auto out = at::empty(x.sizes(), x.options()), scale = at::empty({rows}, x.options());
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRows, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      scales[t] = rms_norm_row(from + t * width, w, to + t * width, width, static_cast<float>(eps));
  });
  return {out, scale};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                            const at::Tensor& scale) {
  const int64_t rows = x.size(0), width = x.size(1), tasks = (rows + kRows - 1) / kRows;
  auto dx = at::empty(x.sizes(), x.options()), sums = at::zeros({tasks, width}, x.options());
  const float *from = x.const_data_ptr<float>(), *above = grad.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *scales = scale.const_data_ptr<float>();
  float *to = dx.mutable_data_ptr<float>(), *dweights = sums.mutable_data_ptr<float>();
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first * kRows; t < std::min(last * kRows, rows); ++t)
      rms_norm_backward_row(above + t * width, from + t * width, w, scales[t], to + t * width,
                            dweights + t / kRows * width, width);
  });
  return {dx, sum_tasks(sums)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("rms_norm", &forward);
  m.impl("rms_norm_backward", &backward);
}

}  // namespace gr::rms_norm
