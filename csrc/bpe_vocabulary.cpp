#include "bpe_vocabulary.hpp"

#include "fault.hpp"

namespace bpe {

static std::string name(size_t index, Merge merge) {
  return "merge " + std::to_string(index) + " (" + std::to_string(merge.left) + ", " +
         std::to_string(merge.right) + ")";
}

Vocabulary::Vocabulary(const std::vector<Merge>& merges)
    : merges_(merges), byte_pairs_(kNumBytes * kNumBytes, kNone) {
  if (size() > kMaxTokens)
    throw UserFault("a vocabulary of " + std::to_string(size()) + " entries",
                    "ids are uint16, so at most " + std::to_string(kMaxTokens) + " bytes and merges fit");
  for (size_t byte = 0; byte < kNumBytes; ++byte) {
    text_ += static_cast<char>(byte);
    offsets_.push_back(byte);
  }
  offsets_.push_back(kNumBytes);
  for (size_t index = 0; index < merges.size(); ++index) {
    Merge merge = merges[index];
    size_t token = kNumBytes + index;
    if (merge.left >= token || merge.right >= token)
      throw UserFault(name(index, merge), "a merge may only use ids below its own, " + std::to_string(token));
    if (merged(merge.left, merge.right) != kNone)
      throw UserFault(name(index, merge), "an earlier merge is the same");
    if (length(merge.left) + length(merge.right) > kMaxTokenLength)
      throw UserFault(name(index, merge), "a token may have at most " + std::to_string(kMaxTokenLength) + " bytes");
    if (text_.size() + length(merge.left) + length(merge.right) > kMaxTotalLength)
      throw UserFault(name(index, merge),
                      "all tokens together may have at most " + std::to_string(kMaxTotalLength) + " bytes");

    std::string joined(bytes(merge.left));
    joined += bytes(merge.right);
    uint8_t before = bytes(merge.left).back(), after = bytes(merge.right).front();
    joinable_.set(before << 8 | after);
    if (joined.size() == 2) byte_pairs_[merge.left << 8 | merge.right] = token;
    else pairs_(merge.left, merge.right) = token;
    text_ += joined;
    offsets_.push_back(text_.size());
  }
  for (size_t index = 0; index < merges.size() && proper_; ++index)
    proper_ = fits(merges[index].left, merges[index].right, kNumBytes + index);
}

// The merges that made the two tokens are undone at their border, the latest first: the tokens do not fit if
// what meets there could have been merged before. Of equal merges the left one comes first.
bool Vocabulary::fits(Token left, Token right, uint32_t limit) const {
  if (!joinable(bytes(left).back(), bytes(right).front())) return true;
  while (merged(left, right) >= limit) {
    if (left > right && left >= kNumBytes) {
      limit = left;
      left = parts(left).right;
    } else if (right >= kNumBytes) {
      limit = right + 1;
      right = parts(right).left;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace bpe
