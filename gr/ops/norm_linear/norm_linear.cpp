// The left half of a layer, norm(x) weight + bias and its SiLU, with its gradients, block by block of rows: what
// lies between the norm, the product and the activation stays in the cache. Weights must fit there too, beside it.
//
// Rows of the output depend on their row of x alone. The gradients of the weights are summed by task, then in the order
// of tasks: the same bits on any number of threads.
#include "../task_sums.h"
#include "../tile.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace gr::norm_linear {
namespace {

constexpr int64_t kRows = 64;           // of a block
constexpr int64_t kBlocksPerTask = 16;  // whose gradients of the weights are one sum
using Optional = std::optional<at::Tensor>;

enum Norm : int64_t { kNone, kLayer, kRms };  // as in fused.py

// hat <- (x - mean) / deviation; returns 1 / deviation. rms: about 0 instead of the mean.
inline float normalise_row(const float* __restrict x, float* __restrict hat, int64_t n, float eps, bool rms) {
  float sum = 0.f, squares = 0.f;
  for (int64_t c = 0; c < n; ++c) sum += x[c];
  const float mean = rms ? 0.f : sum / static_cast<float>(n);
  for (int64_t c = 0; c < n; ++c) {
    hat[c] = x[c] - mean;
    squares += hat[c] * hat[c];
  }
  const float rstd = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t c = 0; c < n; ++c) hat[c] *= rstd;
  return rstd;
}

// D columns in and O columns out; x, the weights and what they give are float, row major.
struct Layer {
  int64_t rows, width, columns;
  float eps;
  int64_t norm;
  const float *x, *weight, *bias, *norm_weight, *norm_bias;  // the last three may be null
  Layer(const at::Tensor& input, const at::Tensor& matrix, const Optional& b, const Optional& norm_w,
        const Optional& norm_b, double epsilon, int64_t kind)
      : rows(input.size(0)), width(input.size(1)), columns(matrix.size(1)), eps(static_cast<float>(epsilon)),
        norm(kind), x(input.const_data_ptr<float>()), weight(matrix.const_data_ptr<float>()), bias(data(b)),
        norm_weight(data(norm_w)), norm_bias(data(norm_b)) {}
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
  int64_t have(int64_t block) const { return std::min(kRows, rows - block * kRows); }

  // hat [kRows, width] <- (x - mean) / deviation, and 1 / deviation, of the rows of a block, or x where there is no norm;
  // zero behind the last row.
  void normalise(int64_t block, float* hat, float* rstd) const {
    for (int64_t r = 0; r < kRows; ++r, hat += width) {
      if (r >= have(block)) {
        std::fill(hat, hat + width, 0.f);
        continue;
      }
      const float* row = x + (block * kRows + r) * width;
      if (norm == kNone)
        std::memcpy(hat, row, width * sizeof(float));
      else
        rstd[r] = normalise_row(row, hat, width, eps, norm == kRms);
    }
  }
  // normed <- hat norm_weight + norm_bias, which may be the same memory.
  const float* affine(const float* hat, float* normed) const {
    if (!norm_weight && !norm_bias) return hat;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t c = 0; c < width; ++c)
        normed[r * width + c] =
            hat[r * width + c] * (norm_weight ? norm_weight[c] : 1.f) + (norm_bias ? norm_bias[c] : 0.f);
    return normed;
  }

 private:
  static const float* data(const Optional& x) { return x ? x->const_data_ptr<float>() : nullptr; }
};

inline void silu(const float* __restrict z, float* __restrict out, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = z[c] * sigmoid(z[c]);
}

