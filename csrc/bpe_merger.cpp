#include "bpe_merger.hpp"

#include <algorithm>

#include "fault.hpp"

namespace bpe {

void Merger::offer(size_t position, Token left, Token right) {
  if (left == kNone || right == kNone) return;
  Token token = vocabulary_.merged(left, right);
  if (token != kNone) buckets_[token - kNumBytes].push_back(position);
}

size_t Merger::encode(const uint8_t* data, size_t size, Token* out) {
  if (size >= UINT32_MAX) throw UserFault(std::to_string(size) + " bytes", "a document has to be below 4 GiB");
  cells_.assign(size + 2, kNone);  // cells_[p + 1] is byte p: both ends have a neighbour
  std::copy(data, data + size, cells_.begin() + 1);
  for (size_t p = 1; p < size; ++p) offer(p, cells_[p], cells_[p + 1]);

  // A merge only makes pairs of later merges, so one pass over the buckets is enough. A position whose
  // tokens have changed since is stale. Only pairs of one token with itself overlap, and need the order.
  for (size_t index = 0; index < buckets_.size(); ++index) {
    std::vector<uint32_t>& bucket = buckets_[index];
    if (bucket.empty()) continue;
    auto [left, right] = vocabulary_.merges()[index];
    Token token = kNumBytes + index;
    size_t left_length = vocabulary_.length(left), length = vocabulary_.length(token);
    if (left == right && !std::is_sorted(bucket.begin(), bucket.end())) std::sort(bucket.begin(), bucket.end());
    for (size_t begin : bucket) {
      size_t middle = begin + left_length, end = begin + length;
      if (cells_[begin] != left || cells_[middle] != right) continue;
      cells_[middle - 1] = cells_[middle] = kNone;
      cells_[begin] = cells_[end - 1] = token;
      Token before = cells_[begin - 1];
      if (before != kNone) offer(begin - vocabulary_.length(before), before, token);
      offer(begin, token, cells_[end]);
    }
    bucket.clear();
  }

  Token* start = out;
  for (size_t p = 1; p <= size; p += vocabulary_.length(*out++)) *out = cells_[p];
  return out - start;
}

}  // namespace bpe
