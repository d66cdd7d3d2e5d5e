// The element-wise part of the right half of an HSTU layer, forward and backward: y = dropout([u, a, u norm(a)]), or
// dropout(u norm(a)) without concat. One pass over the rows; nothing is kept between the passes, since the dropout mask
// is a hash.
#include "../dropout.h"
#include "../tile.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <type_traits>

namespace gr::norm_mul_dropout {
namespace {

constexpr int64_t kAhead = 8;  // rows between a prefetch and its use
constexpr int64_t kRows = 64;  // rows a task: the gradients of the norm are summed by task, then in the order of tasks

struct Gate {
  int64_t width, groups;
  float eps;
  bool silu, concat;
  double dropout;
  uint32_t seed;
  const float *weight, *bias;  // of the norm, or null
  int64_t padded() const { return round_up(width, kLanes); }
  int64_t part() const { return width / groups; }
  // Elements to walk for a group: whole vectors where there is one group, whose padding is zero.
  int64_t walked() const { return groups == 1 ? padded() : part(); }
  int64_t columns() const { return concat ? 3 * width : width; }
  // Whether whole vectors that begin at the last part of a row would go beyond the end of this and the rows after it.
  bool at_end(int64_t rows, int64_t row_columns) const { return rows * row_columns < row_columns - width + padded(); }
  // x <- x / (1 - dropout) or 0, for the columns [first, first + width) of a row.
  void drop(int64_t row, int64_t first, float* __restrict x) const {
    if (dropout == 0) return;
    const DropoutMask mask(dropout, seed);
    const uint32_t key = mask.key(row);
    const int64_t n = padded();
    for (int64_t c = 0; c < n; ++c) x[c] = mask.kept(key, first + c) ? x[c] * mask.scale : 0.f;
  }
};

// One row in float, in buffers of whole vectors: u after its activation, the derivative of that activation, a,
// hat = (a - mean) / deviation, the affine map of the norm (one and zero without one), the last part of y, what is left
// of a part of y by dropout, the gradient of the three parts of y, one for each element and zero for padding, and
// 1 / deviation of each group.
struct Row {
  float *u, *slope, *a, *hat, *weight, *bias, *gated, *dropped, *dy[3], *real, *rstd;
  Row(const Gate& gate, Scratch& scratch) {
    scratch.reset();
    for (float** buffer : {&u, &slope, &a, &hat, &weight, &bias, &gated, &dropped, &dy[0], &dy[1], &dy[2], &real}) {
      *buffer = scratch.take<float>(gate.padded());
      std::fill(*buffer, *buffer + gate.padded(), 0.f);
    }
    rstd = scratch.take<float>(gate.groups);
    std::fill(slope, slope + gate.padded(), 1.f);
    std::fill(weight, weight + gate.width, 1.f);
    std::fill(real, real + gate.width, 1.f);
    if (gate.weight) {
      std::copy(gate.weight, gate.weight + gate.width, weight);
      std::copy(gate.bias, gate.bias + gate.width, bias);
    }
  }
};

// A row is read and written in whole vectors, since a vector that is loaded after its last elements were stored one by
// one waits for them. What lies behind the row is masked away when read; when written, the next rows are yet to come.
// Where a vector would leave the tensor (read) or the rows of the task (written), a row is read or written to its own
// end: `exact`. With rows of less than half a vector that is more than the last one.
template <typename S> void read(const S* __restrict in, const Row& row, float* __restrict out, const Gate& gate,
                                bool exact) {
  const int64_t n = gate.padded() / kLanes * kLanes;
  if (exact || !std::is_same_v<S, float>) {
    for (int64_t c = 0; c < gate.width; ++c) out[c] = static_cast<float>(in[c]);
    std::fill(out + gate.width, out + n, 0.f);
    return;
  }
  const float* __restrict real = row.real;
  for (int64_t c = 0; c < n; ++c) out[c] = real[c] != 0.f ? static_cast<float>(in[c]) : 0.f;
}

template <typename S> void write(const float* __restrict in, S* __restrict out, const Gate& gate, bool exact) {
  const int64_t n = exact || !std::is_same_v<S, float> ? gate.width : gate.padded() / kLanes * kLanes;
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<S>(in[c]);
}

inline void activate_row(float* __restrict u, float* __restrict slope, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const float x = u[c], g = sigmoid(x), y = x * g;
    u[c] = y;
    slope[c] = g + y * (1.f - g);
  }
}

// hat <- (x - mean) / deviation of `count` elements, of n with the padding; returns 1 / deviation.
inline float normalise(const float* __restrict x, const float* __restrict real, float* __restrict hat, int64_t count,
                       int64_t n, float eps) {
  float sum = 0.f, squares = 0.f;
  for (int64_t c = 0; c < n; ++c) sum += x[c];
  const float mean = sum / static_cast<float>(count);
  for (int64_t c = 0; c < n; ++c) {
    hat[c] = (x[c] - mean) * real[c];
    squares += hat[c] * hat[c];
  }
  const float rstd = 1.f / std::sqrt(squares / static_cast<float>(count) + eps);
  for (int64_t c = 0; c < n; ++c) hat[c] *= rstd;
  return rstd;
}

template <typename S> void prepare(const Gate& gate, const S* u, const S* a, int64_t ahead, const Row& row, bool exact) {
  // Rows of u lie apart, in one buffer with v, q and k, which the processor's own prefetching does not follow.
  for (int64_t c = 0; c < gate.width; c += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(u + ahead + c);
  read(u, row, row.u, gate, exact);
  read(a, row, row.a, gate, exact);
  if (gate.silu) activate_row(row.u, row.slope, gate.padded());
  const int64_t part = gate.part();
  for (int64_t g = 0; g < gate.groups; ++g) {
    const int64_t at = g * part;
    row.rstd[g] = normalise(row.a + at, row.real + at, row.hat + at, part, gate.walked(), gate.eps);
  }
}

// gated <- u (hat weight + bias)
inline void gate_row(const Row& row, int64_t n) {
  const float *__restrict u = row.u, *__restrict hat = row.hat, *__restrict w = row.weight, *__restrict b = row.bias;
  float* __restrict gated = row.gated;
  for (int64_t c = 0; c < n; ++c) gated[c] = u[c] * (hat[c] * w[c] + b[c]);
}

// Writes y of row t, whose u, a and hat are prepared: dropout([u, a, gated]) or dropout(gated).
template <typename S> void write_y(const Gate& gate, const Row& row, int64_t t, bool exact, S* to) {
  gate_row(row, gate.padded());
  const float* parts[3] = {row.u, row.a, row.gated};
  for (int64_t p = gate.concat ? 0 : 2; p < 3; ++p) {
    const int64_t first = gate.concat ? p * gate.width : 0;
    std::copy(parts[p], parts[p] + gate.padded(), row.dropped);
    gate.drop(t, first, row.dropped);
    write(row.dropped, to + first, gate, exact);
  }
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
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, u.scalar_type(), "norm_mul_dropout", [&] {
    at::parallel_for(0, u.size(0), kRows, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      const Row row(gate, scratch);
      for (int64_t t = begin; t < end; ++t) {
        prepare(gate, u.const_data_ptr<scalar_t>() + t * u.stride(0), a.const_data_ptr<scalar_t>() + t * a.stride(0),
                kAhead * u.stride(0), row, gate.at_end(u.size(0) - t, gate.width));
        write_y(gate, row, t, gate.at_end(end - t, gate.columns()),
                out.mutable_data_ptr<scalar_t>() + t * gate.columns());
      }
    });
  });
  return out;
}