// out and z [T, O]; residual [T, O] is added to out. z, what the backward pass needs of the activation, is empty without one.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, const Optional& bias,
                                           const Optional& norm_weight, const Optional& norm_bias, double eps,
                                           bool activated, int64_t norm, const Optional& residual) {
  const Layer layer(x, weight, bias, norm_weight, norm_bias, eps, norm);
  const int64_t n = layer.columns;
  auto out = at::empty({layer.rows, n}, x.options()), z = at::empty({activated ? layer.rows : 0, n}, x.options());
  float *to_out = out.mutable_data_ptr<float>(), *to_z = z.mutable_data_ptr<float>();
  at::parallel_for(0, layer.blocks(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float *hat = scratch.take<float>(kRows * layer.width), *normed = scratch.take<float>(kRows * layer.width);
    float *product = scratch.take<float>(kRows * n), rstd[kRows];
    for (int64_t block = begin; block < end; ++block) {
      layer.normalise(block, hat, rstd);
      const float* left = layer.affine(hat, normed);
      multiply<float>(kRows, n, layer.width, left, layer.width, layer.weight, n, product, n, false);
      for (int64_t r = 0; r < layer.have(block); ++r) {
        float* row = product + r * n;
        const int64_t at = (block * kRows + r) * n;
        if (layer.bias) add(layer.bias, row, n);
        std::memcpy((activated ? to_z : to_out) + at, row, n * sizeof(float));
        if (activated) silu(row, to_out + at, n);
        if (residual) add(residual->const_data_ptr<float>() + at, to_out + at, n);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {out, z};
}

inline void silu_backward(const float* __restrict z, float* __restrict d, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const float g = sigmoid(z[c]), y = z[c] * g;
    d[c] *= g + y * (1.f - g);
  }
}

// The gradient of the output, in parts side by side: each [T, some columns].
struct Part {
  const float* data;
  int64_t stride, columns;
};

// dz [kRows, n] <- the gradient before the activation; zero behind the last row.
void load_gradient(const std::vector<Part>& parts, const float* z, int64_t block, int64_t have, int64_t n, float* dz) {
  for (int64_t r = 0; r < kRows; ++r, dz += n) {
    if (r >= have) {
      std::fill(dz, dz + n, 0.f);
      continue;
    }
    const int64_t t = block * kRows + r;
    float* to = dz;
    for (const Part& part : parts) {
      std::memcpy(to, part.data + t * part.stride, part.columns * sizeof(float));
      to += part.columns;
    }
    if (z) silu_backward(z + t * n, dz, n);
  }
}

// The gradient of a row of x from that of its norm's output, d. Adds those of the affine map to sums [2, width].
void normalise_backward(const Layer& layer, const float* __restrict hat, float rstd, float* __restrict d,
                        float* __restrict sums, float* __restrict dx) {
  const int64_t n = layer.width;
  if (layer.norm == kNone) {
    std::memcpy(dx, d, n * sizeof(float));
    return;
  }
  if (sums)
    for (int64_t c = 0; c < n; ++c) sums[c] += d[c] * hat[c], sums[n + c] += d[c];
  if (layer.norm_weight)
    for (int64_t c = 0; c < n; ++c) d[c] *= layer.norm_weight[c];
  float sum = 0.f, along = 0.f;
  for (int64_t c = 0; c < n; ++c) sum += d[c], along += d[c] * hat[c];
  const float mean = layer.norm == kRms ? 0.f : sum / static_cast<float>(n), rate = along / static_cast<float>(n);
  for (int64_t c = 0; c < n; ++c) dx[c] = rstd * (d[c] - mean - hat[c] * rate);
}

// The gradients of x [T, D], of the weight [D, O], of the bias [O] and of the norm's weight and bias [2, D].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(at::TensorList grads, const at::Tensor& x,
                                                                   const at::Tensor& weight, const Optional& bias,
                                                                   const Optional& norm_weight,
                                                                   const Optional& norm_bias, const Optional& z,
                                                                   double eps, int64_t norm) {
  const Layer layer(x, weight, bias, norm_weight, norm_bias, eps, norm);
  const int64_t d = layer.width, n = layer.columns;
  std::vector<Part> parts;
  for (const at::Tensor& grad : grads) parts.push_back({grad.const_data_ptr<float>(), grad.stride(0), grad.size(1)});
  const int64_t tasks = (layer.blocks() + kBlocksPerTask - 1) / kBlocksPerTask;
  const bool affine = norm_weight || norm_bias;
  auto dx = at::empty(x.sizes(), x.options()), dweights = at::empty({tasks, d, n}, x.options());
  auto dbiases = at::zeros({bias ? tasks : 0, n}, x.options());
  auto dnorms = at::zeros({affine ? tasks : 0, 2, d}, x.options());
  const at::Tensor turned = weight.t().contiguous();
  const float* z_rows = z ? z->const_data_ptr<float>() : nullptr;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    // Transposing reads and writes whole blocks of 8 columns.
    const int64_t room = round_up(d, 8) * kRows;
    float *hat = scratch.take<float>(room), *normed = scratch.take<float>(room);
    float *hat_t = scratch.take<float>(room), *dnormed = scratch.take<float>(kRows * d);
    float *dz = scratch.take<float>(kRows * n), rstd[kRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kBlocksPerTask, last = std::min(layer.blocks(), first + kBlocksPerTask);
      float* dweight = dweights.mutable_data_ptr<float>() + task * d * n;
      float* sums = affine ? dnorms.mutable_data_ptr<float>() + task * 2 * d : nullptr;
      for (int64_t block = first; block < last; ++block) {
        const int64_t have = layer.have(block);
        layer.normalise(block, hat, rstd);
        load_gradient(parts, z_rows, block, have, n, dz);
        const float* left = layer.affine(hat, normed);
        transpose(left, kRows, d, d, hat_t, kRows);
        multiply<float>(d, n, kRows, hat_t, kRows, dz, n, dweight, n, block > first);
        multiply<float>(kRows, d, n, dz, n, turned.const_data_ptr<float>(), d, dnormed, d, false);
        if (bias) {
          float* dbias = dbiases.mutable_data_ptr<float>() + task * n;
          for (int64_t r = 0; r < have; ++r) add(dz + r * n, dbias, n);
        }
        for (int64_t r = 0; r < have; ++r)
          normalise_backward(layer, hat + r * d, rstd[r], dnormed + r * d, sums,
                             dx.mutable_data_ptr<float>() + (block * kRows + r) * d);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {dx, sum_tasks(dweights), sum_tasks(dbiases), sum_tasks(dnorms)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "norm_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "bool silu, int norm, Tensor? residual) -> (Tensor, Tensor)");
  m.def(
      "norm_linear_backward(Tensor[] grads, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? z, float eps, int norm) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("norm_linear", &forward);
  m.impl("norm_linear_backward", &backward);
}

}  // namespace gr::norm_linear
