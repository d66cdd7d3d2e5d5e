// Dot products of all pairs of an example's vectors, beside its dense vector: reference.py beside it is the definition.
//
// B examples, F vectors of tables and T of all, D their width. An example is copied to a tile of whole registers, of
// which products above the diagonal alone are taken. Examples are independent: the bits are the same on any number of
// threads.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tile.h"

namespace gr::dot_interaction {
namespace {

constexpr int64_t kVector = 8, kRows = 4, kExamplesPerTask = 16;
typedef float Vector __attribute__((vector_size(kVector * sizeof(float)), aligned(alignof(float))));

// c[kRows, V vectors] = a[kRows, depth] b[depth, V vectors]
template <int V>
void product(const float* a, int64_t ld_a, const float* b, int64_t ld_b, int64_t depth, float* c, int64_t ld_c) {
  Vector sum[kRows][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * ld_b + v * kVector);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * ld_a + k] * right[v];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(c + r * ld_c + v * kVector) = sum[r][v];
}

// The columns [first, last) of kRows rows of a product; both are multiples of kVector.
void rows_of_product(const float* a, int64_t ld_a, const float* b, int64_t ld_b, int64_t depth, float* c, int64_t ld_c,
                     int64_t first, int64_t last) {
  while (first < last) {
    const int64_t left = (last - first) / kVector, taken = left == 4 ? 2 : std::min<int64_t>(left, 3);
    const auto form = taken == 3 ? product<3> : taken == 2 ? product<2> : product<1>;
    form(a, ld_a, b + first, ld_b, depth, c + first, ld_c);
    first += taken * kVector;
  }
}

// The vectors of examples and their products, with the sizes that they are padded to.
struct Vectors {
  const float *dense, *tables;
  bool has_dense;
  int64_t B, F, D, diagonal, T, rows, width;
  Vectors(const std::optional<at::Tensor>& x, const at::Tensor& v, int64_t diagonal_)
      : dense(x ? x->const_data_ptr<float>() : nullptr), tables(v.const_data_ptr<float>()), has_dense(x), B(v.size(0)), F(v.size(1)),
        D(v.size(2)), diagonal(diagonal_), T(F + (x ? 1 : 0)), rows(round_up(T, kVector)), width(round_up(D, kVector)) {
    TORCH_CHECK_VALUE(v.is_contiguous() && (!x || (x->is_contiguous() && x->dim() == 2 && x->size(0) == B && x->size(1) == D)),
                      "the vectors must be contiguous, and the dense ones [", B, ", ", D, "]");
  }
  int64_t first_pair() const { return has_dense ? D : 0; }
  int64_t columns() const { return first_pair() + T * (T + 1) / 2 - T * diagonal; }
  // Copies an example to a tile [rows, width]; its padding stays as it is.
  void load(int64_t b, float* tile) const {
    if (has_dense) std::memcpy(tile, dense + b * D, D * sizeof(float));
    for (int64_t f = 0; f < F; ++f)
      std::memcpy(tile + (T - F + f) * width, tables + (b * F + f) * D, D * sizeof(float));
  }
};

at::Tensor dot_interaction(const std::optional<at::Tensor>& x, const at::Tensor& v, int64_t diagonal) {
  const Vectors in(x, v, diagonal);
  const at::Tensor out = at::empty({in.B, in.columns()}, v.options());
  float* result = out.mutable_data_ptr<float>();
  at::parallel_for(0, in.B, kExamplesPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(in.rows * in.width), across(in.rows * in.width), products(in.rows * in.rows);
    for (int64_t b = begin; b < end; ++b) {
      float* to = result + b * in.columns();
      in.load(b, tile.data());
      if (in.has_dense) std::memcpy(to, tile.data(), in.D * sizeof(float));
      to += in.first_pair();
      transpose(tile.data(), in.rows, in.width, in.width, across.data(), in.rows);
      for (int64_t i = 0; i < in.T; i += kRows)
        rows_of_product(tile.data() + i * in.width, in.width, across.data(), in.rows, in.D, products.data() + i * in.rows,
                        in.rows, i / kVector * kVector, in.rows);
      for (int64_t i = 0; i < in.T; ++i)
        for (int64_t j = i + in.diagonal; j < in.T; ++j) *to++ = products[i * in.rows + j];
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> dot_interaction_backward(const at::Tensor& gradient, const std::optional<at::Tensor>& x,
                                                            const at::Tensor& v, int64_t diagonal) {
  const Vectors in(x, v, diagonal);
  TORCH_CHECK_VALUE(gradient.is_contiguous() && gradient.numel() == in.B * in.columns(), "the gradient must be contiguous, ",
                    in.B, " x ", in.columns());
  const at::Tensor dx = x ? at::empty_like(*x) : at::empty({0}, v.options()), dv = at::empty_like(v);
  const float* g = gradient.const_data_ptr<float>();
  float *to_dense = dx.mutable_data_ptr<float>(), *to_tables = dv.mutable_data_ptr<float>();
  at::parallel_for(0, in.B, kExamplesPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(in.rows * in.width), pairs(in.rows * in.rows), result(in.rows * in.width);
    for (int64_t b = begin; b < end; ++b) {
      const float* of_pair = g + b * in.columns() + in.first_pair();
      in.load(b, tile.data());
      for (int64_t i = 0; i < in.T; ++i) {
        if (!in.diagonal) pairs[i * in.rows + i] = 2 * *of_pair++;
        for (int64_t j = i + 1; j < in.T; ++j) pairs[i * in.rows + j] = pairs[j * in.rows + i] = *of_pair++;
      }
      for (int64_t i = 0; i < in.T; i += kRows)
        rows_of_product(pairs.data() + i * in.rows, in.rows, tile.data(), in.width, in.T, result.data() + i * in.width,
                        in.width, 0, in.width);
      if (in.has_dense) {
        const float* passed = g + b * in.columns();
        for (int64_t d = 0; d < in.D; ++d) to_dense[b * in.D + d] = passed[d] + result[d];
      }
      for (int64_t f = 0; f < in.F; ++f)
        std::memcpy(to_tables + (b * in.F + f) * in.D, result.data() + (in.T - in.F + f) * in.width, in.D * sizeof(float));
    }
  });
  return {dx, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("dot_interaction(Tensor? x, Tensor v, int diagonal) -> Tensor");
  m.def("dot_interaction_backward(Tensor gradient, Tensor? x, Tensor v, int diagonal) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("dot_interaction", &dot_interaction);
  m.impl("dot_interaction_backward", &dot_interaction_backward);
}

}  // namespace gr::dot_interaction
