// The states of the bits of a JPEG scan, made from its Huffman tables.
#include <algorithm>
#include <map>
#include <tuple>

#include "fault.hpp"
#include "jpeg_scan.hpp"

namespace jpeg {
namespace {

constexpr int kMaxAcSize = 10;  // T.81 table F.2, for 8 bits a sample
constexpr int kZeroRun = 0xF0, kEndOfBlock = 0x00;
constexpr int kLastCoefficient = 63;

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

}  // namespace

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

}  // namespace jpeg
