// RMSNorm of one row of n floats, y = x scale weight with scale = 1 / sqrt(mean(x^2) + eps), and its gradients.
#pragma once

#include <cmath>
#include <cstdint>

namespace gr {

inline void rms_scale_row(const float* __restrict x, const float* __restrict weight, float scale, float* __restrict y,
                          int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] = x[c] * scale * weight[c];
}

// Returns scale.
inline float rms_norm_row(const float* __restrict x, const float* __restrict weight, float* __restrict y, int64_t n,
                          float eps) {
  float squares = 0.f;
  for (int64_t c = 0; c < n; ++c) squares += x[c] * x[c];
  const float scale = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
  rms_scale_row(x, weight, scale, y, n);
  return scale;
}

// Adds the gradient of the weight to dweight.
inline void rms_norm_backward_row(const float* __restrict dy, const float* __restrict x, const float* __restrict weight,
                                  float scale, float* __restrict dx, float* __restrict dweight, int64_t n) {
  float along = 0.f;
  for (int64_t c = 0; c < n; ++c) along += dy[c] * weight[c] * x[c];
  const float back = along * scale * scale / static_cast<float>(n);
  for (int64_t c = 0; c < n; ++c) {
    dweight[c] += dy[c] * x[c] * scale;
    dx[c] = scale * (dy[c] * weight[c] - x[c] * back);
  }
}

}  // namespace gr
