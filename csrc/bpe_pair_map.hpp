// A hash map from pairs of tokens to small values: open addressing, linear probing, no erasure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bpe {

template <class Value>
class PairMap {
 public:
  PairMap() : slots_(16) {}

  // The value of a pair, or null. Valid until the next insertion.
  Value* find(uint16_t left, uint16_t right) {
    Slot& slot = slots_[locate(key(left, right))];
    return slot.key == kEmpty ? nullptr : &slot.value;
  }
  const Value* find(uint16_t left, uint16_t right) const { return const_cast<PairMap*>(this)->find(left, right); }

  // The value of a pair, made first if it is new.
  Value& operator()(uint16_t left, uint16_t right) {
    size_t index = locate(key(left, right));
    if (slots_[index].key == kEmpty) {
      if (2 * ++size_ > slots_.size()) {
        grow();
        index = locate(key(left, right));
      }
      slots_[index].key = key(left, right);
    }
    return slots_[index].value;
  }

 private:
  static constexpr uint32_t kEmpty = 0xFFFFFFFF;  // 0xFFFF is no token
  struct Slot {
    uint32_t key = kEmpty;
    Value value{};
  };

  static uint32_t key(uint16_t left, uint16_t right) { return uint32_t{left} << 16 | right; }

  size_t locate(uint32_t key) const {
    size_t mask = slots_.size() - 1, index = (key * 0x9E3779B97F4A7C15u) >> 32 & mask;
    while (slots_[index].key != key && slots_[index].key != kEmpty) index = (index + 1) & mask;
    return index;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old)
      if (slot.key != kEmpty) slots_[locate(slot.key)] = slot;
  }

  std::vector<Slot> slots_;
  size_t size_ = 0;
};

}  // namespace bpe
