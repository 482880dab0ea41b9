// Encodes with one table look-up a byte: a transducer whose table is filled as documents need it. Exact for
// proper vocabularies. Safe to use from several threads.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "bpe_states.hpp"

namespace bpe {

class Automaton {
 public:
  // ids[t] is what is written for token t. The vocabulary has to be proper and to outlive the automaton.
  Automaton(const Vocabulary& vocabulary, const std::vector<uint16_t>& ids);

  // Writes the ids of one document to `out`, which has room for `size`; returns how many there are.
  // Throws OutOfStates for a document that needs too large a table.
  size_t encode(const uint8_t* data, size_t size, uint16_t* out) const;

 private:
  // A row has an entry for each byte and one for the end of the document. An entry holds, from the top,
  //    2 bits  1 + how many ids are put out, or 0: they are among the long outputs, or nothing is known yet
  //   30 bits  where the row of the next state begins
  //   32 bits  up to two ids, the first one lowest; or 1 + an index of the long outputs
  static constexpr size_t kEnd = 256, kRow = 257;
  static constexpr uint64_t kRowMask = (1 << 30) - 1;

  // Where the next id goes, and the row that the next byte meets. By value, to stay in registers.
  struct Cursor {
    uint16_t* out;
    size_t row;
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  Cursor step(Cursor cursor, uint8_t byte) const;
  Cursor put(Cursor cursor, size_t symbol) const;
  uint64_t find(size_t row, size_t symbol) const;
  uint64_t make(size_t row, size_t symbol) const;

  const Vocabulary& vocabulary_;
  std::vector<uint16_t> ids_;
  std::unique_ptr<std::atomic<uint64_t>[], Free> table_;
  mutable std::mutex mutex_;  // over what follows, and over writing to the table
  mutable States states_;
  mutable std::vector<std::vector<uint16_t>> long_outputs_;
};

}  // namespace bpe
