// The element-wise part of the right half of an HSTU layer, forward and backward: y = dropout([u, a, u norm(a)]), or of
// the last part alone. One pass over the rows; nothing is kept between the passes, the dropout mask is a hash.
#include "../hstu_attention/tile.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace gr {
namespace {

constexpr int64_t kRows = 64;  // of a task: the gradients of the norm are summed by task, then in the order of tasks

// The mask of gate.py: element c of row t is dropped if mix(mix(mix(t) ^ seed) + c step) < dropped.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

struct Gate {
  int64_t width, groups;
  float eps;
  bool silu, concat;
  double dropout;
  uint32_t seed;
  const float *weight, *bias;  // of the norm, or null
  int64_t part() const { return width / groups; }
  int64_t columns() const { return concat ? 3 * width : width; }
  // x <- x / (1 - dropout) or 0.
  void drop(int64_t row, float* __restrict x) const {
    if (dropout == 0) return;
    const uint32_t key = mix(mix(static_cast<uint32_t>(row)) ^ seed);
    const uint32_t dropped = static_cast<uint32_t>(std::llround(dropout * 4294967296.0));
    const float scale = static_cast<float>(1.0 / (1.0 - dropout));
    const int64_t n = columns();
    for (int64_t c = 0; c < n; ++c)
      x[c] = mix(key + static_cast<uint32_t>(c) * 0x9e3779b1u) >= dropped ? x[c] * scale : 0.f;
  }
};

// One row in float: u after its activation, the slope of that, a as (a - mean) / deviation, and 1 / deviation.
struct Row {
  float *u, *slope, *a, *hat, *y;
  float* rstd;
  Row(const Gate& gate, Scratch& scratch) {
    scratch.reset();
    u = scratch.take<float>(gate.width), slope = scratch.take<float>(gate.width), a = scratch.take<float>(gate.width);
    hat = scratch.take<float>(gate.width), y = scratch.take<float>(gate.columns());
    rstd = scratch.take<float>(gate.groups);
  }
};

template <typename S> void read(const S* in, float* __restrict out, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<float>(in[c]);
}

template <typename S> void prepare(const Gate& gate, const S* u, const S* a, const Row& row) {
  read(u, row.u, gate.width);
  read(a, row.a, gate.width);
  if (gate.silu) {
    for (int64_t c = 0; c < gate.width; ++c) {
      const float x = row.u[c], g = sigmoid(x), y = x * g;
      row.u[c] = y;
      row.slope[c] = g + y * (1.f - g);
    }
  }
  const int64_t part = gate.part();
  for (int64_t g = 0; g < gate.groups; ++g) {
    const float* __restrict x = row.a + g * part;
    float sum = 0.f, squares = 0.f;
    for (int64_t c = 0; c < part; ++c) sum += x[c];
    const float mean = sum / static_cast<float>(part);
    for (int64_t c = 0; c < part; ++c) squares += (x[c] - mean) * (x[c] - mean);
    const float rstd = 1.f / std::sqrt(squares / static_cast<float>(part) + gate.eps);
    for (int64_t c = 0; c < part; ++c) row.hat[g * part + c] = (x[c] - mean) * rstd;
    row.rstd[g] = rstd;
  }
}

inline float normed(const Gate& gate, const Row& row, int64_t c) {
  return gate.weight ? row.hat[c] * gate.weight[c] + gate.bias[c] : row.hat[c];
}

using Optional = std::optional<at::Tensor>;

Gate gate_of(const at::Tensor& u, const Optional& weight, const Optional& bias, int64_t groups, double eps, bool silu,
             bool concat, double dropout, int64_t seed) {
  return {u.size(1), groups, static_cast<float>(eps), silu, concat, dropout, static_cast<uint32_t>(seed),
          weight ? weight->const_data_ptr<float>() : nullptr, bias ? bias->const_data_ptr<float>() : nullptr};
}

at::Tensor forward(const at::Tensor& u, const at::Tensor& a, const Optional& weight, const Optional& bias,
                   int64_t groups, double eps, bool silu, bool concat, double dropout, int64_t seed) {
  const Gate gate = gate_of(u, weight, bias, groups, eps, silu, concat, dropout, seed);
  auto out = at::empty({u.size(0), gate.columns()}, u.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, u.scalar_type(), "gate", [&] {
    at::parallel_for(0, u.size(0), kRows, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      const Row row(gate, scratch);
      for (int64_t t = begin; t < end; ++t) {
        prepare(gate, u.const_data_ptr<scalar_t>() + t * u.stride(0), a.const_data_ptr<scalar_t>() + t * a.stride(0),
                row);
        float* __restrict last = row.y + gate.columns() - gate.width;
        for (int64_t c = 0; c < gate.width; ++c) last[c] = row.u[c] * normed(gate, row, c);
        if (gate.concat) {
          std::copy(row.u, row.u + gate.width, row.y);
          std::copy(row.a, row.a + gate.width, row.y + gate.width);
        }
        gate.drop(t, row.y);
        scalar_t* to = out.mutable_data_ptr<scalar_t>() + t * gate.columns();
        for (int64_t c = 0; c < gate.columns(); ++c) to[c] = static_cast<scalar_t>(row.y[c]);
      }
    });
  });
  return out;
}

