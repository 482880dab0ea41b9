#include "bpe_automaton.hpp"

#include <algorithm>
#include <new>

namespace bpe {

Automaton::Automaton(const Vocabulary& vocabulary, const std::vector<uint16_t>& ids)
    : vocabulary_(vocabulary), ids_(ids), states_(vocabulary) {
  // calloc, because a system gives no memory for rows that are never reached.
  void* memory = std::calloc(States::kMaxStates * kRow, sizeof(std::atomic<uint64_t>));
  if (!memory) throw std::bad_alloc();
  table_.reset(static_cast<std::atomic<uint64_t>*>(memory));
}

uint64_t Automaton::make(size_t row, size_t symbol) const {
  uint32_t state = row / kRow;
  States::Transition made =
      symbol == kEnd ? States::Transition{States::kStart, states_.end(state)} : states_.step(state, symbol);
  uint64_t entry = uint64_t{made.state} * kRow << 32;
  if (made.output.size() <= 2) {
    for (size_t i = 0; i < made.output.size(); ++i) entry |= uint64_t{ids_[made.output[i]]} << 16 * i;
    return entry | (1 + made.output.size()) << 62;
  }
  std::vector<uint16_t>& output = long_outputs_.emplace_back();
  for (Token token : made.output) output.push_back(ids_[token]);
  return entry | long_outputs_.size();
}

// An entry is complete in itself, so reading one needs no lock.
uint64_t Automaton::find(size_t row, size_t symbol) const {
  std::atomic<uint64_t>& place = table_[row + symbol];
  if (uint64_t entry = place.load(std::memory_order_relaxed)) return entry;
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t entry = make(row, symbol);
  place.store(entry, std::memory_order_relaxed);
  return entry;
}

// Follows any entry, and writes only the ids that count.
Automaton::Cursor Automaton::put(Cursor cursor, size_t symbol) const {
  uint64_t entry = find(cursor.row, symbol);
  cursor.row = entry >> 32 & kRowMask;
  if (size_t count = entry >> 62) {
    for (; count > 1; --count, entry >>= 16) *cursor.out++ = entry;
  } else {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<uint16_t>& output = long_outputs_[static_cast<uint32_t>(entry) - 1];
    cursor.out = std::copy(output.begin(), output.end(), cursor.out);
  }
  return cursor;
}

// Follows an entry without a branch that depends on the data. Writes two ids, of which fewer may count.
inline Automaton::Cursor Automaton::step(Cursor cursor, uint8_t byte) const {
  uint64_t entry = table_[cursor.row + byte].load(std::memory_order_relaxed);
  size_t count = entry >> 62;
  if (count == 0) return put(cursor, byte);
  cursor.out[0] = entry;
  cursor.out[1] = entry >> 16;
  return {cursor.out + count - 1, entry >> 32 & kRowMask};
}

size_t Automaton::encode(const uint8_t* data, size_t size, uint16_t* out) const {
  // A document falls apart wherever no token joins two bytes. Its parts go through the table side by side,
  // so that the processor need not wait for one look-up before it starts another.
  constexpr size_t kParts = 4;
  size_t begins[kParts + 1] = {}, shortest = size;
  Cursor cursors[kParts];
  for (size_t k = 0; k < kParts; ++k) {
    size_t end = std::max(begins[k], size / kParts * (k + 1));
    if (k + 1 == kParts) end = size;
    while (begins[k] < end && end < size && vocabulary_.joinable(data[end - 1], data[end])) ++end;
    begins[k + 1] = end;
    shortest = std::min(shortest, end - begins[k]);
    cursors[k] = {out + begins[k], States::kStart};
  }
  size_t done = 0;
  {
    // By name: in an array the cursors would live in memory, at half the speed (GCC 12).
    Cursor a = cursors[0], b = cursors[1], c = cursors[2], d = cursors[3];
    for (; done + 1 < shortest; ++done) {
      a = step(a, data[begins[0] + done]);
      b = step(b, data[begins[1] + done]);
      c = step(c, data[begins[2] + done]);
      d = step(d, data[begins[3] + done]);
    }
    cursors[0] = a, cursors[1] = b, cursors[2] = c, cursors[3] = d;
  }
  uint16_t* end = out;
  for (size_t k = 0; k < kParts; ++k) {
    Cursor cursor = cursors[k];
    size_t i = begins[k] + done, last = begins[k + 1];
    for (; i + 1 < last; ++i) cursor = step(cursor, data[i]);
    if (i < last) cursor = put(cursor, data[i]);  // a step could write over the next part's first id
    cursor = put(cursor, kEnd);
    end = std::copy(out + begins[k], cursor.out, end);
  }
  return end - out;
}

}  // namespace bpe
