#include "bpe_encoder.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "bpe_merger.hpp"
#include "fault.hpp"

namespace bpe {

Encoder::Encoder(Vocabulary vocabulary, std::vector<uint16_t> ids, std::vector<uint16_t> prefix)
    : vocabulary_(std::move(vocabulary)), ids_(std::move(ids)), prefix_(std::move(prefix)) {
  if (ids_.empty()) {
    ids_.resize(vocabulary_.size());
    std::iota(ids_.begin(), ids_.end(), 0);
  }
  if (ids_.size() != vocabulary_.size())
    throw UserFault(std::to_string(ids_.size()) + " ids",
                    "there have to be as many as tokens, " + std::to_string(vocabulary_.size()));
  tokens_.assign(*std::max_element(ids_.begin(), ids_.end()) + 1, kNone);
  for (size_t token = 0; token < ids_.size(); ++token) {
    Token& owner = tokens_[ids_[token]];
    if (owner != kNone) throw UserFault("id " + std::to_string(ids_[token]), "stands for two tokens");
    owner = token;
  }
  if (vocabulary_.proper()) automaton_ = std::make_unique<Automaton>(vocabulary_, ids_);
}

size_t Encoder::encode(Document document, uint16_t* out, bool later_part) const {
  if (document.size == 0) return 0;
  if (!later_part) {
    out = std::copy(prefix_.begin(), prefix_.end(), out);
    return prefix_.size() + encode(document, out, true);
  }
  if (automaton_) {
    try {
      return automaton_->encode(document.data, document.size, out);
    } catch (const OutOfStates&) {  // rare: the document is encoded again, by the definition
    }
  }
  Merger merger(vocabulary_);
  size_t count = merger.encode(document.data, document.size, out);
  for (size_t i = 0; i < count; ++i) out[i] = ids_[out[i]];
  return count;
}

size_t Encoder::last_border(Document document, size_t from) const {
  for (size_t p = document.size; p-- > std::max<size_t>(from, 1);)
    if (!vocabulary_.joinable(document.data[p - 1], document.data[p])) return p;
  return 0;
}

size_t Encoder::decoded_size(const uint16_t* ids, size_t count) const {
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) {
    if (ids[i] >= tokens_.size() || tokens_[ids[i]] == kNone)
      throw UserFault("id " + std::to_string(ids[i]) + " at position " + std::to_string(i),
                      "is no token of this vocabulary");
    size += vocabulary_.length(tokens_[ids[i]]);
  }
  return size;
}

void Encoder::decode(const uint16_t* ids, size_t count, char* out) const {
  for (size_t i = 0; i < count; ++i) {
    std::string_view bytes = vocabulary_.bytes(tokens_[ids[i]]);
    std::memcpy(out, bytes.data(), bytes.size());
    out += bytes.size();
  }
}

}  // namespace bpe
