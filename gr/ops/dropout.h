// The dropout mask of the C++ operators: a hash of a seed, a row and a column, so that nothing is kept for the backward
// pass. Element c of row t is dropped if mix(mix(mix(t) ^ seed) + c step) < dropped (norm_mul_dropout/reference.py).
#pragma once

#include <cmath>
#include <cstdint>

namespace gr {

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

struct DropoutMask {
  uint32_t seed, dropped;
  float scale;  // of what is kept
  DropoutMask(double probability, int64_t drawn)
      : seed(static_cast<uint32_t>(drawn)), dropped(static_cast<uint32_t>(std::llround(probability * 4294967296.0))),
        scale(static_cast<float>(1.0 / (1.0 - probability))) {}
  uint32_t key(int64_t row) const { return mix(mix(static_cast<uint32_t>(row)) ^ seed); }
  bool kept(uint32_t key, int64_t column) const {
    return mix(key + static_cast<uint32_t>(column) * 0x9e3779b1u) >= dropped;
  }
};

}  // namespace gr
