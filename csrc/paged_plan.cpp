#include "paged_plan.hpp"

#include <algorithm>
#include <stdexcept>

namespace {

constexpr long kColumns = 512;  // of a task: its queries and results stay in the second cache
constexpr long kFew = 32;       // so few columns leave so little to merge that all splits may be tasks

void check(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

// Counts how many pieces each row has, in seen_first[row + 1].
void check_pieces(const PagedShape& shape, long tokens, const Pool& pool, const Pieces& pieces,
                  std::vector<long>& seen_first) {
  check(pieces.block_offsets[0] == 0 && pieces.row_offsets[0] == 0, "offsets begin with 0");
  for (long p = 0; p < pieces.count; ++p) {
    const long blocks = pieces.block_offsets[p + 1] - pieces.block_offsets[p];
    check(blocks >= 0 && pieces.row_offsets[p + 1] >= pieces.row_offsets[p], "offsets do not fall");
    check(pieces.lengths[p] >= 0 && pieces.lengths[p] <= blocks * shape.block,
          "a piece is longer than its blocks");
    for (long i = pieces.block_offsets[p]; i < pieces.block_offsets[p + 1]; ++i)
      check(pieces.blocks[i] >= 0 && pieces.blocks[i] < pool.blocks, "a block is not in the pool");
    for (long i = pieces.row_offsets[p]; i < pieces.row_offsets[p + 1]; ++i) {
      check(pieces.rows[i] >= 0 && pieces.rows[i] < tokens, "a row is not in the query");
      ++seen_first[pieces.rows[i] + 1];
    }
  }
}

}  // namespace

Plan::Plan(const PagedShape& shape, long tokens, const Pool& pool, const Pieces& pieces, int threads)
    : partials(pieces.count), first(pieces.count), seen_first(tokens + 1), results(0) {
  check_pieces(shape, tokens, pool, pieces, seen_first);
  const long share = shape.heads / shape.groups;
  for (long p = 0; p < pieces.count; ++p) {
    const long columns = (pieces.row_offsets[p + 1] - pieces.row_offsets[p]) * share;
    const long splits = (pieces.lengths[p] + kSplit - 1) / kSplit;
    if (columns == 0 || splits == 0) continue;
    long width = kColumns;
    while (width > 128 && shape.groups * ((columns + width - 1) / width) < 4 * threads) width /= 2;
    const bool whole =
        splits == 1 || (columns > kFew && shape.groups * ((columns + width - 1) / width) >= 4 * threads);
    partials[p] = whole ? 1 : splits;
    first[p] = results;
    results += partials[p] * columns;
    for (long s = 0; s < partials[p]; ++s)
      for (long c = 0; c < columns; c += width)
        items.push_back({p, whole ? -1 : s, c, std::min(columns, c + width)});
  }
  for (long t = 0; t < tokens; ++t) seen_first[t + 1] += seen_first[t];
  seen.resize(seen_first[tokens]);
  std::vector<long> next(seen_first.begin(), seen_first.end() - 1);
  for (long p = 0; p < pieces.count; ++p)
    for (long i = pieces.row_offsets[p]; i < pieces.row_offsets[p + 1]; ++i)
      seen[next[pieces.rows[i]]++] = {p, i - pieces.row_offsets[p]};
}
