// The feed-forward half of a Llama layer, x + W_down (silu(W_gate n) * W_up n) with n = rms_norm(x), and its gradients,
// block by block of rows: what lies between the steps stays in the cache, the matrices beside it or near.
//
// T rows, D width, F hidden width. Rows of y depend on their row of x alone. The gradients of the weights are summed by
// task, then in the order of tasks: the same bits on any number of threads.
#include "../rms_norm.h"
#include "../task_sums.h"
#include "../tile.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace gr::norm_swiglu {
namespace {

constexpr int64_t kRows = 64;         // of a block
constexpr int64_t kMostTasks = 8;     // of a backward pass, each with gradients of the weights of its own,
constexpr int64_t kLeastBlocks = 16;  // and each of at least so many blocks

struct Shape {
  int64_t rows, width, hidden;
  Shape(const at::Tensor& x, const at::Tensor& gate) : rows(x.size(0)), width(x.size(1)), hidden(gate.size(0)) {}
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
  int64_t have(int64_t block) const { return std::min(kRows, rows - block * kRows); }
  // The rows of a block that products compute: few shapes, so that few kernels are made.
  int64_t computed(int64_t block) const { return round_up(have(block), kEdge); }
};

// to [computed, n] <- the rows of a block of a dense matrix [rows, n], zeros behind the last.
void load(const Shape& shape, int64_t block, const float* from, int64_t n, float* to) {
  const int64_t have = shape.have(block);
  std::memcpy(to, from + block * kRows * n, have * n * sizeof(float));
  std::fill(to + have * n, to + shape.computed(block) * n, 0.f);
}

// Not inlined: within a parallel region the compiler does not vectorise these loops.
[[gnu::noinline]] void swiglu(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] = swiglu_of(gate[c], up[c]);
}

// dgate: on entry the gradient of the product.
[[gnu::noinline]] void swiglu_backward(const float* __restrict gate, const float* __restrict up, float* __restrict dgate,
                                       float* __restrict dup, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const auto [of_gate, of_up] = swiglu_gradients(dgate[c], gate[c], up[c]);
    dgate[c] = of_gate;
    dup[c] = of_up;
  }
}

// y [T, D], with x added where it is residual. For the backward pass: both products side by side [T rounded up, 2 F] and
// the norm's scale [T].
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& norm_weight,
                                                       const at::Tensor& gate, const at::Tensor& up,
                                                       const at::Tensor& down, double eps, bool residual) {
  const Shape shape(x, gate);
  const int64_t d = shape.width, f = shape.hidden;
  auto y = at::empty(x.sizes(), x.options()), scale = at::empty({shape.rows}, x.options());
  auto products = at::empty({round_up(shape.rows, kEdge), 2 * f}, x.options());
  const at::Tensor gate_up = at::cat({gate.t(), up.t()}, 1), down_t = down.t().contiguous();
  const float *from = x.const_data_ptr<float>(), *w = norm_weight.const_data_ptr<float>();
  const float *first = gate_up.const_data_ptr<float>(), *second = down_t.const_data_ptr<float>();
  float *to = y.mutable_data_ptr<float>(), *kept = products.mutable_data_ptr<float>();
  float* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, shape.blocks(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float *normed = scratch.take<float>(kRows * d), *product = scratch.take<float>(kRows * f);
    float* sum = scratch.take<float>(kRows * d);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRows, have = shape.have(block), m = shape.computed(block);
      for (int64_t r = 0; r < have; ++r)
        scales[row + r] = rms_norm_row(from + (row + r) * d, w, normed + r * d, d, static_cast<float>(eps));
      std::fill(normed + have * d, normed + m * d, 0.f);
      float* both = kept + row * 2 * f;
      multiply<float>(m, 2 * f, d, normed, d, first, 2 * f, both, 2 * f, false);
      for (int64_t r = 0; r < m; ++r) swiglu(both + r * 2 * f, both + r * 2 * f + f, product + r * f, f);
      if (residual) load(shape, block, from, d, sum);
      multiply<float>(m, d, f, product, f, second, d, sum, d, residual);
      std::memcpy(to + row * d, sum, have * d * sizeof(float));
    }
    at::native::cpublas::brgemm_release();
  });
  return {y, products, scale};
}

