// One tile of the forward pass, shared by packed sequences and by queries against cached keys.
//
// The sum of a query is over tiles of 64 keys, counted from the oldest token, each tile's part in one product; then a
// candidate's own term. So its bits depend on the query and its keys alone: not on the queries beside it, not on how
// candidates are split over calls, not on which keys were cached.
#pragma once

#include "scores.h"

#include <type_traits>

namespace gr {

inline Causal keys_of_history(const Causal& mask) { return mask; }
inline History keys_of_history(const Masked& mask) { return {mask}; }
inline int64_t history_of(const Causal&, int64_t count) { return count; }
inline int64_t history_of(const Masked& mask, int64_t) { return mask.history; }

// Scratch memory of a tile.
template <typename S> struct TileBuffers {
  Width<S> d, dv;
  S *rows, *weights;
  float* s;
  TileBuffers(const Width<S>& width, const Width<S>& value_width, Scratch& scratch)
      : d(width), dv(value_width), rows(scratch.take<S>(kTile * std::max(d.ld, dv.ld))),
        weights(scratch.take<S>(kTile * kTile)), s(scratch.take<float>(kTile * kTile)) {}

  // Tile j of the keys and of the values as right operands. keys, values: anything with load(first, width, out).
  template <typename K>
  void pack_keys(const K& keys, const K& values, int64_t j, S* __restrict k_packed, S* __restrict v_packed) const {
    keys.load(j * kTile, d, rows);
    pack_transposed(rows, d, k_packed);
    values.load(j * kTile, dv, rows);
    pack(rows, kTile, dv.ld, dv.ld, v_packed);
  }

  // o [rows, dv.ld] (+)= silu(alpha q k^T + bias) v of one tile.
  template <typename M>
  void attend(const Tile<M>& tile, const S* q, const S* k_packed, const S* v_packed, float alpha, const Bias& bias,
              bool add, float* o) const {
    multiply<S>(tile.m, tile.n, d.used, q, d.ld, k_packed, kTile, s, kTile, false);
    if (alpha != 1.f) scale_scores(tile, alpha, s);
    add_bias(tile, bias, s);
    activate(tile, s);
    multiply<S>(tile.m, dv.used, tile.n, left(tile, s, weights), kTile, v_packed, dv.ld, o, dv.ld, add);
  }
};

// o += silu(alpha q . k + bias) v: what a candidate sees of itself. Not inlined, so that it is the same code everywhere.
template <typename S>
__attribute__((noinline)) void add_own(const Width<S>& d, const Width<S>& dv, const S* q, const S* k, const S* v,
                                       float alpha, float bias, float* __restrict o) {
  float s = 0.f;
  for (int64_t c = 0; c < d.real; ++c) s += static_cast<float>(q[c]) * static_cast<float>(k[c]);
  s = s * alpha + bias;
  const float weight = s * sigmoid(s);
  for (int64_t c = 0; c < dv.real; ++c) o[c] += weight * static_cast<float>(v[c]);
}

// out <- o scale.
template <typename S>
__attribute__((noinline)) void store(float* __restrict o, float scale, const Width<S>& dv, S* out) {
  for (int64_t c = 0; c < dv.real; ++c) o[c] *= scale;
  cast(o, out, dv.real);
}

}  // namespace gr
