// A set-associative map from raw ids to rows, in place: reference.py beside it is the definition.
//
// Memory decides the speed. So ids come in the order of their sets (count_ids), a set's ways are told apart by a byte each
// before a key is read, and what the next ids will need is asked for early.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace gr::id_table {
namespace {

constexpr int64_t kBlock = 16, kUsesPerPart = 1024;
constexpr size_t kAhead = 6;
constexpr int kMostCount = 255, kMostBits = 11;

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline int64_t scaled(uint64_t bits32, int64_t count) { return static_cast<int64_t>(bits32 * count >> 32); }

at::Tensor copied(std::vector<int64_t>& from, const at::Tensor& like) {
  return at::from_blob(from.data(), {static_cast<int64_t>(from.size())}, like.options()).clone();
}

// Distinct ids in the order of their hashes' first bits, and so of their sets, to within a part: equal ids meet in a part that
// fits the cache, and the table is then read from its first set to its last.
std::tuple<at::Tensor, at::Tensor, at::Tensor> count_ids(const at::Tensor& ids) {
  struct Use {
    int64_t id;
    uint32_t index, hash;
  };
  const int64_t count = ids.numel();
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max(), count, " ids at a time, at most 2^31 - 1");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int bits = std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(count / kUsesPerPart))), 1, kMostBits);
  const auto part_of = [&](uint64_t hash) { return hash >> (64 - bits); };
  std::vector<int64_t> starts((size_t{1} << bits) + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++starts[part_of(splitmix64(id[i])) + 1];
  const int64_t largest = *std::max_element(starts.begin(), starts.end());
  for (size_t part = 1; part < starts.size(); ++part) starts[part] += starts[part - 1];
  const std::unique_ptr<Use[]> uses(new Use[count]);
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t hash = splitmix64(id[i]);
    uses[next[part_of(hash)]++] = {id[i], static_cast<uint32_t>(i), static_cast<uint32_t>(hash)};
  }

  at::Tensor distinct = at::empty({count}, ids.options()), times = at::empty_like(distinct), place = at::empty_like(distinct);
  int64_t *raw = distinct.mutable_data_ptr<int64_t>(), *uses_of = times.mutable_data_ptr<int64_t>();
  int64_t* at_place = place.mutable_data_ptr<int64_t>();
  // Twice as many slots as uses of a part, so probes are short. A slot of an earlier part counts as empty, and an empty one as
  // the place of the next new id: then whether an id is new, which nothing foretells, decides no branch.
  std::vector<int32_t> slots(std::bit_ceil(static_cast<uint64_t>(2 * largest + 2)), -1);
  int32_t total = 0;
  for (size_t part = 0; part + 1 < starts.size(); ++part) {
    const int32_t first = total;
    const uint64_t mask = std::bit_ceil(static_cast<uint64_t>(2 * (starts[part + 1] - starts[part]) + 2)) - 1;
    for (int64_t i = starts[part]; i < starts[part + 1]; ++i) {
      raw[total] = uses[i].id;
      uses_of[total] = 0;
      uint64_t slot = uses[i].hash & mask;
      int32_t own;
      while (raw[own = slots[slot] >= first ? slots[slot] : total] != uses[i].id) slot = (slot + 1) & mask;
      slots[slot] = own;
      ++uses_of[own];
      at_place[uses[i].index] = own;
      total += own == total;
    }
  }
  return {distinct.narrow(0, 0, total), times.narrow(0, 0, total), place};
}

// The first way from `from` on whose tag may be `tag`, or 0: 64 tags are compared at once, or eight, and of these a way after
// one that matches may be named wrongly, which its key then tells.
inline int64_t next_match(const uint8_t* tags, int64_t ways, uint8_t tag, int64_t from) {
#if defined(__AVX512BW__)
  for (int64_t way = from; way < ways; way += 64) {
    const __mmask64 lanes = ways - way < 64 ? (uint64_t{1} << (ways - way)) - 1 : ~uint64_t{0};
    const uint64_t same = _mm512_mask_cmpeq_epi8_mask(lanes, _mm512_maskz_loadu_epi8(lanes, tags + way), _mm512_set1_epi8(tag));
    if (same) return way + std::countr_zero(same);
  }
#else
  constexpr uint64_t kOnes = 0x0101010101010101;
  for (int64_t way = from & ~int64_t{7}; way + 8 <= ways; way += 8) {
    uint64_t word;
    std::memcpy(&word, tags + way, 8);
    word ^= kOnes * tag;
    uint64_t zeros = (word - kOnes) & ~word & (kOnes << 7);
    if (way < from) zeros &= ~uint64_t{0} << 8 * (from - way);
    if (zeros) return way + std::countr_zero(zeros) / 8;
  }
  for (int64_t way = std::max(ways & ~int64_t{7}, from); way < ways; ++way)
    if (tags[way] == tag) return way;
#endif
  return 0;
}

struct Contender {
  int64_t set, uses, id, index;
  bool operator<(const Contender& other) const {
    return std::tie(set, other.uses, id) < std::tie(other.set, uses, other.id);
  }
};