// The gradients of x, of the norm's weight [D], of both first matrices side by side [D, 2 F] and of the last [D, F].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& x,
                                                                    const at::Tensor& norm_weight,
                                                                    const at::Tensor& gate, const at::Tensor& up,
                                                                    const at::Tensor& down, const at::Tensor& products,
                                                                    const at::Tensor& scale, bool residual) {
  const Shape shape(x, gate);
  const int64_t d = shape.width, f = shape.hidden, d_8 = round_up(d, 8);
  const int64_t blocks_of_task = std::max(kLeastBlocks, (shape.blocks() + kMostTasks - 1) / kMostTasks);
  const int64_t tasks = (shape.blocks() + blocks_of_task - 1) / blocks_of_task;
  auto dx = at::empty(x.sizes(), x.options()), dnorms = at::zeros({tasks, d}, x.options());
  auto dgate_ups = at::empty({tasks, d, 2 * f}, x.options()), ddowns = at::empty({tasks, d, f}, x.options());
  const float *from = x.const_data_ptr<float>(), *above = dy.const_data_ptr<float>();
  const float *w = norm_weight.const_data_ptr<float>(), *scales = scale.const_data_ptr<float>();
  const float *kept = products.const_data_ptr<float>(), *w_gate = gate.const_data_ptr<float>();
  const float *w_up = up.const_data_ptr<float>(), *w_down = down.const_data_ptr<float>();
  float* to = dx.mutable_data_ptr<float>();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    // Transposing reads and writes whole blocks of 8 columns.
    float *normed = scratch.take<float>(kRows * d_8), *turned = scratch.take<float>(kRows * d_8);
    float *dnormed = scratch.take<float>(kRows * d), *both = scratch.take<float>(kRows * 2 * f);
    float* dy_rows = scratch.take<float>(kRows * d_8);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start = task * blocks_of_task, stop = std::min(shape.blocks(), start + blocks_of_task);
      float* dgate_up = dgate_ups.mutable_data_ptr<float>() + task * d * 2 * f;
      float* ddown = ddowns.mutable_data_ptr<float>() + task * d * f;
      float* dnorm = dnorms.mutable_data_ptr<float>() + task * d;
      for (int64_t block = start; block < stop; ++block) {
        const int64_t row = block * kRows, have = shape.have(block), m = shape.computed(block);
        const float* gates = kept + row * 2 * f;
        for (int64_t r = 0; r < m; ++r) swiglu(gates + r * 2 * f, gates + r * 2 * f + f, both + r * 2 * f, f);
        load(shape, block, above, d, dy_rows);
        transpose(dy_rows, m, d, d, turned, m);
        multiply<float>(d, f, m, turned, m, both, 2 * f, ddown, f, block > start);
        multiply<float>(m, f, d, dy_rows, d, w_down, f, both, 2 * f, false);
        for (int64_t r = 0; r < m; ++r)
          swiglu_backward(gates + r * 2 * f, gates + r * 2 * f + f, both + r * 2 * f, both + r * 2 * f + f, f);
        for (int64_t r = 0; r < have; ++r)
          rms_scale_row(from + (row + r) * d, w, scales[row + r], normed + r * d, d);
        std::fill(normed + have * d, normed + m * d, 0.f);
        transpose(normed, m, d, d, turned, m);
        multiply<float>(d, 2 * f, m, turned, m, both, 2 * f, dgate_up, 2 * f, block > start);
        multiply<float>(m, d, f, both, 2 * f, w_gate, d, dnormed, d, false);
        multiply<float>(m, d, f, both + f, 2 * f, w_up, d, dnormed, d, true);
        for (int64_t r = 0; r < have; ++r)
          rms_norm_backward_row(dnormed + r * d, from + (row + r) * d, w, scales[row + r], to + (row + r) * d, dnorm, d);
        if (residual) add(dy_rows, to + row * d, have * d);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {dx, sum_tasks(dnorms), sum_tasks(dgate_ups), sum_tasks(ddowns)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate, Tensor up, Tensor down, float eps, bool residual) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_swiglu_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor gate, Tensor up, Tensor down, "
      "Tensor products, Tensor scale, bool residual) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("norm_swiglu", &forward);
  m.impl("norm_swiglu_backward", &backward);
}

}  // namespace gr::norm_swiglu
