// Tiles in memory: the operand layouts of ATen's brgemm, the sigmoid and SwiGLU, and scratch memory.
//
// S is the element type of q, k and v (float or bfloat16); scores and sums are float. No instruction set appears here:
// brgemm picks AVX2, AVX-512 or AMX at run time, and the loops below are written so that the compiler vectorises them.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace gr {

constexpr int64_t kTile = 64;   // rows and columns of one tile of the score matrix
constexpr int64_t kEdge = 16;   // the last tile of a sequence is cut to a multiple of this: few shapes, little waste
constexpr int64_t kLanes = 16;  // floats in a vector where the compiler cannot prove independence by itself

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename S> constexpr bool kPaired = sizeof(S) == 2;  // bfloat16 B operands interleave two rows (VNNI)

// The layout of a head width in tiles. bfloat16 products are padded with zeros, since they contract pairs.
template <typename S> struct Width {
  int64_t real, used, ld;
  explicit Width(int64_t d) : real(d), used(kPaired<S> ? round_up(d, kEdge) : d), ld(round_up(d, kEdge)) {}
};

// Memory that one thread keeps from task to task. take() in the same order after each reset() gives the same buffers.
class Scratch {
 public:
  void reset() { next_ = 0; }
  template <typename S> S* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    if (next_ == slots_.size()) slots_.emplace_back();
    Slot& slot = slots_[next_++];
    if (slot.bytes < bytes) {
      slot.data.reset(static_cast<std::byte*>(::operator new(bytes, kAlign)));
      slot.bytes = bytes;
    }
    return reinterpret_cast<S*>(slot.data.get());
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlign); }
  };
  struct Slot {
    std::unique_ptr<std::byte, Free> data;
    size_t bytes = 0;
  };
  std::vector<Slot> slots_;
  size_t next_ = 0;
};

// c[m, n] (+)= a[m, k] b[k, n]; a is row major, b comes from pack() or pack_transposed().
template <typename S>
void multiply(int64_t m, int64_t n, int64_t k, const S* a, int64_t lda, const S* b, int64_t ldb, float* c, int64_t ldc,
              bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kPaired<S>);
}

// The rows of one (sequence, head) in a strided tensor; row r is data[r * stride .. + width).
template <typename S> struct Rows {
  const S* data;
  int64_t stride, count;
  const S* row(int64_t r) const { return data + r * stride; }
  // Copies rows [first, first + kTile) to out [kTile, width.ld]; rows past the end and padding columns become zero.
  void load(int64_t first, const Width<S>& width, S* out) const {
    const int64_t have = std::min(kTile, count - first);
    if (have < kTile || width.real < width.ld) std::memset(static_cast<void*>(out), 0, kTile * width.ld * sizeof(S));
    for (int64_t r = 0; r < have; ++r)
      std::memcpy(static_cast<void*>(out + r * width.ld), data + (first + r) * stride, width.real * sizeof(S));
  }
};

// out[c * ld_out + r] = in[r * ld_in + c], in 8 x 8 blocks that stay in registers. Rounds rows and cols up to whole
// blocks: tiles have room for them.
template <typename W>
void transpose(const W* __restrict in, int64_t rows, int64_t cols, int64_t ld_in, W* __restrict out, int64_t ld_out) {
  constexpr int64_t kBlock = 8;
  typedef W Vector __attribute__((vector_size(kBlock * sizeof(W)), aligned(alignof(W))));
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t c = 0; c < cols; c += kBlock) {
      Vector x[kBlock], y[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) x[i] = *reinterpret_cast<const Vector*>(in + (r + i) * ld_in + c);
      // Three rounds of interleaving row i with row i + 4 transpose the block.
      for (int round = 0; round < 3; ++round) {
        for (int64_t i = 0; i < kBlock / 2; ++i) {
          y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
          y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        std::copy(y, y + kBlock, x);
      }
      for (int64_t i = 0; i < kBlock; ++i) *reinterpret_cast<Vector*>(out + (c + i) * ld_out + r) = x[i];
    }
}
inline void transpose(const at::BFloat16* in, int64_t rows, int64_t cols, int64_t ld_in, at::BFloat16* out,
                      int64_t ld_out) {
  transpose(reinterpret_cast<const uint16_t*>(in), rows, cols, ld_in, reinterpret_cast<uint16_t*>(out), ld_out);
}

// The B operand [rows, cols] of a product that contracts over the rows of `in`.
template <typename S> void pack(const S* in, int64_t rows, int64_t cols, int64_t ld, S* out) {
  if constexpr (kPaired<S>) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t c = 0; c < cols; ++c) {
        out[r * ld + 2 * c] = in[r * ld + c];
        out[r * ld + 2 * c + 1] = in[(r + 1) * ld + c];
      }
  } else {
    std::memcpy(static_cast<void*>(out), in, rows * ld * sizeof(S));
  }
}

// The B operand [width.used, kTile] of a product that contracts over the columns of `in` [kTile, width.ld].
// One float or one pair of bfloat16 moves at a time.
template <typename S> void pack_transposed(const S* in, const Width<S>& width, S* out) {
  constexpr int64_t per_word = kPaired<S> ? 2 : 1;
  transpose(reinterpret_cast<const uint32_t*>(in), kTile, width.used / per_word, width.ld / per_word,
            reinterpret_cast<uint32_t*>(out), kTile);
}

// Rounds to the nearest, ties to even.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void cast(const float* in, float* out, int64_t n) { std::memcpy(out, in, n * sizeof(float)); }
inline void cast(const float* in, at::BFloat16* out, int64_t n) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; ++i) bits[i] = bfloat16_bits(in[i]);
}

// 1 / d for 1 <= d <= 2^101: a linear guess in the exponent and mantissa bits (12 %), then three Newton steps (1e-7).
// Vector division has a quarter of the throughput of these seven multiplies and adds.
inline float reciprocal(float d) {
  float r = std::bit_cast<float>(0x7ef311c7 - std::bit_cast<int32_t>(d));
  r += r * (1.f - d * r);
  r += r * (1.f - d * r);
  return r + r * (1.f - d * r);
}

// 2^t for t cut to [-100, 100]: t = n + f with |f| <= 1/2, and 2^f by its degree-5 Chebyshev interpolant (1e-7).
inline float power_of_two(float t) {
  t = std::min(std::max(t, -100.f), 100.f);
  const float n = std::nearbyint(t), f = t - n;
  const float p =
      1.00000008f +
      f * (0.693147188f + f * (0.240221075f + f * (0.0555035711f + f * (0.00967603192f + f * 0.00133908634f))));
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

constexpr float kLog2E = 1.44269504f;

// 1 / (1 + exp(-x))
inline float sigmoid(float x) { return reciprocal(1.f + power_of_two(x * -kLog2E)); }

// SwiGLU of one element, and its gradients of gate and up.
inline float swiglu_of(float gate, float up) { return gate * sigmoid(gate) * up; }
inline std::pair<float, float> swiglu_gradients(float grad, float gate, float up) {
  const float g = sigmoid(gate), y = gate * g;
  return {grad * up * (g + y * (1.f - g)), grad * y};
}

inline void add(const float* __restrict x, float* __restrict sum, int64_t n) {
  for (int64_t c = 0; c < n; ++c) sum[c] += x[c];
}

}  // namespace gr
