// Which tasks a call of paged_attention has, and where their results lie until they are merged.
//
// A piece is cut into splits of a fixed number of keys, and a row's result is defined as: the splits of a
// piece folded together from the first on, then the pieces in their order. A task does one split, or all
// splits of a piece and folds them as it goes, and either way the same numbers are added in the same order.
#pragma once

#include <vector>

#include "paged_attention.hpp"

constexpr long kSplit = 1024;  // keys

struct Plan {
  // What is done once for each key-value group: columns are a piece's rows times the heads of a group.
  struct Item {
    long piece, split;  // split is negative if the task does all of them
    long column, end;
  };
  struct Seen {
    long piece, row;  // row: its number within the piece
  };

  Plan(const PagedShape& shape, long tokens, const Pool& pool, const Pieces& pieces, int threads);

  std::vector<Item> items;
  std::vector<long> partials;    // [piece] how many results there are of each column
  std::vector<long> first;       // [piece] where they begin: [split][column]
  std::vector<long> seen_first;  // [row] where its pieces begin in `seen`
  std::vector<Seen> seen;
  long results;  // of a group
};
