#include "jpeg_grammar.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "fault.hpp"

namespace jpeg {
namespace {

constexpr std::size_t kPlaceBytes = 64;  // of a row's key, about
constexpr std::uint8_t kFF = 0xFF;
enum : std::uint8_t { kRefused, kAllowed, kDoubtful };  // doubtful: whether it is in range has to be asked
// Of the key of a row: bits of a state, and of a number of MCUs; the rest is for the slack of a budget.
constexpr int kStateBits = 20, kMcuBits = 12, kSlackBits = 14;
constexpr long kMostCounted = (1L << kMcuBits) - 1, kNoSlack = (1L << kSlackBits) - 1;
constexpr long kUnlimited = std::numeric_limits<long>::max();

// Whether bytes can stand in a scan at all, which has FF before 00, RSTn and EOI only.
bool in_scan(const std::string& bytes) {
  for (std::size_t i = 0; i + 1 < bytes.size(); ++i) {
    const auto next = static_cast<std::uint8_t>(bytes[i + 1]);
    if (static_cast<std::uint8_t>(bytes[i]) == kFF && next != 0 && (next < 0xD0 || next > 0xD9)) return false;
  }
  return true;
}

}  // namespace

Grammar::Grammar(Scan scan, std::string head, std::vector<std::string> tokens, std::size_t memory)
    : scan_(std::move(scan)),
      head_(std::move(head)),
      tokens_(std::move(tokens)),
      sorted_(tokens_.size()),
      shared_(tokens_.size()),
      most_rows_(std::max<std::size_t>(memory / (tokens_.size() + kPlaceBytes), 1)) {
  std::iota(sorted_.begin(), sorted_.end(), 0);
  std::sort(sorted_.begin(), sorted_.end(), [&](auto a, auto b) { return tokens_[a] < tokens_[b]; });
  for (std::size_t i = 1; i < sorted_.size(); ++i) {
    const std::string &before = tokens_[sorted_[i - 1]], &bytes = tokens_[sorted_[i]];
    const auto end = std::mismatch(before.begin(), before.end(), bytes.begin(), bytes.end());
    shared_[i] = static_cast<std::uint32_t>(end.first - before.begin());
  }
  by_length_ = sorted_;
  std::sort(by_length_.begin(), by_length_.end(),
            [&](auto a, auto b) { return tokens_[a].size() > tokens_[b].size(); });
  for (const std::string& token : tokens_) {
    longest_ = std::max(longest_, token.size());
    if (in_scan(token)) longest_in_scan_ = std::max(longest_in_scan_, token.size());
  }
  if (scan_.states() >> (kStateBits - 1))  // the first bit of a state is for keys of the head
    throw UserFault(std::to_string(scan_.states()) + " states of the Huffman tables", "are too many for the grammar");
  reach_ = static_cast<long>(longest_in_scan_ * 8) / scan_.least_bits() + 2;
  if (reach_ > kMostCounted)
    throw UserFault("a token of " + std::to_string(longest_in_scan_) + " bytes", "is too long for the grammar",
                    "train the tokenizer with --max-token-length");
  // How the bytes of the cheapest MCUs come to lie has to be known for all that are left in the interval.
  countable_ = scan_.layout().interval && scan_.layout().interval <= reach_ && scan_.most_added() < kNoSlack;
}

Fault Grammar::step(Cursor& at, std::uint8_t byte) const {
  if (static_cast<std::size_t>(at.head) == head_.size()) return scan_.step(at.scan, byte);
  if (static_cast<std::uint8_t>(head_[at.head]) != byte) return Fault::kHead;
  ++at.head;
  return Fault::kNone;
}

bool Grammar::read(Cursor& at, std::size_t token) const {
  Cursor then = at;
  for (const char byte : tokens_[token])
    if (step(then, static_cast<std::uint8_t>(byte)) != Fault::kNone) return false;
  at = then;
  return true;
}

long Grammar::finish(const Cursor& at) const {
  return static_cast<long>(head_.size()) - at.head + scan_.finish(at.scan);
}

void Grammar::allow(const Cursor& at, long left, std::uint8_t* to) {
  // By how much the way to the end may become longer, the byte that a token takes off it included.
  long slack = left < 0 ? kUnlimited : left - finish(at);
  if (slack < 0) slack = kUnlimited;
  const long most = scan_.most_added();
  const bool ranges = !scan_.layout().ranges.empty();
  if (slack <= most) {
    if (ranges || !countable_) return build(at, left, to);
    std::memcpy(to, row(at, slack), tokens_.size());
    return;
  }
  std::memcpy(to, row(at, kNoSlack), tokens_.size());
  if (ranges) {
    const std::size_t doubtful = std::count(to, to + tokens_.size(), kDoubtful);
    if (doubtful > tokens_.size() / 4) {
      build(at, -1, to);
    } else if (doubtful) {
      for (std::size_t token = 0; token < tokens_.size(); ++token)
        if (to[token] == kDoubtful) {
          Cursor then = at;
          to[token] = read(then, token);
        }
    }
  }
  for (const std::uint32_t token : by_length_) {
    if (slack > most * static_cast<long>(tokens_[token].size())) break;
    if (!to[token]) continue;
    Cursor then = at;
    read(then, token);
    to[token] = finish(then) < left;
  }
}

std::size_t Grammar::memory() const {
  return rows_.size() + places_.size() * kPlaceBytes + scan_.memory();
}

// What a row depends on: MCUs are counted as far as a token can reach.
std::uint64_t Grammar::key(const Cursor& at, long slack) const {
  if (static_cast<std::size_t>(at.head) < head_.size())
    return ~(static_cast<std::uint64_t>(at.head) << 16 | static_cast<std::uint64_t>(slack));
  const Position& scan = at.scan;
  const auto cut = [&](long mcus) { return static_cast<std::uint64_t>(std::min(mcus, reach_)); };
  const long interval = scan_.layout().interval;
  const std::uint64_t restart = interval ? scan.mcus / interval % 8 : 0;
  std::uint64_t key = static_cast<std::uint64_t>(slack);
  key = key << kStateBits | static_cast<std::uint64_t>(scan.state);
  key = key << 6 | scan.phase << 3 | restart;
  key = key << kMcuBits | cut(scan_.mcus_left_in_interval(scan));
  return key << kMcuBits | cut(scan_.layout().mcus - scan.mcus);
}

const std::uint8_t* Grammar::row(const Cursor& at, long slack) {
  const std::uint64_t name = key(at, slack);
  const auto found = places_.find(name);
  if (found != places_.end()) return rows_.data() + found->second;
  if (places_.size() == most_rows_) places_.clear(), rows_.clear();
  const std::size_t place = rows_.size();
  rows_.resize(place + tokens_.size());
  Cursor from = at;
  from.scan.noting = !scan_.layout().ranges.empty();
  build(from, slack == kNoSlack ? -1 : slack + finish(at), rows_.data() + place);
  places_.emplace(name, place);
  return rows_.data() + place;
}

void Grammar::build(const Cursor& at, long left, std::uint8_t* row) const {
  // Where the bytes of the token before were read to, one after the other; tokens in the order of their bytes
  // share them.
  std::vector<Cursor> read(longest_ + 1, at);
  Bytes first;
  const bool in_scan = static_cast<std::size_t>(at.head) == head_.size();
  if (in_scan) scan_.step_all(at.scan, first);
  std::size_t valid = 0;
  for (std::size_t i = 0; i < sorted_.size(); ++i) {
    const std::string& bytes = tokens_[sorted_[i]];
    valid = std::min<std::size_t>(valid, shared_[i]);
    // A byte that the two share and that was refused is refused again.
    bool good = i == 0 || valid == shared_[i];
    while (good && valid < bytes.size()) {
      const auto byte = static_cast<std::uint8_t>(bytes[valid]);
      if (valid == 0 && in_scan) {
        good = first.good[byte];
        read[1].scan = first.position[byte];
      } else {
        read[valid + 1] = read[valid];
        good = step(read[valid + 1], byte) == Fault::kNone;
      }
      valid += good;
    }
    good = good && (left < 0 || finish(read[bytes.size()]) < left);
    row[sorted_[i]] = !good ? kRefused : read[bytes.size()].scan.noted ? kDoubtful : kAllowed;
  }
}

}  // namespace jpeg
