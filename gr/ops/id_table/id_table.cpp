// A set-associative map from raw ids to rows, in place: reference.py beside it is the definition.
//
// Memory decides the speed: the keys of a set are 8 bytes a way, so each id's are asked for several ids ahead.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace gr::id_table {
namespace {

constexpr int64_t kEmpty = std::numeric_limits<int64_t>::min(), kAhead = 12, kBlock = 8;
constexpr int kMostCount = 255;

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline int64_t scaled(uint64_t bits32, int64_t count) { return static_cast<int64_t>(bits32 * count >> 32); }

// A place among distinct ids, by open addressing: twice as many slots as ids, so probes are short.
std::tuple<at::Tensor, at::Tensor, at::Tensor> count_ids(const at::Tensor& ids) {
  const int64_t count = ids.numel();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  struct Slot {
    int64_t id;
    int64_t place;
  };
  const uint64_t slots = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * count, 16)));
  const int shift = 64 - std::countr_zero(slots);
  std::vector<Slot> table(slots, Slot{0, -1});
  std::vector<int64_t> distinct, uses;
  at::Tensor place = at::empty({count}, ids.options());
  int64_t* at_place = place.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(&table[splitmix64(id[i + kAhead]) >> shift], 1);
    uint64_t s = splitmix64(id[i]) >> shift;
    while (table[s].place >= 0 && table[s].id != id[i]) s = (s + 1) & (slots - 1);
    if (table[s].place < 0) {
      table[s] = {id[i], static_cast<int64_t>(distinct.size())};
      distinct.push_back(id[i]);
      uses.push_back(0);
    }
    ++uses[table[s].place];
    at_place[i] = table[s].place;
  }
  const int64_t U = static_cast<int64_t>(distinct.size());
  const auto copied = [&](std::vector<int64_t>& from) { return at::from_blob(from.data(), {U}, ids.options()).clone(); };
  return {copied(distinct), copied(uses), place};
}

// The way of a set that holds an id, or 0. Ways are compared in blocks, which the compiler turns into vectors.
inline int64_t way_of(const int64_t* __restrict keys, int64_t ways, int64_t id) {
  int64_t way = 0;
  for (; way + kBlock <= ways; way += kBlock) {
    unsigned hits = 0;
    for (int64_t j = 0; j < kBlock; ++j) hits |= static_cast<unsigned>(keys[way + j] == id) << j;
    if (hits) return way + std::countr_zero(hits);
  }
  for (; way < ways; ++way)
    if (keys[way] == id) return way;
  return 0;
}

struct Contender {
  int64_t set, uses, id, index;
  bool operator<(const Contender& other) const {
    return std::tie(set, other.uses, id) < std::tie(other.set, uses, other.id);
  }
};

template <typename Score> Score entry_score(int64_t uses, double stamp) {
  return static_cast<Score>(std::is_same_v<Score, int32_t> ? stamp : static_cast<double>(uses) * stamp);
}

// Gives the contenders of one set, in their order, its weakest ways, each if it is the stronger. strength, by_strength:
// room for the ways.
template <typename Score>
void contend(int64_t* keys, Score* scores, int64_t ways, const Contender* from, int64_t count, double stamp,
             std::vector<int64_t>& by_strength, int64_t* way_of_index, std::vector<int64_t>& entered, std::vector<int64_t>& evicted) {
  by_strength.clear();
  for (int64_t way = 1; way < ways; ++way) by_strength.push_back(way);
  const auto weaker = [&](int64_t a, int64_t b) {
    const bool full_a = keys[a] != kEmpty, full_b = keys[b] != kEmpty;
    const Score score_a = full_a ? scores[a] : Score(-1), score_b = full_b ? scores[b] : Score(-1);
    return std::tie(score_a, a) < std::tie(score_b, b);
  };
  const int64_t places = std::min(count, ways - 1);
  std::partial_sort(by_strength.begin(), by_strength.begin() + places, by_strength.end(), weaker);
  for (int64_t n = 0; n < places; ++n) {
    const int64_t way = by_strength[n];
    const Score score = entry_score<Score>(from[n].uses, stamp);
    if (keys[way] != kEmpty && !(score > scores[way])) continue;
    entered.push_back(from[n].index);
    evicted.push_back(keys[way]);
    keys[way] = from[n].id;
    scores[way] = score;
    way_of_index[from[n].index] = way;
  }
}