// row.dy holds the gradient of y; its first two parts are zero without concat. Leaves the gradient of u in row.u and
// that of a in row.a; adds the gradients of the norm's weight and bias to sums [2, width], unless it is null.
void backward_row(const Gate& gate, const Row& row, float* __restrict sums) {
  const int64_t n = gate.padded(), part = gate.part(), walked = gate.walked();
  float *__restrict u = row.u, *__restrict dlast = row.dy[2];
  const float *__restrict hat = row.hat, *__restrict w = row.weight, *__restrict b = row.bias;
  const float *__restrict du = row.dy[0], *__restrict slope = row.slope;
  if (sums) {
    float *__restrict dweight = sums, *__restrict dbias = sums + gate.width;
    for (int64_t c = 0; c < gate.width; ++c) dweight[c] += dlast[c] * u[c] * hat[c];
    for (int64_t c = 0; c < gate.width; ++c) dbias[c] += dlast[c] * u[c];
  }
  for (int64_t c = 0; c < n; ++c) {
    const float dnormed = dlast[c] * u[c];
    u[c] = (du[c] + dlast[c] * (hat[c] * w[c] + b[c])) * slope[c];
    dlast[c] = dnormed * w[c];
  }
  for (int64_t g = 0; g < gate.groups; ++g) {
    const float *__restrict d = row.dy[2] + g * part, *__restrict x = row.hat + g * part;
    const float* __restrict direct = row.dy[1] + g * part;
    float *__restrict da = row.a + g * part, sum = 0.f, along = 0.f;
    for (int64_t c = 0; c < walked; ++c) sum += d[c], along += d[c] * x[c];
    const float mean = sum / static_cast<float>(part), rate = along / static_cast<float>(part), rstd = row.rstd[g];
    for (int64_t c = 0; c < walked; ++c) da[c] = direct[c] + rstd * (d[c] - mean - x[c] * rate);
  }
}

