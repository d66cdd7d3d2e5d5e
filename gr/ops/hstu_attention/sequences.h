// The sequences of an attention call, what their tokens see, and the tasks that they make. Shared with softmax attention.
#pragma once

#include "scores.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <numeric>
#include <optional>

namespace gr {

// References to the arguments of a call, which the Python caller has checked.
struct Sequences {
  const at::Tensor& offsets;
  const std::optional<at::Tensor>& num_targets;
  int64_t max_attn_len, contextual_len, min_full_attn_seq_len;
  int64_t count() const { return offsets.numel() - 1; }
  int64_t first(int64_t b) const { return offsets.const_data_ptr<int64_t>()[b]; }
  int64_t length(int64_t b) const { return first(b + 1) - first(b); }
  bool masked() const { return num_targets || max_attn_len > 0 || contextual_len > 0; }
  template <typename M> M mask(int64_t b) const {
    if constexpr (M::kCausal) {
      return {};
    } else {
      const int64_t tokens = length(b), targets = num_targets ? num_targets->const_data_ptr<int64_t>()[b] : 0;
      const int64_t window = max_attn_len > 0 ? max_attn_len : tokens;
      // The contextual prefix of an empty sequence is empty.
      return {tokens - targets, std::min(contextual_len, tokens), window, min_full_attn_seq_len};
    }
  }
};

template <typename S> Rows<S> rows_of(const at::Tensor& x, int64_t first, int64_t count, int64_t head) {
  return {x.const_data_ptr<S>() + first * x.stride(0) + head * x.stride(1), x.stride(0), count};
}
template <typename S> S* row_in(at::Tensor& x, int64_t first, int64_t head) {
  return x.mutable_data_ptr<S>() + first * x.stride(0) + head * x.stride(1);
}

// Writes columns [0, rows) of the transposed tile x_t [width, kTile] as rows of the output.
template <typename S>
void store_transposed(const float* x_t, int64_t rows, const Width<S>& width, float* turned, S* out, int64_t stride) {
  transpose(x_t, width.real, kTile, kTile, turned, width.ld);
  for (int64_t r = 0; r < rows; ++r) cast(turned + r * width.ld, out + r * stride, width.real);
}

inline void scale(float* x, int64_t count, float by) {
  for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

// Calls task(sequence, head, scratch) for every sequence that is not empty and each of `heads`, longest first, on all
// threads.
template <typename F> void for_each_task(const Sequences& sequences, int64_t heads, F task) {
  std::vector<int64_t> order(sequences.count());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return sequences.length(x) > sequences.length(y); });
  const int64_t tasks = sequences.count() * heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t t = next++; t < tasks; t = next++)
      if (const int64_t b = order[t / heads]; sequences.length(b) > 0) task(b, t % heads, scratch);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace gr
