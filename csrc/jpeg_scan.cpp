#include "jpeg_scan.hpp"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "fault.hpp"

namespace jpeg {
namespace {

constexpr int kMaxDcSize = 11, kMaxAcSize = 10;  // T.81 tables F.1 and F.2, for 8 bits a sample
constexpr int kZeroRun = 0xF0, kEndOfBlock = 0x00;
constexpr int kLastCoefficient = 63;
constexpr int kPartials = 15;  // nothing of a byte; or 1 to 7 bits of it, all ones or not
constexpr std::uint8_t kFF = 0xFF, kRestart = 0xD0, kEndOfImage = 0xD9;
constexpr long kMarkerBytes = 2;

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

// A Huffman code: where a bit leads from a node.
struct Trie {
  static constexpr int kNone = -1, kSymbol = -2;  // a symbol s is kSymbol - s
  std::vector<std::array<int, 2>> next{{kNone, kNone}};

  explicit Trie(const HuffmanTable& table) {
    std::size_t at = 0;
    long code = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1)
      for (int i = 0; i < table.counts[length - 1]; ++i, ++code) {
        if (code >> length || at == table.symbols.size())
          throw UserFault("a Huffman table", "has more codes of a length than there can be, or than symbols");
        add(code, length, table.symbols[at++]);
      }
  }

