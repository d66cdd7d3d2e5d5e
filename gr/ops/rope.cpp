// Rotary positions: each pair of columns (c, c + Q/2) of a head turned by its token's angle, or back by it.
#include "tile.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace gr::rope {
namespace {

constexpr int64_t kRows = 64;  // tokens a task

// One head of a token. sign: 1 to turn, -1 to turn back.
inline void turn(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
                 float* __restrict y, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float real = x[i], imaginary = x[half + i], s = sign * sin[i];
    y[i] = real * cos[i] - imaginary * s;
    y[half + i] = imaginary * cos[i] + real * s;
  }
}

// x [T, H, Q], whose heads are dense and whose tokens may be apart: a part of wider rows. cos, sin [T, 1, Q/2].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2, stride = x.stride(0);
  auto out = at::empty(x.sizes(), x.options());
  const float *from = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, kRows, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < heads; ++h)
        turn(from + t * stride + 2 * h * half, c + t * half, s + t * half, back ? -1.f : 1.f,
             to + 2 * (t * heads + h) * half, half);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) { m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor"); }
TORCH_LIBRARY_IMPL(gr, CPU, m) { m.impl("rotate", &rotate); }

}  // namespace gr::rope
