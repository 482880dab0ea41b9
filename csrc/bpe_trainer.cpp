#include "bpe_trainer.hpp"

#include <algorithm>
#include <tuple>

#include "fault.hpp"

namespace bpe {

bool Trainer::Candidate::operator<(const Candidate& other) const {
  return std::tie(count, other.pair.left, other.pair.right) < std::tie(other.count, pair.left, pair.right);
}

Trainer::Trainer(size_t max_token_length)
    : max_token_length_(std::min(max_token_length, kMaxTokenLength)),
      cells_(1, kNone),
      lengths_(kNumBytes, 1),
      places_(kNumBytes) {}

void Trainer::add(const uint8_t* data, size_t size) {
  if (indexed_) throw UserFault("a document", "has to be added before the first merge");
  if (cells_.size() + size + 1 > UINT32_MAX)
    throw UserFault("the corpus", "has to be below 4 GiB", "train on fewer documents");
  cells_.insert(cells_.end(), data, data + size);
  cells_.push_back(kNone);
}

void Trainer::index() {
  std::vector<uint32_t> byte_counts(kNumBytes), pair_counts(kNumBytes * kNumBytes);
  for (size_t p = 1; p < cells_.size(); ++p) {
    if (cells_[p] == kNone) continue;
    ++byte_counts[cells_[p]];
    if (cells_[p - 1] != kNone) ++pair_counts[cells_[p - 1] << 8 | cells_[p]];
  }
  for (size_t byte = 0; byte < kNumBytes; ++byte) places_[byte].reserve(byte_counts[byte]);
  for (size_t p = 1; p < cells_.size(); ++p)
    if (cells_[p] != kNone) places_[cells_[p]].push_back(p);
  for (size_t pair = 0; pair < pair_counts.size(); ++pair)
    if (pair_counts[pair]) propose(pair >> 8, pair & 0xFF, pair_counts[pair]);
  indexed_ = true;
}

std::optional<Trainer::Choice> Trainer::merge() {
  if (!indexed_) index();
  if (lengths_.size() >= kMaxTokens) return std::nullopt;
  std::optional<Merge> pair = choose();
  if (!pair) return std::nullopt;
  Token token = lengths_.size();
  lengths_.push_back(lengths_[pair->left] + lengths_[pair->right]);
  replace(*pair, token);
  recount(*pair, token);
  return Choice{*pair, places_.back().size()};
}

// A pair's count only falls once it stands among the candidates: a stale one goes back with its true count.
std::optional<Merge> Trainer::choose() {
  while (!candidates_.empty()) {
    Candidate best = candidates_.top();
    candidates_.pop();
    uint32_t count = *counts_.find(best.pair.left, best.pair.right);
    if (count == best.count) return best.pair;
    if (count) candidates_.push({count, best.pair});
  }
  return std::nullopt;
}

void Trainer::replace(Merge pair, Token token) {
  auto [left, right] = pair;
  before_.assign(lengths_.size(), 0);
  after_.assign(lengths_.size(), 0);
  twins_ = 0;
  std::vector<uint32_t> made;
  bool by_left = left == right || places_[left].size() <= places_[right].size();
  std::vector<uint32_t>& places = places_[by_left ? left : right];
  size_t left_length = lengths_[left], length = lengths_[token], kept = 0;
  for (uint32_t place : places) {
    if (cells_[place] != (by_left ? left : right)) continue;  // merged into another token since
    size_t begin = by_left ? place : place - left_length, middle = begin + left_length, end = begin + length;
    if (by_left ? cells_[middle] != right : cells_[middle - 1] != left) {
      places[kept++] = place;
      continue;
    }
    cells_[middle - 1] = cells_[middle] = kNone;
    cells_[begin] = cells_[end - 1] = token;
    made.push_back(begin);
    Token previous = cells_[begin - 1], next = cells_[end];
    if (previous == token) ++twins_;
    else if (previous != kNone) ++before_[previous];
    if (next != kNone) ++after_[next];
  }
  places.resize(kept);
  places.shrink_to_fit();
  made.shrink_to_fit();
  places_.push_back(std::move(made));
}

void Trainer::recount(Merge pair, Token token) {
  auto [left, right] = pair;
  for (size_t other = 0; other < token; ++other) {
    Token neighbour = other;
    if (before_[other]) {
      lose(neighbour, left, before_[other]);
      propose(neighbour, token, before_[other]);
    }
    if (after_[other]) {
      lose(right, neighbour, after_[other]);
      // Of 'left right left right' the first pair had `left` after it, and then the new token.
      propose(token, neighbour, after_[other] - (neighbour == left ? twins_ : 0));
    }
  }
  propose(token, token, twins_);
  counts_(left, right) = 0;
}

void Trainer::propose(Token left, Token right, uint32_t count) {
  if (!count || lengths_[left] + lengths_[right] > max_token_length_) return;
  counts_(left, right) = count;
  candidates_.push({count, {left, right}});
}

void Trainer::lose(Token left, Token right, uint32_t count) {
  if (uint32_t* known = counts_.find(left, right)) *known -= count;
}

}  // namespace bpe
