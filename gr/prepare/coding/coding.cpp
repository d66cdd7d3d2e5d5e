// Codes for the values of a column, and the order of events by user and time: reference.py is the definition.
//
// A value is its bytes: text in UTF-8, or the eight of an int64. The table has open addresses with linear probing, at most
// half of them taken. Nearly every look-up misses the cache twice (the slot, then the bytes of the value), so rows go
// through it in blocks: both are asked for ahead of their use.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <vector>

namespace {

constexpr int64_t kBlock = 64;
constexpr int32_t kNoCode = -1;

uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

struct Bytes {
  const char* data;
  uint32_t size;
};

struct Slot {
  uint32_t tag = 0;
  int32_t code = kNoCode;
  int64_t start = 0;  // of the value in `bytes_`
};

class Codes {
 public:
  Codes() : slots_(1 << 12), seed_((static_cast<uint64_t>(std::random_device{}()) << 32) | 1) {}

  int64_t count() const { return static_cast<int64_t>(starts_.size()); }
  int64_t bytes() const { return static_cast<int64_t>(bytes_.size()); }

  // value(row): the bytes of a row that has a value. present(row): whether it has one. False where codes run out.
  template <typename Value, typename Present>
  bool encode(int64_t rows, const Value& value, const Present& present, int32_t* code) {
    uint64_t hash[kBlock];
    for (int64_t first = 0; first < rows; first += kBlock) {
      const int64_t size = std::min(kBlock, rows - first);
      while (2 * (count() + size) > static_cast<int64_t>(slots_.size())) grow();
      const uint64_t mask = slots_.size() - 1;
      for (int64_t i = 0; i < size; ++i) {
        hash[i] = present(first + i) ? hash_of(value(first + i)) : 0;
        __builtin_prefetch(&slots_[hash[i] & mask]);
      }
      for (int64_t i = 0; i < size; ++i) {
        const Slot& slot = slots_[hash[i] & mask];
        if (slot.code != kNoCode) __builtin_prefetch(bytes_.data() + slot.start);
      }
      for (int64_t i = 0; i < size; ++i) {
        code[first + i] = present(first + i) ? find_or_add(hash[i], value(first + i)) : kNoCode;
      }
      if (count() >= std::numeric_limits<int32_t>::max() - kBlock) return false;
    }
    return true;
  }

  // The values in the order of their codes: `offsets` has count() + 1 entries.
  void copy(int64_t* offsets, char* data) const {
    int64_t end = 0;
    for (int64_t code = 0; code < count(); ++code) {
      const Bytes value = at(starts_[code]);
      offsets[code] = end;
      std::memcpy(data + end, value.data, value.size);
      end += value.size;
    }
    offsets[count()] = end;
  }

  int64_t size_of_values() const { return bytes() - count() * static_cast<int64_t>(sizeof(uint32_t)); }

 private:
  Bytes at(int64_t start) const {
    Bytes value;
    std::memcpy(&value.size, bytes_.data() + start, sizeof(uint32_t));
    value.data = bytes_.data() + start + sizeof(uint32_t);
    return value;
  }

  uint64_t hash_of(Bytes value) const {
    uint64_t hash = seed_ ^ value.size, word = 0;
    uint32_t place = 0;
    for (; place + 8 <= value.size; place += 8) {
      std::memcpy(&word, value.data + place, 8);
      hash = mix(hash ^ word, 0x9E3779B97F4A7C15u);
    }
    word = 0;
    for (uint32_t byte = place; byte < value.size; ++byte) {
      word = (word << 8) | static_cast<unsigned char>(value.data[byte]);
    }
    return mix(hash ^ word, 0xD6E8FEB86659FD93u);
  }

