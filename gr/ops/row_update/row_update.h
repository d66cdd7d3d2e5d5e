// An optimizer's update of the rows that a batch looked up, in place: reference.py beside it is the definition.
//
// Each row is one piece of work, summed in the order of the batch, so results are the same bits on any number of
// threads. The gradients of a row are summed in float64, the update is in float32 (float64 for a table of it).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

namespace gr::row_update {

enum Rule : int64_t { kSgd, kRowwiseAdagrad, kAdagrad, kAdam, kRowwiseAdamW };
constexpr int64_t kRowsPerTask = 128, kAhead = 4, kIdsAhead = 8;

struct Numbers {
  double lr, eps, beta1, beta2, weight_decay, steps;
  explicit Numbers(at::ArrayRef<double> n) : lr(n[0]), eps(n[1]), beta1(n[2]), beta2(n[3]), weight_decay(n[4]), steps(n[5]) {}
};

// The draws of stochastic rounding, as rounding.py defines them; `on` is false for nearest rounding.
struct Draws {
  bool on = false;
  uint64_t start = 0, row = 0, column = 0, columns = 0;
  uint32_t noise(uint64_t shard_row, uint64_t shard_column) const {
    uint64_t x = (shard_row + row) * columns + column + shard_column + start + 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
  }
};

// As rounding.py: x up or down to a neighbour in W, by `noise`.
template <typename W> W round_stochastic(float x, uint32_t noise) {
  constexpr int kCut = std::is_same_v<W, c10::Half> ? 13 : 16, kLeast = std::is_same_v<W, c10::Half> ? 113 : 1;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int exponent = bits >> 23 & 0xFF;
  if (exponent == 0xFF) return static_cast<W>(x);
  const int cut = kCut + std::max(kLeast - exponent, 0);
  if (cut > 23) {
    const double least = std::ldexp(1.0, kLeast - 127 + kCut - 23);
    const bool up = noise * 0x1p-32 < std::abs(static_cast<double>(x)) / least;
    return static_cast<W>(std::copysign(up ? static_cast<float>(least) : 0.0f, x));
  }
  const uint32_t mask = (uint32_t{1} << cut) - 1;
  return static_cast<W>(std::bit_cast<float>((bits + (noise & mask)) & ~mask));
}

// One row of D columns. A: the type of the arithmetic and of the states. first, second: as in RULES of native.py.
template <Rule kRule, typename A>
void step(A* __restrict weight, const A* __restrict g, A* __restrict first, A* __restrict second, int64_t D, const Numbers& n) {
  const A lr = n.lr, eps = n.eps;
  if constexpr (kRule == kSgd) {
    for (int64_t d = 0; d < D; ++d) weight[d] -= lr * g[d];
    return;
  }
  A square = 0;
  if constexpr (kRule == kRowwiseAdagrad || kRule == kRowwiseAdamW) {
    for (int64_t d = 0; d < D; ++d) square += g[d] * g[d];
    square /= D;
  }
  if constexpr (kRule == kRowwiseAdagrad) {
    *first += square;
    const A rate = lr / (std::sqrt(*first) + eps);
    for (int64_t d = 0; d < D; ++d) weight[d] -= rate * g[d];
  } else if constexpr (kRule == kAdagrad) {
    for (int64_t d = 0; d < D; ++d) {
      first[d] += g[d] * g[d];
      weight[d] -= lr * g[d] / (std::sqrt(first[d]) + eps);
    }
  } else {
    const A keep = n.beta2, fresh1 = 1 - n.beta1, fresh2 = 1 - n.beta2;
    const A rate = n.lr / (1 - std::pow(n.beta1, n.steps)), correction = 1 / (1 - std::pow(n.beta2, n.steps));
    const A shrink = 1 - n.lr * n.weight_decay;
    if constexpr (kRule == kRowwiseAdamW) *second = keep * *second + fresh2 * square;
    const A of_row = kRule == kRowwiseAdamW ? rate / (std::sqrt(*second * correction) + eps) : A(0);
    for (int64_t d = 0; d < D; ++d) {
      first[d] += fresh1 * (g[d] - first[d]);
      if constexpr (kRule == kAdam) {
        second[d] = keep * second[d] + fresh2 * g[d] * g[d];
        weight[d] = weight[d] * shrink - rate * first[d] / (std::sqrt(second[d] * correction) + eps);
      } else {
        weight[d] = weight[d] * shrink - of_row * first[d];
      }
    }
  }
}

template <typename A> struct State {
  A* data = nullptr;
  int64_t width = 0;
  A* row(int64_t r) const { return data + r * width; }
};

template <typename A> State<A> state_of(at::TensorList states, size_t index) {
  if (index >= states.size()) return {};
  const at::Tensor& state = states[index];
  return {state.mutable_data_ptr<A>(), state.dim() == 2 ? state.size(1) : 1};
}

// kWrite: 1 for what will be written, 0 for what is only read.
template <int kWrite, typename T> void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, kWrite);
}