// row.y holds the gradient of y. Leaves that of u in row.u and of a in row.a; adds those of the norm to sums [2, width].
void backward_row(const Gate& gate, const Row& row, float* __restrict sums) {
  const int64_t width = gate.width, part = gate.part();
  float* __restrict dlast = row.y + gate.columns() - width;
  for (int64_t c = 0; c < width; ++c) {
    const float dnormed = dlast[c] * row.u[c];
    float du = dlast[c] * normed(gate, row, c);
    if (gate.concat) du += row.y[c];
    row.u[c] = gate.silu ? du * row.slope[c] : du;
    if (gate.weight) {
      sums[c] += dnormed * row.hat[c];
      sums[width + c] += dnormed;
    }
    dlast[c] = gate.weight ? dnormed * gate.weight[c] : dnormed;
  }
  for (int64_t g = 0; g < gate.groups; ++g) {
    const float *__restrict d = dlast + g * part, *__restrict hat = row.hat + g * part;
    float sum = 0.f, along = 0.f;
    for (int64_t c = 0; c < part; ++c) sum += d[c], along += d[c] * hat[c];
    const float mean = sum / static_cast<float>(part), slope = along / static_cast<float>(part);
    for (int64_t c = 0; c < part; ++c) {
      const float da = row.rstd[g] * (d[c] - mean - hat[c] * slope);
      row.a[g * part + c] = gate.concat ? da + row.y[width + g * part + c] : da;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& u, const at::Tensor& a,
                                                        const Optional& weight, const Optional& bias, int64_t groups,
                                                        double eps, bool silu, bool concat, double dropout,
                                                        int64_t seed) {
  const Gate gate = gate_of(u, weight, bias, groups, eps, silu, concat, dropout, seed);
  auto du = at::empty(u.sizes(), u.options()), da = at::empty(u.sizes(), u.options());
  const int64_t tasks = (u.size(0) + kRows - 1) / kRows;
  auto sums = at::zeros({weight ? tasks : 0, 2, gate.width}, u.options().dtype(at::kFloat));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, u.scalar_type(), "gate_backward", [&] {
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      Scratch scratch;
      const Row row(gate, scratch);
      for (int64_t t = first * kRows; t < std::min(last * kRows, u.size(0)); ++t) {
        prepare(gate, u.const_data_ptr<scalar_t>() + t * u.stride(0), a.const_data_ptr<scalar_t>() + t * a.stride(0),
                row);
        read(dy.const_data_ptr<scalar_t>() + t * gate.columns(), row.y, gate.columns());
        gate.drop(t, row.y);
        backward_row(gate, row, weight ? sums.mutable_data_ptr<float>() + t / kRows * 2 * gate.width : nullptr);
        scalar_t* to_u = du.mutable_data_ptr<scalar_t>() + t * gate.width;
        scalar_t* to_a = da.mutable_data_ptr<scalar_t>() + t * gate.width;
        for (int64_t c = 0; c < gate.width; ++c) to_u[c] = static_cast<scalar_t>(row.u[c]);
        for (int64_t c = 0; c < gate.width; ++c) to_a[c] = static_cast<scalar_t>(row.a[c]);
      }
    });
  });
  return {du, da, sums.sum(0, false, at::kDouble)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "gate(Tensor u, Tensor a, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps, bool silu, bool concat, "
      "float dropout, int seed) -> Tensor");
  m.def(
      "gate_backward(Tensor grad, Tensor u, Tensor a, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps, "
      "bool silu, bool concat, float dropout, int seed) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("gate", &forward);
  m.impl("gate_backward", &backward);
}

}  // namespace gr
