// Tokens of a byte-pair encoding: 0 to 255 are the bytes, 256 + k is what merge k makes.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_pair_map.hpp"

namespace bpe {

using Token = uint16_t;

constexpr size_t kNumBytes = 256;
constexpr size_t kMaxTokens = 65534;      // ids are uint16, and BOS and EOS come on top
constexpr size_t kMaxTokenLength = 65536;  // bounds what a hostile list of doubling merges can ask for
constexpr size_t kMaxTotalLength = 64 << 20;
constexpr Token kNone = 0xFFFF;

struct Merge {
  Token left, right;
};

class Vocabulary {
 public:
  // Throws UserFault for a merge of unknown ids, a duplicate, and a token beyond the limits above.
  explicit Vocabulary(const std::vector<Merge>& merges);

  size_t size() const { return kNumBytes + merges_.size(); }
  const std::vector<Merge>& merges() const { return merges_; }
  Merge parts(Token token) const { return merges_[token - kNumBytes]; }
  uint32_t length(Token token) const { return offsets_[token + 1] - offsets_[token]; }
  std::string_view bytes(Token token) const { return {text_.data() + offsets_[token], length(token)}; }

  // The token that a merge makes of two neighbours, or kNone.
  Token merged(Token left, Token right) const {
    if (left < kNumBytes && right < kNumBytes) return byte_pairs_[left << 8 | right];
    const Token* token = pairs_.find(left, right);
    return token ? *token : kNone;
  }

  // Whether some token holds the bytes a, b side by side. Where none does, every encoding has a border.
  bool joinable(uint8_t a, uint8_t b) const { return joinable_[a << 8 | b]; }

  // Whether encoding the bytes of two tokens gives these two, as far as merges below `limit` go. Both tokens
  // have to encode to themselves.
  bool fits(Token left, Token right, uint32_t limit = kNone) const;

  // Whether every token encodes to itself. What training finds does; a list made by hand need not.
  bool proper() const { return proper_; }

 private:
  std::vector<Merge> merges_;
  std::string text_;               // the bytes of all tokens, one after the other
  std::vector<uint32_t> offsets_;  // token t is text_[offsets_[t], offsets_[t + 1])
  PairMap<Token> pairs_;
  std::vector<Token> byte_pairs_;
  std::bitset<kNumBytes * kNumBytes> joinable_;
  bool proper_ = true;
};

}  // namespace bpe
