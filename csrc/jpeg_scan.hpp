// The entropy-coded scan of a baseline JPEG as an automaton that reads byte after byte.
//
// Inside, states of the bits: a node of a Huffman code, or bits that follow it, each with the block of the MCU and
// the coefficient it stands at. They know nothing of what was decoded but that; how many MCUs are complete, and
// what a marker is due for, a `Position` counts.
// Source: ITU-T T.81, annex F.2 (decoding), B.1.1.5 (byte stuffing), E.1.4 and F.1.2.3 (padding, restart markers).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace jpeg {

constexpr int kMaxComponents = 4;
constexpr int kMaxDcSize = 11;  // T.81 table F.1, for 8 bits a sample

// T.81 C.1: how many codes of each length from 1 to 16, and their symbols in order.
struct HuffmanTable {
  std::array<int, 16> counts;
  std::vector<std::uint8_t> symbols;
};

// What is quantized lies within these, both included, in zigzag order; [0] is the DC coefficient, not its difference.
struct Range {
  std::array<int, 64> low, high;
};

struct ScanLayout {
  std::vector<int> blocks;  // of an MCU, the component of each in order
  std::vector<HuffmanTable> dc, ac;  // of each component
  long mcus;                         // of the scan
  long interval;                     // MCUs between restart markers, 0 for none
  bool canonical;                    // no run of zeros before the end of a block
  std::vector<Range> ranges;         // of each component, or none
};

// Why a byte is refused.
enum class Fault : std::uint8_t {
  kNone,
  kCode,      // no Huffman code begins so, or one that leads beyond the 64th coefficient
  kRange,     // a coefficient that no picture of 8 bits has
  kStuffing,  // FF in the data is followed by something else than 00
  kPadding,   // the bits behind the last MCU before a marker are not ones
  kMarker,    // not the marker that is due
  kAfterEnd,  // a byte behind EOI
  kHead,      // not the head that the stream has to have
};

// Where a scan stands between two bytes.
struct Position {
  enum Phase : std::uint8_t {
    kData,
    kStuff,        // FF came: 00 is due, and data goes on
    kStuffAtEnd,   // FF came, the last byte before a marker: 00 is due
    kMarker,       // FF of a marker is due
    kMarkerCode,   // and its second byte
    kDone,         // EOI came
  };
  std::int32_t state = 0;  // of the bits; 0 is the beginning of an MCU
  std::int32_t mcus = 0;   // complete
  Phase phase = kData;
  std::int16_t value = 0;                           // of the bits that follow a code, so far; with ranges only
  std::array<std::int16_t, kMaxComponents> dc = {};  // what is predicted; with ranges only
  // Instead of refusing what is out of range, note that something might be: then value and dc do not count.
  bool noting = false, noted = false;
};

// Where each of the 256 bytes leads to, if it is not refused.
struct Bytes {
  std::array<bool, 256> good;
  std::array<Position, 256> position;
};

class Scan {
 public:
  // Throws UserFault for a layout in which no MCU can be coded.
  explicit Scan(ScanLayout layout);

  // Reads a byte. After a fault the position is where the byte was refused.
  Fault step(Position& at, std::uint8_t byte) const;
  // Reads every byte there is.
  void step_all(const Position& at, Bytes& to) const;

  // Bytes of the shortest continuation that this class knows, up to and with EOI; reading its first byte makes it
  // shorter by one.
  long finish(const Position& at) const;

  // An upper bound of finish(after) - finish(before) over a byte.
  long most_added() const { return most_added_; }
  // Of an MCU.
  int least_bits() const { return least_bits_; }
  // Bytes of the tables of the bits.
  std::size_t memory() const {
    return next_.size() * (sizeof(next_[0]) + sizeof(About) + sizeof(shorter_[0]) + sizeof(ends_[0]));
  }
  // The second byte of the marker that comes next, where one is due.
  std::uint8_t due(const Position& at) const;

  long mcus_left_in_interval(const Position& at) const;
  const ScanLayout& layout() const { return layout_; }
  std::size_t states() const { return next_.size(); }
  int block(const Position& at) const { return about_[at.state].block; }
  int coefficient(const Position& at) const { return about_[at.state].coefficient; }

 private:
  enum Kind : std::uint8_t { kDcCode, kAcCode, kDcBits, kAcBits };
  struct About {
    Kind kind;
    std::uint8_t block, coefficient;  // the coefficient that a code or its bits stand at, 0 to 63
    std::uint8_t size, left;          // of the bits behind a code: how many, and how many are to come
    std::uint16_t sizes;              // of a DC code: a bit for each size that can still come
  };
  struct Ends {  // of a run of cheapest MCUs: how the last byte stands, and how many bytes were completed
    int partial;
    long bytes;
  };
  struct ShortEnds {  // the same of an MCU
    std::uint16_t bytes;
    std::uint8_t partial;
    bool free;  // the values of coefficients do not count on this way
  };

  void build();
  bool in_range(const Position& at, int bit, std::int32_t next) const;
  bool always_in_range(const About& about, const About& then) const;
  Fault read(Position& at, int bit) const;
  bool at_marker(const Position& at) const;
  Ends cheapest(int partial, long mcus) const;
  int read_shorter(Position& at) const;
  long walk(Position at) const;
  long rest(std::int32_t mcus_done) const;
  void spread(const Position& at, int left, int byte, Bytes& to) const;

  ScanLayout layout_;
  std::vector<std::array<std::int32_t, 2>> next_;  // [state][bit]; -1 where there is none
  std::vector<About> about_;
  std::vector<std::uint8_t> shorter_;  // the bit that leads to the end of the MCU sooner
  std::vector<ShortEnds> ends_;        // of the MCU, from the state at the beginning of a byte on that way
  int least_bits_ = 0;
  bool valued_ = false;  // that way leads through coefficients whose values count
  std::vector<std::array<Ends, 15>> doubled_;  // [i][partial]: of 2^i cheapest MCUs
  long interval_bytes_ = 0, last_bytes_ = 0;  // of the cheapest whole interval, and the last if it is shorter
  long most_added_ = 0;
};

}  // namespace jpeg
