// RMSNorm of rows, in one pass over a row that stays in cache: y = x scale weight with scale = 1 / sqrt(mean(x^2) + eps).
#include "tile.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace gr::rms_norm {
namespace {

constexpr int64_t kRows = 64;  // rows a task: the gradients of the weight are summed by task, then in the order of tasks

// Returns scale.
inline float forward_row(const float* __restrict x, const float* __restrict weight, float* __restrict y, int64_t n,
                         float eps) {
  float squares = 0.f;
  for (int64_t c = 0; c < n; ++c) squares += x[c] * x[c];
  const float scale = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t c = 0; c < n; ++c) y[c] = x[c] * scale * weight[c];
  return scale;
}

inline void backward_row(const float* __restrict dy, const float* __restrict x, const float* __restrict weight,
                         float scale, float* __restrict dx, float* __restrict dweight, int64_t n) {
  float along = 0.f;
  for (int64_t c = 0; c < n; ++c) along += dy[c] * weight[c] * x[c];
  const float back = along * scale * scale / static_cast<float>(n);
  for (int64_t c = 0; c < n; ++c) {
    dweight[c] += dy[c] * x[c] * scale;
    dx[c] = scale * (dy[c] * weight[c] - x[c] * back);
  }
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t rows = x.size(0), width = x.size(1);
  auto out = at::empty(x.sizes(), x.options()), scale = at::empty({rows}, x.options());
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>(), *scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRows, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      scales[t] = forward_row(from + t * width, w, to + t * width, width, static_cast<float>(eps));
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
      backward_row(above + t * width, from + t * width, w, scales[t], to + t * width, dweights + t / kRows * width,
                   width);
  });
  return {dx, sums.sum(0, false, at::kDouble).to(at::kFloat)};
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
