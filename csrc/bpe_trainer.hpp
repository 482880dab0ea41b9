// Trains a byte-pair encoding on whole documents, one merge a call.
//
// The corpus is one array of cells, a token standing on its first and its last byte; documents are kept
// apart by an empty cell. Every token has the sorted list of the places where it was made, so a merge
// costs the shorter list of its two tokens. About 8 bytes a corpus byte: 2 for the cell, 4 for the place
// of each byte, and up to as much again, in practice a quarter, for the places of merged tokens.
#pragma once

#include <optional>
#include <queue>
#include <vector>

#include "bpe_vocabulary.hpp"

namespace bpe {

class Trainer {
 public:
  struct Choice {
    Merge merge;
    size_t places;  // where it was merged: how many tokens fewer the corpus has
  };

  explicit Trainer(size_t max_token_length);

  // Appends one document. Throws UserFault after the first merge and beyond 4 GiB.
  void add(const uint8_t* data, size_t size);

  // Merges the most frequent pair, the smallest (left, right) among equals. Overlapping pairs count: 'aaa' has
  // two of 'aa'. Nothing when no pair is left.
  std::optional<Choice> merge();

 private:
  struct Candidate {
    uint32_t count;
    Merge pair;
    bool operator<(const Candidate& other) const;  // the best one is the greatest
  };

  void index();
  std::optional<Merge> choose();
  void replace(Merge pair, Token token);
  void recount(Merge pair, Token token);
  void propose(Token left, Token right, uint32_t count);
  void lose(Token left, Token right, uint32_t count);

  size_t max_token_length_;
  bool indexed_ = false;
  std::vector<Token> cells_;
  std::vector<uint32_t> lengths_;
  std::vector<std::vector<uint32_t>> places_;
  PairMap<uint32_t> counts_;
  std::priority_queue<Candidate> candidates_;
  std::vector<uint32_t> before_, after_;  // how often each token stood beside the pair being merged
  uint32_t twins_ = 0;                    // how often the new token stands beside itself
};

}  // namespace bpe