// Contenders in their order: dealt to ranges of sets first, for most sets of a step have one or two.
std::vector<Contender> sorted(const std::vector<Contender>& contenders, int64_t sets) {
  const uint64_t ranges = std::bit_ceil(contenders.size() / 4 + 1), scale = (ranges << 32) / sets;
  const auto range_of = [&](const Contender& each) { return each.set * scale >> 32; };
  std::vector<int64_t> stops(ranges + 1, 0);
  for (const Contender& each : contenders) ++stops[range_of(each) + 1];
  for (uint64_t range = 1; range <= ranges; ++range) stops[range] += stops[range - 1];
  std::vector<Contender> dealt(contenders.size());
  for (const Contender& each : contenders) dealt[stops[range_of(each)]++] = each;  // a range's start becomes its stop
  int64_t start = 0;
  for (uint64_t range = 0; range < ranges; start = stops[range++]) std::sort(dealt.begin() + start, dealt.begin() + stops[range]);
  return dealt;
}

template <typename Score> Score entry_score(int64_t uses, double stamp) {
  return static_cast<Score>(std::is_same_v<Score, int32_t> ? stamp : static_cast<double>(uses) * stamp);
}

// The weakest way of a set but the first, the lowest of equals, by one minimum of both. The bits of floats that are not
// negative order as the floats do, and empty ways have one negative score.
inline int64_t weakest(const int32_t* __restrict bits, int64_t ways) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t way = 1; way < ways; ++way) least = std::min(least, (int64_t{bits[way]} << 32) + way);
  return least & 0xFFFFFFFF;
}

template <typename Score> struct Table {
  int64_t* key;
  Score* score;
  uint8_t *tag, *seen;
  int64_t own, ways, counters, first, sets;

  int64_t set_of(uint64_t hash) const { return scaled(hash >> 32, sets) - first; }
  uint8_t* counter(int64_t set, uint64_t hash) const { return seen + set * counters + scaled(hash & 0xFFFFFFFF, counters); }
};

template <typename Score>
std::tuple<at::Tensor, at::Tensor, at::Tensor> step(const Table<Score>& t, const at::Tensor& ids, const at::Tensor& uses, double stamp,
                                                    int64_t min_count) {
  const int64_t U = ids.numel();
  const int64_t *id = ids.const_data_ptr<int64_t>(), *used = uses.const_data_ptr<int64_t>();
  at::Tensor row = at::empty({U}, ids.options());
  int64_t* rows = row.mutable_data_ptr<int64_t>();
  std::vector<Contender> contenders;
  uint64_t hash[2 * kBlock];  // of this block of ids and of the next
  int64_t match[kBlock];
  const auto begin_block = [&](int64_t start) {
    for (int64_t u = start; u < std::min(start + kBlock, U); ++u) {
      uint64_t& h = hash[u % (2 * kBlock)] = splitmix64(id[u]);
      const int64_t set = t.set_of(h);
      TORCH_CHECK_VALUE(set >= 0 && set < t.own, "id ", id[u], " is of another rank's sets");
      __builtin_prefetch(t.tag + set * t.ways);
    }
  };
  begin_block(0);
  for (int64_t start = 0; start < U; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, U);
    begin_block(stop);
    for (int64_t u = start; u < stop; ++u) {
      const uint64_t h = hash[u % (2 * kBlock)];
      const int64_t base = t.set_of(h) * t.ways, way = match[u - start] = next_match(t.tag + base, t.ways, h & 0xFF, 1);
      __builtin_prefetch(t.key + base + way);
      __builtin_prefetch(t.score + base + way, 1);
    }
    for (int64_t u = start; u < stop; ++u) {
      const uint64_t h = hash[u % (2 * kBlock)];
      const int64_t set = t.set_of(h), base = set * t.ways;
      int64_t way = match[u - start];
      while (way && t.key[base + way] != id[u]) way = next_match(t.tag + base, t.ways, h & 0xFF, way + 1);
      rows[u] = t.first * t.ways + base + way;
      if (!used[u]) continue;
      if (way) {
        const Score gained = entry_score<Score>(used[u], stamp);
        t.score[base + way] = std::is_same_v<Score, int32_t> ? gained : t.score[base + way] + gained;
        continue;
      }
      if (t.seen) {
        uint8_t* counter = t.counter(set, h);
        *counter = static_cast<uint8_t>(std::min<int64_t>(*counter + used[u], kMostCount));
      }
      contenders.push_back({set, used[u], id[u], u});
    }
  }
  if (t.seen)
    std::erase_if(contenders, [&](const Contender& each) { return *t.counter(each.set, splitmix64(each.id)) < min_count; });
  contenders = sorted(contenders, t.own);
  // A set's contenders come with falling scores and its ways with rising ones: after one that loses, all others do.
  std::vector<int64_t> entered, taken, evicted;
  const auto hand_over = [&](size_t n) {  // after the key of its way was asked for
    const int64_t raw = id[entered[n]];
    evicted.push_back(std::exchange(t.key[taken[n]], raw));
    t.tag[taken[n]] = splitmix64(raw) & 0xFF;
  };
  int64_t lost = -1;
  for (size_t n = 0; n < contenders.size(); ++n) {
    const Contender& each = contenders[n];
    if (n + kAhead < contenders.size())
      for (int64_t way = 0; way < std::min<int64_t>(t.ways, 64); way += 16)
        __builtin_prefetch(t.score + contenders[n + kAhead].set * t.ways + way, 1);
    if (each.set == lost) continue;
    const int64_t base = each.set * t.ways;
    const Score gained = entry_score<Score>(each.uses, stamp);
    const int64_t way = weakest(reinterpret_cast<const int32_t*>(t.score + base), t.ways);
    if (!(gained > t.score[base + way])) {
      lost = each.set;
      continue;
    }
    t.score[base + way] = gained;
    rows[each.index] += way;
    __builtin_prefetch(t.key + base + way, 1);
    entered.push_back(each.index);
    taken.push_back(base + way);
    if (taken.size() > kAhead) hand_over(evicted.size());
  }
  while (evicted.size() < taken.size()) hand_over(evicted.size());
  return {row, copied(entered, ids), copied(evicted, ids)};
}

