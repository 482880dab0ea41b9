#include "bpe_states.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace bpe {

bool States::Prefix::operator<(const Prefix& other) const {
  return std::tie(first, last, depth) < std::tie(other.first, other.last, other.depth);
}

bool States::Place::operator<(const Place& other) const {
  return std::tie(prefix, path) < std::tie(other.prefix, other.path);
}

bool States::State::operator<(const State& other) const {
  return std::tie(before, places) < std::tie(other.before, other.places);
}

States::States(const Vocabulary& vocabulary) : vocabulary_(vocabulary), sorted_(vocabulary.size()) {
  std::iota(sorted_.begin(), sorted_.end(), 0);
  std::sort(sorted_.begin(), sorted_.end(),
            [&](Token a, Token b) { return vocabulary.bytes(a) < vocabulary.bytes(b); });
  intern({kNone, {{everything(), {}}}});
}

States::Prefix States::extend(Prefix prefix, uint8_t byte) const {
  auto next = [&](Token token) {  // -1 for the token that ends here, which stands first
    std::string_view bytes = vocabulary_.bytes(token);
    return bytes.size() == prefix.depth ? -1 : static_cast<uint8_t>(bytes[prefix.depth]);
  };
  auto begin = sorted_.begin() + prefix.first, end = sorted_.begin() + prefix.last;
  auto low = std::partition_point(begin, end, [&](Token token) { return next(token) < byte; });
  auto high = std::partition_point(low, end, [&](Token token) { return next(token) == byte; });
  auto index = [&](Tokens::const_iterator place) { return static_cast<uint32_t>(place - sorted_.begin()); };
  return {index(low), index(high), prefix.depth + 1};
}

// The token that the prefix itself is, or kNone.
Token States::complete(Prefix prefix) const {
  return vocabulary_.length(sorted_[prefix.first]) == prefix.depth ? sorted_[prefix.first] : kNone;
}

// Whether a token longer than the prefix can begin where it does.
bool States::promises(Prefix prefix, Token before) const {
  return std::any_of(sorted_.begin() + prefix.first, sorted_.begin() + prefix.last, [&](Token token) {
    return vocabulary_.length(token) > prefix.depth && fits(before, token);
  });
}

// One token for all those that fit the same tokens of the prefix; kNone for those that fit all of them.
Token States::representative(Prefix prefix, Token before) {
  auto [known, fresh] = represented_.try_emplace({prefix, before}, kNone);
  if (!fresh) return known->second;
  Tokens unfit;
  std::copy_if(sorted_.begin() + prefix.first, sorted_.begin() + prefix.last, std::back_inserter(unfit),
               [&](Token token) { return !fits(before, token); });
  if (!unfit.empty()) known->second = representatives_.try_emplace({prefix, unfit}, before).first->second;
  return known->second;
}

uint32_t States::intern(State state) {
  if (auto known = numbers_.find(state); known != numbers_.end()) return known->second;
  if (states_.size() == kMaxStates) throw OutOfStates("too many states");
  auto place = numbers_.emplace(std::move(state), states_.size()).first;
  states_.push_back(&place->first);
  return place->second;
}

States::Transition States::step(uint32_t from, uint8_t byte) {
  const State& state = *states_[from];
  State next{kNone, {}};
  Tokens path;
  for (const Place& place : state.places) {
    Prefix prefix = extend(place.prefix, byte);
    if (prefix.first == prefix.last) continue;
    Token before = place.path.empty() ? state.before : place.path.back(), token = complete(prefix);
    if (token != kNone && fits(before, token)) {
      path = place.path;
      path.push_back(token);
    }
    if (promises(prefix, before)) next.places.push_back({prefix, place.path});
  }
  if (path.size() > kMaxPending || next.places.size() > kMaxPending) throw OutOfStates("too much is pending");
  next.places.push_back({everything(), path});

  size_t certain = path.size();
  for (const Place& place : next.places) {
    auto end = path.begin() + std::min(certain, place.path.size());
    certain = std::mismatch(path.begin(), end, place.path.begin()).first - path.begin();
  }
  Tokens output(path.begin(), path.begin() + certain);
  Token before = output.empty() ? state.before : output.back();
  for (Place& place : next.places) {
    place.path.erase(place.path.begin(), place.path.begin() + certain);
    if (place.path.empty()) next.before = representative(place.prefix, before);
  }
  return {intern(std::move(next)), std::move(output)};
}

}  // namespace bpe