template <typename A> void add(double* __restrict sum, const A* __restrict from, int64_t D) {
  for (int64_t d = 0; d < D; ++d) sum[d] += from[d];
}

// The `count` ids of a batch in rising order. The gradient of ids[i] begins at gradient.data[place[i] * stride].
struct Batch {
  const at::Tensor &weight, &gradient;
  at::TensorList states;
  const int64_t *ids, *place;
  int64_t count, stride;
  std::vector<int64_t> starts;  // of the runs of equal ids, and their end
};

template <Rule kRule, typename W, typename A> void update(const Batch& batch, const Numbers& numbers, const Draws& draws) {
  const int64_t count = batch.count, D = batch.weight.size(1), rows = static_cast<int64_t>(batch.starts.size()) - 1;
  const int64_t *ids = batch.ids, *place = batch.place, stride = batch.stride;
  W* weights = batch.weight.mutable_data_ptr<W>();
  const A* gradients = batch.gradient.const_data_ptr<A>();
  const State<A> first = state_of<A>(batch.states, 0), second = state_of<A>(batch.states, 1);
  at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(D);
    std::vector<A> g(D), wide(D);
    for (int64_t r = begin; r < end; ++r) {
      if (r + kAhead < end) {
        const int64_t ahead = batch.starts[r + kAhead], next = ids[ahead];
        prefetch<0>(gradients + place[ahead] * stride, D);
        prefetch<1>(weights + next * D, D);
        prefetch<1>(first.row(next), first.width);
        prefetch<1>(second.row(next), second.width);
      }
      const int64_t start = batch.starts[r], stop = batch.starts[r + 1], id = ids[start];
      const A* from = gradients + place[start] * stride;
      if (stop - start > 1) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t i = start; i < stop; ++i) {
          if (i + kIdsAhead < count) prefetch<0>(gradients + place[i + kIdsAhead] * stride, D);
          add(sum.data(), gradients + place[i] * stride, D);
        }
        for (int64_t d = 0; d < D; ++d) g[d] = static_cast<A>(sum[d]);
        from = g.data();
      }
      W* weight = weights + id * D;
      if constexpr (std::is_same_v<W, A>) {
        step<kRule, A>(weight, from, first.row(id), second.row(id), D, numbers);
      } else {
        for (int64_t d = 0; d < D; ++d) wide[d] = static_cast<A>(weight[d]);
        step<kRule, A>(wide.data(), from, first.row(id), second.row(id), D, numbers);
        if (draws.on)
          for (int64_t d = 0; d < D; ++d) weight[d] = round_stochastic<W>(wide[d], draws.noise(id, d));
        else
          for (int64_t d = 0; d < D; ++d) weight[d] = static_cast<W>(wide[d]);
      }
    }
  });
}

template <typename W, typename A> void by_rule(int64_t rule, const Batch& batch, const Numbers& numbers, const Draws& draws) {
  switch (rule) {
    case kSgd: return update<kSgd, W, A>(batch, numbers, draws);
    case kRowwiseAdagrad: return update<kRowwiseAdagrad, W, A>(batch, numbers, draws);
    case kAdagrad: return update<kAdagrad, W, A>(batch, numbers, draws);
    case kAdam: return update<kAdam, W, A>(batch, numbers, draws);
    case kRowwiseAdamW: return update<kRowwiseAdamW, W, A>(batch, numbers, draws);
    default: TORCH_CHECK_VALUE(false, "no rule ", rule);
  }
}

inline std::vector<int64_t> runs_of(const int64_t* ids, int64_t count, int64_t rows) {
  std::vector<int64_t> starts;
  if (count) {
    TORCH_CHECK_INDEX(ids[0] >= 0 && ids[count - 1] < rows, "ids_T must lie in [0, ", rows, "), the rows of the table; found ",
                      ids[0] < 0 ? ids[0] : ids[count - 1]);
    for (int64_t i = 0; i < count; ++i)
      if (!i || ids[i] != ids[i - 1]) starts.push_back(i);
  }
  starts.push_back(count);
  return starts;
}

inline void update_rows(int64_t rule, const Batch& batch, const Numbers& numbers, const Draws& draws) {
  switch (batch.weight.scalar_type()) {
    case at::kFloat: return by_rule<float, float>(rule, batch, numbers, draws);
    case at::kDouble: return by_rule<double, double>(rule, batch, numbers, draws);
    case at::kHalf: return by_rule<c10::Half, float>(rule, batch, numbers, draws);
    case at::kBFloat16: return by_rule<c10::BFloat16, float>(rule, batch, numbers, draws);
    default: TORCH_CHECK_VALUE(false, "no update of a table of ", batch.weight.scalar_type());
  }
}

}  // namespace gr::row_update