// y again, for the gradient of what projects it, and the gradients of u, a and [2, width] of the norm.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& u,
                                                                    const at::Tensor& a, const Optional& weight,
                                                                    const Optional& bias, int64_t groups, double eps,
                                                                    bool silu, bool concat, double dropout,
                                                                    int64_t seed) {
  const Gate gate = gate_of(u, weight, bias, groups, eps, silu, concat, dropout, seed);
  auto y = at::empty(dy.sizes(), u.options());
  auto du = at::empty(u.sizes(), u.options()), da = at::empty(u.sizes(), u.options());
  const int64_t tasks = (u.size(0) + kRows - 1) / kRows;
  auto sums = at::zeros({weight ? tasks : 0, 2, gate.width}, u.options().dtype(at::kFloat));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, u.scalar_type(), "norm_mul_dropout_backward", [&] {
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      Scratch scratch;
      const Row row(gate, scratch);
      const int64_t end = std::min(last * kRows, u.size(0));
      for (int64_t t = first * kRows; t < end; ++t) {
        const bool exact = gate.at_end(end - t, gate.width);
        const bool last_of_dy = gate.at_end(u.size(0) - t, gate.columns());
        prepare(gate, u.const_data_ptr<scalar_t>() + t * u.stride(0), a.const_data_ptr<scalar_t>() + t * a.stride(0),
                kAhead * u.stride(0), row, gate.at_end(u.size(0) - t, gate.width));
        write_y(gate, row, t, gate.at_end(end - t, gate.columns()),
                y.mutable_data_ptr<scalar_t>() + t * gate.columns());
        const scalar_t* from = dy.const_data_ptr<scalar_t>() + t * gate.columns();
        for (int64_t p = gate.concat ? 0 : 2; p < 3; ++p) {
          const int64_t first = gate.concat ? p * gate.width : 0;
          read(from + first, row, row.dy[p], gate, last_of_dy);
          gate.drop(t, first, row.dy[p]);
        }
        backward_row(gate, row, weight ? sums.mutable_data_ptr<float>() + t / kRows * 2 * gate.width : nullptr);
        write(row.u, du.mutable_data_ptr<scalar_t>() + t * gate.width, gate, exact);
        write(row.a, da.mutable_data_ptr<scalar_t>() + t * gate.width, gate, exact);
      }
    });
  });
  return {y, du, da, sums.sum(0, false, at::kDouble)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def(
      "norm_mul_dropout(Tensor u, Tensor a, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps, bool silu, "
      "bool concat, float dropout, int seed) -> Tensor");
  m.def(
      "norm_mul_dropout_backward(Tensor grad, Tensor u, Tensor a, Tensor? norm_weight, Tensor? norm_bias, int groups, "
      "float eps, bool silu, bool concat, float dropout, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("norm_mul_dropout", &forward);
  m.impl("norm_mul_dropout_backward", &backward);
}

}  // namespace gr::norm_mul_dropout