template <typename Score>
std::tuple<at::Tensor, at::Tensor, at::Tensor> step(const at::Tensor& key, const at::Tensor& score, const std::optional<at::Tensor>& seen,
                                                    int64_t first, int64_t sets, const at::Tensor& ids, const at::Tensor& uses,
                                                    double stamp, int64_t min_count) {
  const int64_t U = ids.numel(), own = key.size(0), ways = key.size(1), counters = seen ? seen->size(1) : 0;
  int64_t* keys = key.mutable_data_ptr<int64_t>();
  Score* scores = score.mutable_data_ptr<Score>();
  uint8_t* counts = seen ? seen->mutable_data_ptr<uint8_t>() : nullptr;
  const int64_t *id = ids.const_data_ptr<int64_t>(), *used = uses.const_data_ptr<int64_t>();
  at::Tensor row = at::empty({U}, ids.options());
  int64_t* rows = row.mutable_data_ptr<int64_t>();
  const auto set_of = [&](int64_t raw) { return scaled(splitmix64(raw) >> 32, sets) - first; };
  const auto counter_of = [&](int64_t set, int64_t raw) {
    return counts + set * counters + scaled(splitmix64(raw) & 0xFFFFFFFF, counters);
  };
  const int64_t lines = std::min<int64_t>(ways, 64);  // of very wide sets the rest is left to the hardware
  std::vector<Contender> contenders;
  for (int64_t u = 0; u < U; ++u) {
    if (u + kAhead < U) {
      const int64_t next = set_of(id[u + kAhead]);
      if (next >= 0 && next < own)
        for (int64_t way = 0; way < lines; way += 8) __builtin_prefetch(keys + next * ways + way);
    }
    const int64_t set = set_of(id[u]);
    TORCH_CHECK_VALUE(set >= 0 && set < own, "id ", id[u], " is of another rank's sets");
    const int64_t way = way_of(keys + set * ways, ways, id[u]);
    rows[u] = way;
    if (!used[u]) continue;
    if (way) {
      const Score gained = entry_score<Score>(used[u], stamp);
      Score& own_score = scores[set * ways + way];
      own_score = std::is_same_v<Score, int32_t> ? gained : own_score + gained;
      continue;
    }
    if (counts) {
      uint8_t* counter = counter_of(set, id[u]);
      *counter = static_cast<uint8_t>(std::min<int64_t>(*counter + used[u], kMostCount));
    }
    contenders.push_back({set, used[u], id[u], u});
  }
  if (counts)
    std::erase_if(contenders, [&](const Contender& each) { return *counter_of(each.set, each.id) < min_count; });
  std::sort(contenders.begin(), contenders.end());
  std::vector<int64_t> by_strength, entered, evicted;
  for (size_t n = 0; n < contenders.size();) {
    size_t stop = n;
    while (stop < contenders.size() && contenders[stop].set == contenders[n].set) ++stop;
    const int64_t set = contenders[n].set;
    contend<Score>(keys + set * ways, scores + set * ways, ways, &contenders[n], static_cast<int64_t>(stop - n), stamp, by_strength,
                   rows, entered, evicted);
    n = stop;
  }
  for (int64_t u = 0; u < U; ++u) rows[u] += (set_of(id[u]) + first) * ways;
  const int64_t N = static_cast<int64_t>(entered.size());
  const auto copied = [&](std::vector<int64_t>& from) { return at::from_blob(from.data(), {N}, ids.options()).clone(); };
  return {row, copied(entered), copied(evicted)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> id_table_step(const at::Tensor& key, const at::Tensor& score,
                                                             const std::optional<at::Tensor>& seen, int64_t first, int64_t sets,
                                                             const at::Tensor& ids, const at::Tensor& uses, double stamp,
                                                             int64_t min_count) {
  TORCH_CHECK_VALUE(key.is_contiguous() && score.is_contiguous() && (!seen || seen->is_contiguous()), "the table must be contiguous");
  TORCH_CHECK_VALUE(key.sizes() == score.sizes() && (!seen || seen->size(0) == key.size(0)), "key, score and seen must have the same sets");
  const at::Tensor own_ids = ids.contiguous(), own_uses = uses.contiguous();
  const auto run = score.scalar_type() == at::kInt ? &step<int32_t> : &step<float>;
  return run(key, score, seen, first, sets, own_ids, own_uses, stamp, min_count);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("count_ids(Tensor ids) -> (Tensor, Tensor, Tensor)");
  m.def(
      "id_table_step(Tensor(a!) key, Tensor(b!) score, Tensor(c!)? seen, int first, int sets, Tensor ids, Tensor uses, float stamp, "
      "int min_count) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("count_ids", &count_ids);
  m.impl("id_table_step", &id_table_step);
}

}  // namespace gr::id_table