  void add(long code, int length, int symbol) {
    int node = 0;
    for (int i = length - 1; i > 0; --i) {
      const int bit = code >> i & 1;
      if (next[node][bit] == kNone) {
        next[node][bit] = static_cast<int>(next.size());
        next.push_back({kNone, kNone});
      }
      node = next[node][bit];
    }
    next[node][code & 1] = kSymbol - symbol;
  }
};

int magnitude(int size, int value) {  // T.81 F.2.2.1, EXTEND
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

}  // namespace

Scan::Scan(ScanLayout layout) : layout_(std::move(layout)) {
  build();

  // The way to the end of the MCU: by bits, or, where the values of coefficients count, by codes without any.
  const std::size_t count = next_.size();
  const auto ways = [&](long price) {
    std::vector<long> ways(count, 1L << 40);
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
  const std::vector<long> least = ways(layout_.ranges.empty() ? 1 : 1000);
  least_bits_ = static_cast<int>(layout_.ranges.empty() ? least[0] : ways(1)[0]);
  const auto way = [&](std::int32_t next) { return next < 0 ? 1L << 41 : next == 0 ? 0 : least[next]; };
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
    const Ends ends = cheapest(0, layout_.interval);
    interval_bytes_ = ends.bytes + padding(ends.partial);
  }

  // A byte can lead away from the end of the MCU, by the longest way there is, and change how the bytes of the
  // MCUs behind it come to lie.
  long longest = 0;
  for (std::size_t state = 0; state < count; ++state) {
    long bits = 0;
    for (auto at = static_cast<std::int32_t>(state); bits == 0 || at != 0; ++bits) at = next_[at][shorter_[at]];
    longest = std::max(longest, bits);
  }
  most_added_ = 2 * (longest / 8 + 1) + 4;
  for (const auto& ends : doubled_) {
    const auto [least_bytes, most_bytes] =
        std::minmax_element(ends.begin(), ends.end(), [](const Ends& a, const Ends& b) { return a.bytes < b.bytes; });
    most_added_ += most_bytes->bytes - least_bytes->bytes;
  }
}

// Numbers the states in the order in which they are met, from the beginning of an MCU.
void Scan::build() {
  const std::size_t components = layout_.dc.size();
  std::vector<Trie> dc, ac;
  for (std::size_t c = 0; c < components; ++c) dc.emplace_back(layout_.dc[c]), ac.emplace_back(layout_.ac[c]);

  // Of a component, whether a node of its AC code leads to an end of the block, from coefficient k, where
  // `run` says that sixteen zeros precede.
  std::vector<std::vector<signed char>> known(components);
  for (std::size_t c = 0; c < components; ++c) known[c].assign(ac[c].next.size() * 128, -1);
  struct Viable {
    const ScanLayout& layout;
    const std::vector<Trie>& ac;
    std::vector<std::vector<signed char>>& known;

    bool node(int c, int node, int k, bool run) {
      signed char& answer = known[c][(node * 64 + k) * 2 + run];
      if (answer < 0) {
        answer = 0;
        for (const int next : ac[c].next[node]) answer |= to(c, next, k, run);
      }
      return answer;
    }
    bool to(int c, int next, int k, bool run) {
      if (next == Trie::kNone) return false;
      return next >= 0 ? node(c, next, k, run) : symbol(c, Trie::kSymbol - next, k, run);
    }
    bool symbol(int c, int symbol, int k, bool run) {
      const int zeros = symbol >> 4, size = symbol & 15, at = k + zeros;
      if (symbol == kEndOfBlock) return !(layout.canonical && run);
      if (symbol == kZeroRun) return k + 16 <= kLastCoefficient && node(c, 0, k + 16, layout.canonical);
      if (size == 0 || size > kMaxAcSize || at > kLastCoefficient) return false;
      if (!layout.ranges.empty()) {
        const Range& range = layout.ranges[c];
        if (std::max(range.high[at], -range.low[at]) < 1 << (size - 1)) return false;
      }
      return at == kLastCoefficient || node(c, 0, at + 1, false);
    }
  } viable{layout_, ac, known};

  using Key = std::tuple<int, int, int, int, int, bool>;  // kind, block, coefficient, node or size, left, run
  std::map<Key, std::int32_t> numbers;
  std::vector<Key> keys;
  const auto number = [&](const Key& key) {
    const auto [place, added] = numbers.try_emplace(key, static_cast<std::int32_t>(keys.size()));
    if (added) keys.push_back(key);
    return place->second;
  };
  const int blocks = static_cast<int>(layout_.blocks.size());
  const auto begin_block = [&](int block) { return number({kDcCode, block % blocks, 0, 0, 0, false}); };
  const auto begin_code = [&](int block, int k, bool run) {
    return k > kLastCoefficient ? begin_block(block + 1) : number({kAcCode, block, k, 0, 0, run});
  };
  begin_block(0);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto [kind, block, k, node, left, run] = keys[i];
    const int c = layout_.blocks[block];
    std::array<std::int32_t, 2> next{-1, -1};
    for (int bit = 0; bit < 2; ++bit) {
      if (kind == kDcBits || kind == kAcBits) {
        next[bit] = left > 1 ? number({kind, block, k, node, left - 1, false}) : begin_code(block, k + 1, false);
        continue;
      }
      const int to = (kind == kDcCode ? dc : ac)[c].next[node][bit];
      if (kind == kDcCode) {
        const int size = Trie::kSymbol - to;
        if (to >= 0)
          next[bit] = number({kind, block, k, to, 0, false});
        else if (to != Trie::kNone && size <= kMaxDcSize)
          next[bit] = size ? number({kDcBits, block, k, size, size, false}) : begin_code(block, 1, false);
      } else if (viable.to(c, to, k, run)) {
        const int symbol = Trie::kSymbol - to, at = k + (symbol >> 4), size = symbol & 15;
        if (to >= 0)
          next[bit] = number({kind, block, k, to, 0, run});
        else if (symbol == kEndOfBlock)
          next[bit] = begin_block(block + 1);
        else if (symbol == kZeroRun)
          next[bit] = begin_code(block, k + 16, layout_.canonical);
        else
          next[bit] = number({kAcBits, block, at, size, size, false});
      }
    }
    next_.push_back(next);
  }
  // DC codes of larger differences than there are, and blocks that their AC code cannot end.
  for (bool changed = true; changed;) {
    changed = false;
    for (auto& next : next_)
      for (auto& to : next)
        if (to >= 0 && next_[to][0] < 0 && next_[to][1] < 0) to = -1, changed = true;
  }
  if (next_[0][0] < 0 && next_[0][1] < 0)
    throw UserFault("the Huffman tables", "have no codes for a whole MCU", "take another file");
  for (const auto& [kind, block, k, node, left, run] : keys) {
    const bool bits = kind == kDcBits || kind == kAcBits;
    about_.push_back({static_cast<Kind>(kind), static_cast<std::uint8_t>(block), static_cast<std::uint8_t>(k),
                      static_cast<std::uint8_t>(bits ? node : 0), static_cast<std::uint8_t>(left), 0});
  }
  // From the last state back to the first: what comes of a DC code has a larger number.
  for (std::size_t i = keys.size(); i-- > 0;)
    if (about_[i].kind == kDcCode)
      for (const std::int32_t to : next_[i])
        if (to >= 0)
          about_[i].sizes |= about_[to].kind == kDcCode ? about_[to].sizes
                             : about_[to].kind == kDcBits ? static_cast<std::uint16_t>(1 << about_[to].size)
                                                          : 1;
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

Fault Scan::read(Position& at, int bit) const {
  const std::int32_t next = next_[at.state][bit];
  if (next < 0) return Fault::kCode;
  if (!layout_.ranges.empty()) {
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

// Bytes behind a marker that follows so many MCUs.
long Scan::rest(long done) const {
  const long left = layout_.mcus - done;
  if (left == 0) return 0;
  const long interval = layout_.interval ? layout_.interval : left;
  const long whole = layout_.interval ? left / interval : 0, more = left - whole * interval;
  long bytes = whole * (interval_bytes_ + kMarkerBytes);
  if (more) {
    const Ends ends = cheapest(0, more);
    bytes += ends.bytes + padding(ends.partial) + kMarkerBytes;
  }
  return bytes;
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
  Position then = at;
  Writer writer{0};
  do {
    int bit = shorter_[then.state];
    if (read(then, bit) != Fault::kNone) read(then, bit = !bit);
    writer.put(bit);
  } while (then.state != 0);
  ++then.mcus;
  const long more = at_marker(then) ? 0 : mcus_left_in_interval(then);
  const Ends ends = cheapest(writer.partial, more);
  return (at.phase == Position::kStuff) + writer.bytes + ends.bytes + padding(ends.partial) + kMarkerBytes +
         rest(then.mcus + more);
}

}  // namespace jpeg
