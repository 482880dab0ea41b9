// The states of the automaton that encodes (bpe_automaton.hpp), made one by one as documents need them.
//
// In a proper vocabulary every token encodes to itself, and tokens are the encoding of their bytes exactly
// if each two neighbours are the encoding of theirs: if they fit. So every prefix of a document has one last
// token that fits the encoding before it (H. van Antwerpen, A. Neubeck, "So many tokens, so little time",
// GitHub 2024).
//
// After some bytes, a token may begin at the end, and at each earlier place from where the bytes are the
// beginning of a longer token that fits there. The tokens that the encodings up to all these places have in
// common are certain, and are put out; what is left of each is its path. Documents with equal places and
// paths are encoded alike from there on: they are in one state of a subsequential transducer (M. Cognetta,
// N. Okazaki, "Tokenization as Finite-State Transduction", 2024).
#pragma once

#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bpe_vocabulary.hpp"

namespace bpe {

using Tokens = std::vector<Token>;

struct OutOfStates : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class States {
 public:
  struct Transition {
    uint32_t state;
    Tokens output;
  };

  static constexpr uint32_t kStart = 0;
  static constexpr size_t kMaxStates = 1 << 14;
  static constexpr size_t kMaxPending = 64;  // tokens of a path, and places: trained vocabularies stay below 10

  // The vocabulary has to be proper and to outlive the states.
  explicit States(const Vocabulary& vocabulary);

  // Where a byte leads, and the tokens it makes certain. Throws OutOfStates beyond the limits above.
  Transition step(uint32_t state, uint8_t byte);

  // The tokens that are left when the document ends.
  Tokens end(uint32_t state) const { return states_[state]->places.back().path; }

 private:
  // The tokens sorted_[first, last) begin with the same `depth` bytes.
  struct Prefix {
    uint32_t first, last, depth;
    bool operator<(const Prefix& other) const;
  };
  struct Place {
    Prefix prefix;  // of the bytes from this place to the end
    Tokens path;    // the encoding up to this place, without what has left the automaton
    bool operator<(const Place& other) const;
  };
  struct State {
    Token before;               // stands for the token that left last, if a path is empty
    std::vector<Place> places;  // from the earliest to the end of the bytes
    bool operator<(const State& other) const;
  };

  Prefix everything() const { return {0, static_cast<uint32_t>(sorted_.size()), 0}; }
  Prefix extend(Prefix prefix, uint8_t byte) const;
  Token complete(Prefix prefix) const;
  bool fits(Token before, Token token) const { return before == kNone || vocabulary_.fits(before, token); }
  bool promises(Prefix prefix, Token before) const;
  Token representative(Prefix prefix, Token before);
  uint32_t intern(State state);

  const Vocabulary& vocabulary_;
  Tokens sorted_;  // by their bytes
  std::map<State, uint32_t> numbers_;
  std::vector<const State*> states_;
  std::map<std::pair<Prefix, Tokens>, Token> representatives_;
  std::map<std::pair<Prefix, Token>, Token> represented_;
};

}  // namespace bpe