  int32_t find_or_add(uint64_t hash, Bytes value) {
    const uint64_t mask = slots_.size() - 1;
    const auto tag = static_cast<uint32_t>(hash >> 32);
    uint64_t place = hash & mask;
    for (; slots_[place].code != kNoCode; place = (place + 1) & mask) {
      const Slot& slot = slots_[place];
      if (slot.tag != tag) continue;
      const Bytes other = at(slot.start);
      if (other.size == value.size && std::memcmp(other.data, value.data, value.size) == 0) return slot.code;
    }
    const auto start = static_cast<int64_t>(bytes_.size());
    const auto code = static_cast<int32_t>(count());
    bytes_.insert(bytes_.end(), reinterpret_cast<const char*>(&value.size), reinterpret_cast<const char*>(&value.size + 1));
    bytes_.insert(bytes_.end(), value.data, value.data + value.size);
    starts_.push_back(start);
    slots_[place] = {tag, code, start};
    return code;
  }

  void grow() {
    std::vector<Slot> wider(2 * slots_.size());
    const uint64_t mask = wider.size() - 1;
    for (int64_t code = 0; code < count(); ++code) {
      const uint64_t hash = hash_of(at(starts_[code]));
      uint64_t place = hash & mask;
      while (wider[place].code != kNoCode) place = (place + 1) & mask;
      wider[place] = {static_cast<uint32_t>(hash >> 32), static_cast<int32_t>(code), starts_[code]};
    }
    slots_.swap(wider);
  }

  std::vector<Slot> slots_;
  std::vector<char> bytes_;
  std::vector<int64_t> starts_;
  uint64_t seed_;
};

bool is_set(const uint8_t* bitmap, int64_t bit) { return (bitmap[bit >> 3] >> (bit & 7)) & 1; }

// The order within a user: most histories are short, and few rows move far where a log is nearly by time.
void sort_by_time(const int64_t* time, int32_t* first, int32_t* last) {
  if (last - first > 32) {
    std::stable_sort(first, last, [time](int32_t a, int32_t b) { return time[a] < time[b]; });
    return;
  }
  for (int32_t* next = first + 1; next < last; ++next) {
    const int32_t row = *next;
    const int64_t at = time[row];
    int32_t* place = next;
    for (; place > first && time[place[-1]] > at; --place) *place = place[-1];
    *place = row;
  }
}

}  // namespace

// Nothing is thrown across this border: a call returns false where memory or codes run out.
extern "C" {

void* gr_codes_new() {
  try {
    return new Codes;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void gr_codes_free(void* codes) { delete static_cast<Codes*>(codes); }

int64_t gr_codes_count(const void* codes) { return static_cast<const Codes*>(codes)->count(); }

int64_t gr_codes_bytes(const void* codes) { return static_cast<const Codes*>(codes)->size_of_values(); }

void gr_codes_copy(const void* codes, int64_t* offsets, char* data) {
  static_cast<const Codes*>(codes)->copy(offsets, data);
}

// Rows [first, first + rows) of an Arrow array. offsets: of text; null for int64 values. valid: bitmap, or null.
bool gr_codes_encode(
    void* codes, const int32_t* offsets, const char* data, const uint8_t* valid, int64_t first, int64_t rows, int32_t* code) {
  const auto present = [=](int64_t row) { return valid == nullptr || is_set(valid, first + row); };
  try {
    auto& table = *static_cast<Codes*>(codes);
    if (offsets == nullptr) {
      return table.encode(rows, [=](int64_t row) { return Bytes{data + 8 * (first + row), 8}; }, present, code);
    }
    const auto text = [=](int64_t row) {
      const int32_t* start = offsets + first + row;
      return Bytes{data + start[0], static_cast<uint32_t>(start[1] - start[0])};
    };
    return table.encode(rows, text, present, code);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// order: the rows by user, then time (null: none), then place. user: in [0, users).
bool gr_order(const int32_t* user, const int64_t* time, int64_t rows, int64_t users, int32_t* order) {
  try {
    std::vector<int32_t> next(users + 1);
    for (int64_t row = 0; row < rows; ++row) ++next[user[row] + 1];
    for (int64_t each = 0; each < users; ++each) next[each + 1] += next[each];
    for (int64_t row = 0; row < rows; ++row) order[next[user[row]]++] = static_cast<int32_t>(row);
    if (time == nullptr) return true;
    int32_t first = 0;
    for (int64_t each = 0; each < users; ++each) {
      sort_by_time(time, order + first, order + next[each]);
      first = next[each];
    }
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}
}
