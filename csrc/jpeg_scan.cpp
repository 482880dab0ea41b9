#include "jpeg_scan.hpp"

#include <algorithm>
#include <utility>

#include "fault.hpp"

namespace jpeg {
namespace {

constexpr int kPartials = 15;  // nothing of a byte; or 1 to 7 bits of it, all ones or not
constexpr std::uint8_t kFF = 0xFF, kRestart = 0xD0, kEndOfImage = 0xD9;
constexpr long kMarkerBytes = 2;
constexpr long kNoWay = 1L << 40;
constexpr long kValuePrice = 1 << 16;  // of a bit, more than a block without values has bits

constexpr int partial_of(int bits, bool ones) { return bits == 0 ? 0 : 2 * bits - 1 + ones; }
constexpr int bits_of(int partial) { return (partial + 1) / 2; }
constexpr bool ones_of(int partial) { return partial % 2 == 0; }

// The bytes to which ones fill a byte that has begun, a stuffed 00 included.
constexpr long padding(int partial) { return partial == 0 ? 0 : ones_of(partial) ? 2 : 1; }

// A byte on its way, for counting.
struct Writer {
  int partial;
  long bytes = 0;

  void put(int bit) {
    const int bits = bits_of(partial) + 1;
    const bool ones = (partial == 0 || ones_of(partial)) && bit;
    partial = partial_of(bits % 8, ones);
    if (bits == 8) bytes += ones ? 2 : 1;
  }
};

int magnitude(int size, int value) {  // T.81 F.2.2.1, EXTEND
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

}  // namespace

Scan::Scan(ScanLayout layout) : layout_(std::move(layout)) {
  build();
  for (std::size_t c = 0; c < layout_.ranges.size(); ++c) {
    const std::vector<std::uint8_t>& sizes = layout_.dc[c].symbols;
    const int size = *std::min_element(sizes.begin(), sizes.end());
    // With a size that fits both ways from zero, one of them fits from everywhere.
    if (size && 1 << (size - 1) > std::min(layout_.ranges[c].high[0], -layout_.ranges[c].low[0]))
      throw UserFault("the Huffman tables", "have no code for a DC coefficient within its range");
  }

  // The way to the end of the MCU: by bits, or, where the values of coefficients count, by codes without any.
  const std::size_t count = next_.size();
  const auto ways = [&](long price) {
    std::vector<long> ways(count, kNoWay);
    for (bool changed = true; changed;) {
      changed = false;
      for (std::size_t state = count; state-- > 0;)
        for (const std::int32_t next : next_[state]) {
          if (next < 0) continue;
          const long value = about_[state].left ? price : 1;
          const long way = value + (next == 0 ? 0 : ways[next]);
          if (way < ways[state]) ways[state] = way, changed = true;
        }
    }
    return ways;
  };
  const std::vector<long> least = ways(layout_.ranges.empty() ? 1 : kValuePrice);
  least_bits_ = static_cast<int>(layout_.ranges.empty() ? least[0] : ways(1)[0]);
  const auto way = [&](std::int32_t next) { return next < 0 ? kNoWay : next == 0 ? 0 : least[next]; };
  shorter_.resize(count);
  for (std::size_t state = 0; state < count; ++state)
    shorter_[state] = way(next_[state][1]) < way(next_[state][0]);

  std::vector<int> cheapest_bits;
  for (std::int32_t state = 0; cheapest_bits.empty() || state != 0; state = next_[state][cheapest_bits.back()])
    cheapest_bits.push_back(shorter_[state]);
  doubled_.emplace_back();
  for (int partial = 0; partial < kPartials; ++partial) {
    Writer writer{partial};
    for (const int bit : cheapest_bits) writer.put(bit);
    doubled_[0][partial] = {writer.partial, writer.bytes};
  }
  for (long n = 2; n <= layout_.mcus; n *= 2) {
    const auto& half = doubled_.back();
    std::array<Ends, kPartials> whole;
    for (int partial = 0; partial < kPartials; ++partial) {
      const Ends& second = half[half[partial].partial];
      whole[partial] = {second.partial, half[partial].bytes + second.bytes};
    }
    doubled_.push_back(whole);
  }
  if (layout_.interval) {
    const auto bytes = [&](long mcus) {
      const Ends ends = cheapest(0, mcus);
      return ends.bytes + padding(ends.partial) + kMarkerBytes;
    };
    const long more = layout_.mcus % layout_.interval;
    if (layout_.interval <= layout_.mcus) interval_bytes_ = bytes(layout_.interval);
    if (more) last_bytes_ = bytes(more);
  }

  // Coefficients that cannot be zero may have to take other values than the cheapest, so nothing is counted ahead.
  valued_ = !layout_.ranges.empty() && least[0] >= kValuePrice;

  // A byte can lead away from the end of the MCU, by the longest way there is, and change how the bytes of the
  // MCUs behind it come to lie.
  long longest = 0;
  ends_.resize(count);
  for (std::size_t state = 0; state < count; ++state) {
    if (least[state] >= kNoWay) continue;  // nothing leads there any more
    Writer writer{0};
    auto at = static_cast<std::int32_t>(state);
    do {
      writer.put(shorter_[at]);
      at = next_[at][shorter_[at]];
    } while (at != 0);
    const bool free = layout_.ranges.empty() || least[state] < kValuePrice;
    ends_[state] = {static_cast<std::uint16_t>(writer.bytes), static_cast<std::uint8_t>(writer.partial), free};
    longest = std::max(longest, writer.bytes + 1);
  }
  most_added_ = valued_ ? kNoWay : longest + 6;
  for (const auto& ends : doubled_) {
    const auto [least_bytes, most_bytes] =
        std::minmax_element(ends.begin(), ends.end(), [](const Ends& a, const Ends& b) { return a.bytes < b.bytes; });
    most_added_ += most_bytes->bytes - least_bytes->bytes;
  }
}

bool Scan::at_marker(const Position& at) const {
  return at.mcus == layout_.mcus || (layout_.interval && at.mcus % layout_.interval == 0);
}

long Scan::mcus_left_in_interval(const Position& at) const {
  const long left = layout_.mcus - at.mcus;
  return layout_.interval ? std::min(left, layout_.interval - at.mcus % layout_.interval) : left;
}

// Whether a bit leads to coefficients within their range. There is always one that does.
bool Scan::in_range(const Position& at, int bit, std::int32_t next) const {
  const About& about = about_[at.state];
  if (about.kind == kAcCode) return true;  // the states know
  const int c = layout_.blocks[about.block];
  const Range& range = layout_.ranges[c];
  const int from = about.coefficient ? 0 : at.dc[c];
  const int low = range.low[about.coefficient], high = range.high[about.coefficient];
  if (about.kind == kDcCode) {
    const About& then = about_[next];
    if (then.kind == kAcCode) return true;  // no difference
    const int sizes = then.kind == kDcCode ? then.sizes : 1 << then.size;
    if (sizes & 1) return true;
    for (int size = 1; size <= kMaxDcSize; ++size) {
      const int least = 1 << (size - 1);
      if (sizes >> size & 1 && (from + least <= high || from - least >= low)) return true;
    }
    return false;
  }
  // The number nearest to zero that the bits still to come can make.
  const int left = about.left - 1, begun = at.value << 1 | bit;
  const bool positive = begun >> (about.size - left - 1);
  const int nearest = magnitude(about.size, positive ? begun << left : ((begun + 1) << left) - 1);
  return positive ? from + nearest <= high : from + nearest >= low;
}

// Whether a bit that leads from one state to the next is within the range whatever was read before.
bool Scan::always_in_range(const About& about, const About& then) const {
  if (about.kind == kAcCode) return true;
  const Range& range = layout_.ranges[layout_.blocks[about.block]];
  const int both = std::min(range.high[about.coefficient], -range.low[about.coefficient]);
  if (about.kind == kAcBits) return (1 << about.size) - 1 <= both;
  if (about.kind == kDcBits) return false;
  // A size that fits both ways from zero fits one way from everywhere.
  if (then.kind == kDcBits) return 1 << (then.size - 1) <= both;
  if (then.kind == kAcCode || then.sizes & 1) return true;
  const int smallest = then.sizes & -then.sizes;
  return smallest / 2 <= both;
}

Fault Scan::read(Position& at, int bit) const {
  const std::int32_t next = next_[at.state][bit];
  if (next < 0) return Fault::kCode;
  if (at.noting) {
    at.noted |= !always_in_range(about_[at.state], about_[next]);
  } else if (!layout_.ranges.empty()) {
    if (!in_range(at, bit, next)) return Fault::kRange;
    const About& about = about_[at.state];
    if (about.left) {
      at.value = static_cast<std::int16_t>(at.value << 1 | bit);
      if (about.left == 1) {
        if (about.kind == kDcBits)
          at.dc[layout_.blocks[about.block]] += static_cast<std::int16_t>(magnitude(about.size, at.value));
        at.value = 0;
      }
    }
  }
  at.state = next;
  return Fault::kNone;
}

Fault Scan::step(Position& at, std::uint8_t byte) const {
  switch (at.phase) {
    case Position::kData:
      for (int i = 7; i >= 0; --i) {
        if (const Fault fault = read(at, byte >> i & 1); fault != Fault::kNone) return fault;
        if (at.state != 0) continue;
        ++at.mcus;
        if (!at_marker(at)) continue;
        const int ones = (1 << i) - 1;
        if ((byte & ones) != ones) return Fault::kPadding;
        at.phase = byte == kFF ? Position::kStuffAtEnd : Position::kMarker;
        return Fault::kNone;
      }
      if (byte == kFF) at.phase = Position::kStuff;
      return Fault::kNone;
    case Position::kStuff:
    case Position::kStuffAtEnd:
      if (byte != 0) return Fault::kStuffing;
      at.phase = at.phase == Position::kStuff ? Position::kData : Position::kMarker;
      return Fault::kNone;
    case Position::kMarker:
      if (byte != kFF) return Fault::kMarker;
      at.phase = Position::kMarkerCode;
      return Fault::kNone;
    case Position::kMarkerCode: {
      const bool last = at.mcus == layout_.mcus;
      if (byte != due(at)) return Fault::kMarker;
      at.phase = last ? Position::kDone : Position::kData;
      at.dc.fill(0);
      return Fault::kNone;
    }
    case Position::kDone:
      break;
  }
  return Fault::kAfterEnd;
}

std::uint8_t Scan::due(const Position& at) const {
  if (at.mcus == layout_.mcus) return kEndOfImage;
  return static_cast<std::uint8_t>(kRestart + (at.mcus / layout_.interval - 1) % 8);
}

Scan::Ends Scan::cheapest(int partial, long mcus) const {
  Ends ends{partial, 0};
  for (std::size_t i = 0; mcus >> i; ++i)
    if (mcus >> i & 1) {
      const Ends& more = doubled_[i][ends.partial];
      ends = {more.partial, ends.bytes + more.bytes};
    }
  return ends;
}

// Bytes from a position in the data to the end, bit by bit; for when they cannot be counted ahead.
long Scan::walk(Position at) const {
  long bytes = 0;
  Writer writer{0};
  while (at.mcus < layout_.mcus) {
    writer.put(read_shorter(at));
    if (at.state != 0) continue;
    ++at.mcus;
    if (!at_marker(at)) continue;
    bytes += writer.bytes + padding(writer.partial) + kMarkerBytes;
    writer = {0};
    at.dc.fill(0);
  }
  return bytes;
}

// Bytes behind a marker that follows so many MCUs.
long Scan::rest(std::int32_t done) const {
  const long left = layout_.mcus - done;
  if (left == 0) return 0;
  if (valued_) {
    Position at;
    at.mcus = done;
    return walk(at);
  }
  return left / layout_.interval * interval_bytes_ + last_bytes_;
}

int Scan::read_shorter(Position& at) const {
  const int bit = shorter_[at.state];
  if (read(at, bit) == Fault::kNone) return bit;
  read(at, !bit);
  return !bit;
}

long Scan::finish(const Position& at) const {
  switch (at.phase) {
    case Position::kDone:
      return 0;
    case Position::kMarkerCode:
      return 1 + rest(at.mcus);
    case Position::kMarker:
      return kMarkerBytes + rest(at.mcus);
    case Position::kStuffAtEnd:
      return 1 + kMarkerBytes + rest(at.mcus);
    case Position::kStuff:
    case Position::kData:
      break;
  }
  const long stuffed = at.phase == Position::kStuff;
  if (valued_) return stuffed + walk(at);
  Ends ends{ends_[at.state].partial, ends_[at.state].bytes};
  if (!ends_[at.state].free) {
    Position then = at;
    Writer writer{0};
    do writer.put(read_shorter(then));
    while (then.state != 0);
    ends = {writer.partial, writer.bytes};
  }
  Position then;
  then.mcus = at.mcus + 1;
  const long more = at_marker(then) ? 0 : mcus_left_in_interval(then);
  const Ends whole = cheapest(ends.partial, more);
  return stuffed + ends.bytes + whole.bytes + padding(whole.partial) + kMarkerBytes +
         rest(static_cast<std::int32_t>(then.mcus + more));
}

// The bits of a byte as a tree: bytes that begin alike share what reads their first bits.
void Scan::spread(const Position& at, int left, int byte, Bytes& to) const {
  for (int bit = 0; bit < 2; ++bit) {
    Position then = at;
    if (read(then, bit) != Fault::kNone) continue;
    int value = byte | bit << left;
    bool whole = left == 0;
    if (then.state == 0) {
      ++then.mcus;
      if (at_marker(then)) {
        whole = true;
        value |= (1 << left) - 1;
        then.phase = value == kFF ? Position::kStuffAtEnd : Position::kMarker;
      }
    }
    if (!whole) {
      spread(then, left - 1, value, to);
      continue;
    }
    if (value == kFF && then.phase == Position::kData) then.phase = Position::kStuff;
    to.good[value] = true;
    to.position[value] = then;
  }
}

void Scan::step_all(const Position& at, Bytes& to) const {
  to.good.fill(false);
  if (at.phase == Position::kData) return spread(at, 7, 0, to);
  for (int byte = 0; byte < 256; ++byte) {
    to.position[byte] = at;
    to.good[byte] = step(to.position[byte], static_cast<std::uint8_t>(byte)) == Fault::kNone;
  }
}

}  // namespace jpeg
