// Which tokens can follow in a stream that has to become a whole JPEG: the automaton of a scan, lifted to the tokens
// of a byte-pair encoding.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "jpeg_scan.hpp"

namespace jpeg {

// Where a stream stands: in its constant head, and then in the scan.
struct Cursor {
  std::int32_t head = 0;  // bytes of it
  Position scan;
};

class Grammar {
 public:
  // Rows are kept up to so many bytes of memory, and made anew where they are not.
  Grammar(Scan scan, std::string head, std::vector<std::string> tokens, std::size_t memory);

  Fault step(Cursor& at, std::uint8_t byte) const;
  // Reads the bytes of a token. False, and the cursor where it was, when one is refused.
  bool read(Cursor& at, std::size_t token) const;

  bool done(const Cursor& at) const { return at.scan.phase == Position::kDone; }
  // Bytes of a continuation to the end of the stream; so many single-byte tokens there are.
  long finish(const Cursor& at) const;

  // Writes to row[token] whether the token can come next: all zero where the stream is done. With `left` tokens to
  // come after which there has to be one more for the end, or any number where that is negative.
  //
  // Where `left` was enough for `finish` once, and it goes down by one a token, it always is.
  void allow(const Cursor& at, long left, std::uint8_t* row);

  const Scan& scan() const { return scan_; }
  std::size_t tokens() const { return tokens_.size(); }
  std::size_t rows() const { return places_.size(); }
  // Bytes of the tables.
  std::size_t memory() const;

 private:
  std::uint64_t key(const Cursor& at, long slack) const;
  const std::uint8_t* row(const Cursor& at, long slack);
  void build(const Cursor& at, long left, std::uint8_t* row) const;

  Scan scan_;
  std::string head_;
  std::vector<std::string> tokens_;
  std::vector<std::uint32_t> sorted_;      // tokens by their bytes
  std::vector<std::uint32_t> by_length_;   // the longest first
  std::vector<std::uint32_t> shared_;      // bytes that one begins with like the one before
  std::size_t most_rows_, longest_ = 0, longest_in_scan_ = 0;
  long reach_ = 0;  // MCUs that a token can end, and one more
  bool countable_ = false;  // a row under a budget depends on no more than its key
  std::unordered_map<std::uint64_t, std::size_t> places_;
  std::vector<std::uint8_t> rows_;
};

}  // namespace jpeg
