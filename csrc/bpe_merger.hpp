// Byte-pair encoding by its definition, in linear memory: the lowest merge first, the leftmost pair first.
// Exact for every vocabulary.
#pragma once

#include <vector>

#include "bpe_vocabulary.hpp"

namespace bpe {

class Merger {
 public:
  explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary), buckets_(vocabulary.merges().size()) {}

  // Writes the tokens of one document to `out`, which has room for `size`; returns how many there are.
  size_t encode(const uint8_t* data, size_t size, Token* out);

 private:
  void offer(size_t position, Token left, Token right);

  const Vocabulary& vocabulary_;
  std::vector<Token> cells_;                    // a token stands on its first and last byte, kNone between
  std::vector<std::vector<uint32_t>> buckets_;  // for each merge, where its two tokens were seen
};

}  // namespace bpe