template <typename Score>
std::tuple<at::Tensor, at::Tensor, at::Tensor> step_of(const at::Tensor& key, const at::Tensor& score, const at::Tensor& tag,
                                                       const std::optional<at::Tensor>& seen, int64_t first, int64_t sets,
                                                       const at::Tensor& ids, const at::Tensor& uses, double stamp, int64_t min_count) {
  const Table<Score> table{key.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<Score>(), tag.mutable_data_ptr<uint8_t>(),
                           seen ? seen->mutable_data_ptr<uint8_t>() : nullptr, key.size(0), key.size(1), seen ? seen->size(1) : 0,
                           first, sets};
  return step<Score>(table, ids.contiguous(), uses.contiguous(), stamp, min_count);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> id_table_step(const at::Tensor& key, const at::Tensor& score, const at::Tensor& tag,
                                                             const std::optional<at::Tensor>& seen, int64_t first, int64_t sets,
                                                             const at::Tensor& ids, const at::Tensor& uses, double stamp,
                                                             int64_t min_count) {
  for (const at::Tensor& each : {key, score, tag, seen.value_or(key)})
    TORCH_CHECK_VALUE(each.is_contiguous() && each.size(0) == key.size(0), "the table's tensors must be contiguous, of the same sets");
  TORCH_CHECK_VALUE(key.sizes() == score.sizes() && key.sizes() == tag.sizes() && key.size(1) > 1, "key, score and tag must be [S, A], A > 1");
  const auto run = score.scalar_type() == at::kInt ? &step_of<int32_t> : &step_of<float>;
  return run(key, score, tag, seen, first, sets, ids, uses, stamp, min_count);
}

// Rows of ids, for reading alone: the table may be a file that is mapped, and several threads may ask at once.
at::Tensor id_table_find(const at::Tensor& key, const at::Tensor& tag, int64_t first, int64_t sets, const at::Tensor& ids) {
  TORCH_CHECK_VALUE(key.is_contiguous() && tag.is_contiguous() && key.sizes() == tag.sizes() && key.dim() == 2 && key.size(1) > 1,
                    "key and tag must be contiguous [S, A], A > 1");
  const at::Tensor asked = ids.contiguous();
  const int64_t T = asked.numel(), own = key.size(0), ways = key.size(1);
  const int64_t *id = asked.const_data_ptr<int64_t>(), *keys = key.const_data_ptr<int64_t>();
  const uint8_t* tags = tag.const_data_ptr<uint8_t>();
  at::Tensor row = at::empty({T}, asked.options());
  int64_t* rows = row.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < T; ++i) {
    if (i + kBlock < T) {
      const int64_t later = scaled(splitmix64(id[i + kBlock]) >> 32, sets) - first;
      if (later >= 0 && later < own) __builtin_prefetch(tags + later * ways);
    }
    const uint64_t h = splitmix64(id[i]);
    const int64_t set = scaled(h >> 32, sets) - first, base = set * ways;
    TORCH_CHECK_VALUE(set >= 0 && set < own, "id ", id[i], " is of another rank's sets");
    int64_t way = next_match(tags + base, ways, h & 0xFF, 1);
    while (way && keys[base + way] != id[i]) way = next_match(tags + base, ways, h & 0xFF, way + 1);
    rows[i] = first * ways + base + way;
  }
  return row;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gr, m) {
  m.def("count_ids(Tensor ids) -> (Tensor, Tensor, Tensor)");
  m.def("id_table_find(Tensor key, Tensor tag, int first, int sets, Tensor ids) -> Tensor");
  m.def(
      "id_table_step(Tensor(a!) key, Tensor(b!) score, Tensor(c!) tag, Tensor(d!)? seen, int first, int sets, Tensor ids, "
      "Tensor uses, float stamp, int min_count) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gr, CPU, m) {
  m.impl("count_ids", &count_ids);
  m.impl("id_table_step", &id_table_step);
  m.impl("id_table_find", &id_table_find);
}

}  // namespace gr::id_table
