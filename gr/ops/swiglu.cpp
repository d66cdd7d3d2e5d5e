// y = silu(gate) * up, in one pass forward and one backward. All tensors are dense and of one shape.
#include "tile.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace gr::swiglu {
namespace {

constexpr int64_t kGrain = 4096;  // elements a task

#define GR_DISPATCH(type, name, ...)              \
  AT_DISPATCH_SWITCH(type, name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// Not inlined: within a parallel region the compiler does not vectorise these loops.
template <typename S>
[[gnu::noinline]] void forward(const S* __restrict gate, const S* __restrict up, S* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<S>(swiglu_of(static_cast<float>(gate[i]), static_cast<float>(up[i])));
}

template <typename S>
[[gnu::noinline]] void backward(const S* __restrict dy, const S* __restrict gate, const S* __restrict up, S* __restrict dgate,
              S* __restrict dup, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto [of_gate, of_up] =
        swiglu_gradients(static_cast<float>(dy[i]), static_cast<float>(gate[i]), static_cast<float>(up[i]));
    dgate[i] = static_cast<S>(of_gate);
    dup[i] = static_cast<S>(of_up);
  }
}

at::Tensor of(const at::Tensor& gate, const at::Tensor& up) {
  auto y = at::empty_like(gate);
  GR_DISPATCH(gate.scalar_type(), "swiglu", [&] {
    const scalar_t *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, gate.numel(), kGrain, [&](int64_t first, int64_t last) {
      forward(g + first, u + first, out + first, last - first);
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& dy, const at::Tensor& gate, const at::Tensor& up) {
  auto dgate = at::empty_like(gate), dup = at::empty_like(up);
  GR_DISPATCH(gate.scalar_type(), "swiglu_backward", [&] {
    const scalar_t *d = dy.const_data_ptr<scalar_t>(), *g = gate.const_data_ptr<scalar_t>();
    const scalar_t* u = up.const_data_ptr<scalar_t>();
    scalar_t *dg = dgate.mutable_data_ptr<scalar_t>(), *du = dup.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, gate.numel(), kGrain, [&](int64_t first, int64_t last) {
      backward(d + first, g + first, u + first, dg + first, du + first, last - first);
    });
  });
  return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("swiglu", &of);
  m.impl("swiglu_backward", &gradients);
}

}  // namespace gr::swiglu
