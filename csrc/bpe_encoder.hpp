// Encodes and decodes documents with one vocabulary. Safe to call from several threads.
#pragma once

#include <memory>
#include <vector>

#include "bpe_automaton.hpp"
#include "bpe_vocabulary.hpp"

namespace bpe {

struct Document {
  const uint8_t* data;
  size_t size;
};

class Encoder {
 public:
  // ids[t] is the public id of token t; empty when they are the same. Every document that is not empty begins
  // with the ids `prefix`.
  Encoder(Vocabulary vocabulary, std::vector<uint16_t> ids, std::vector<uint16_t> prefix);

  Encoder(const Encoder&) = delete;

  const Vocabulary& vocabulary() const { return vocabulary_; }

  // How many ids a document of that size has at most.
  size_t room(size_t size) const { return size ? prefix_.size() + size : 0; }

  // Writes the ids of one document to `out`, which has that room; returns how many there are. Without the
  // prefix if it is the later part of a document.
  size_t encode(Document document, uint16_t* out, bool later_part = false) const;

  // Writes the ids of all documents to `out` without a gap, each between the ids `around` if that holds two.
  // `out` has the room for that. Returns where each document starts, and the end. (bpe_batch.cpp)
  std::vector<int64_t> encode(const std::vector<Document>& documents, const std::vector<uint16_t>& around,
                              int threads, uint16_t* out) const;

  // The last place in [from, size) where every encoding has a border, or 0: what stands before it is encoded
  // alike whatever follows.
  size_t last_border(Document document, size_t from) const;

  // The length in bytes of the text of `ids`. Throws UserFault for an id that is no token.
  size_t decoded_size(const uint16_t* ids, size_t count) const;
  void decode(const uint16_t* ids, size_t count, char* out) const;

 private:
  Vocabulary vocabulary_;
  std::vector<uint16_t> ids_, prefix_;
  std::vector<Token> tokens_;             // the token of each id
  std::unique_ptr<Automaton> automaton_;  // null if the vocabulary is not proper
};

}  // namespace bpe
