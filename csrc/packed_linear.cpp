#include "packed_linear.hpp"

#include <cstdlib>
#include <type_traits>

#include "amx.hpp"
#include "buffer.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

constexpr long kStep = 32;          // inputs of a tile
constexpr long kPanel = 32;         // channels of two tiles
constexpr long kNumbers = 2 * kTile;  // of a step of a panel
constexpr long kAhead = 2;          // steps between the conversion of a tile and its product
constexpr long kRing = 4;           // steps of converted tiles that are kept
constexpr long kTasks = 2;          // of a thread: panels that lie together, for what is asked for ahead
// For many rows: steps converted together, which with as much of x and the sums fill most of the first cache;
// and numbers of x computed together, half of the second.
constexpr long kChunk = 8, kBlock = 1 << 19;
// Bytes of the weight asked for ahead of their conversion: into the second cache, whose queue to memory is
// longer, and on into the first.
constexpr long kFar = 8192, kNear = 1024;

template <typename Number>
constexpr bool kWidens = std::is_same_v<Number, std::int8_t>;

AMX_INLINE void ask_ahead(const void* line) {
  const char* from = static_cast<const char*>(line);
  _mm_prefetch(from + kFar, _MM_HINT_T1);
  _mm_prefetch(from + kNear, _MM_HINT_T0);
}

// The bytes of two tiles to bf16, 2^24 times as large: a byte goes to the top of a 32-bit word, and that is
// made fp32, whose upper half is all of it.
AMX_INLINE void widen(const std::int8_t* from, bf16* to) {
  // From byte 1 or 2 to byte 3, the others zero; and the upper half of a word to its lower half.
  const __m512i one = _mm512_set4_epi32(0x0dffffff, 0x09ffffff, 0x05ffffff, 0x01ffffff);
  const __m512i two = _mm512_set4_epi32(0x0effffff, 0x0affffff, 0x06ffffff, 0x02ffffff);
  const __m512i down = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  const __mmask64 low = 0x3333333333333333;
  for (int i = 0; i < kNumbers / 64; ++i) {
    const __m512i bytes = _mm512_load_si512(from + i * 64);
    ask_ahead(from + i * 64);
    const __m512i a = (__m512i)_mm512_cvtepi32_ps(_mm512_slli_epi32(bytes, 24));
    const __m512i b = (__m512i)_mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, one));
    const __m512i c = (__m512i)_mm512_cvtepi32_ps(_mm512_shuffle_epi8(bytes, two));
    const __m512i d = (__m512i)_mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(0xff << 24)));
    _mm512_store_si512(to + i * 64, _mm512_mask_shuffle_epi8(b, low, a, down));
    _mm512_store_si512(to + i * 64 + 32, _mm512_mask_shuffle_epi8(d, low, c, down));
  }
}

// Sums [rows, 32] to y [rows, out] from channel `first` on, whole cache lines at a time.
template <typename Number>
AMX_TARGET void finish(const float* sums, long rows, const PackedWeight<Number>& weight, long first, bf16* y) {
  __m512 low = _mm512_set1_ps(1), high = low;
  if constexpr (kWidens<Number>) {
    const __m512 undo = _mm512_set1_ps(0x1p-24f);
    low = _mm512_mul_ps(_mm512_loadu_ps(weight.scales + first), undo);
    high = _mm512_mul_ps(_mm512_loadu_ps(weight.scales + first + 16), undo);
  }
  const long channels = weight.out - first;
  const __mmask32 mask = channels < kPanel ? (1u << channels) - 1 : ~0u;
  for (long r = 0; r < rows; ++r) {
    const float* sum = sums + r * kPanel;
    const __m512i numbers =
        round(_mm512_mul_ps(_mm512_loadu_ps(sum), low), _mm512_mul_ps(_mm512_loadu_ps(sum + 16), high));
    _mm512_mask_storeu_epi16(y + r * weight.out + first, mask, numbers);
  }
}

// Up to 32 rows times a panel. A tile is converted while the products of earlier ones are under way, since
// tiles are loaded from the cache and not from stores that are still on their way there.
template <bool more, typename Number>
AMX_TARGET void few_rows(const bf16* x, const PackedWeight<Number>& weight, const Number* panel, bf16* ring,
                         float* sums) {
  constexpr long kBehind = kWidens<Number> ? kAhead : 0;
  const long steps = weight.in / kStep, stride = weight.in * 2;
  _tile_zero(0);
  _tile_zero(1);
  if (more) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long step = 0; step < steps + kBehind; ++step) {
    const bf16* tiles;
    if constexpr (kWidens<Number>) {
      if (step < steps) widen(panel + step * kNumbers, ring + step % kRing * kNumbers);
      if (step < kBehind) continue;
      tiles = ring + (step - kBehind) % kRing * kNumbers;
    } else {
      tiles = panel + step * kNumbers;
      for (long i = 0; i < kNumbers; i += 32) ask_ahead(tiles + i);
    }
    __asm__ volatile("" ::: "memory");
    const bf16* rows = x + (step - kBehind) * kStep;
    _tile_loadd(4, rows, stride);
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (more) {
      _tile_loadd(5, rows + 16 * weight.in, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kPanel * 4);
  _tile_stored(1, sums + 16, kPanel * 4);
  if (more) {
    _tile_stored(2, sums + 16 * kPanel, kPanel * 4);
    _tile_stored(3, sums + 16 * kPanel + 16, kPanel * 4);
  }
  __asm__ volatile("" ::: "memory");
}

// Rows [rows, in], zeros behind the last, to [tiles of 16 rows][steps], for the tiles of the pair `pair`.
AMX_TARGET void pack_rows(const bf16* x, long rows, long in, long pair, bf16* packed) {
  for (long r = pair * 32; r < pair * 32 + 32; ++r) {
    bf16* to = packed + r / 16 * 16 * in + r % 16 * kStep;
    for (long k = 0; k < in / kStep; ++k) {
      const __m512i row = r < rows ? _mm512_loadu_si512(x + r * in + k * kStep) : _mm512_setzero_si512();
      _mm512_store_si512(to + k * kTile, row);
    }
  }
}

// All rows, packed, times a panel, of which a chunk at a time is converted and used for every row.
template <typename Number>
AMX_TARGET void many_rows(const bf16* packed, long pairs, const PackedWeight<Number>& weight,
                          const Number* panel, bf16* chunk, float* sums) {
  const long steps = weight.in / kStep, chunks = (steps + kChunk - 1) / kChunk;
  for (long c = 0; c < chunks; ++c) {
    const long first = steps * c / chunks, count = steps * (c + 1) / chunks - first;
    const bf16* tiles;
    if constexpr (kWidens<Number>) {
      for (long k = 0; k < count; ++k) widen(panel + (first + k) * kNumbers, chunk + k * kNumbers);
      tiles = chunk;
    } else {
      tiles = panel + first * kNumbers;
    }
    for (long pair = 0; pair < pairs; ++pair)
      product(sums + pair * 32 * kPanel, kPanel, packed + (pair * 2 * steps + first) * kTile, steps * kTile,
              kTile, tiles, kTile, kNumbers, count, c > 0);
  }
}

// Calls body(next) on every thread, where next() gives the panels, each to one thread, and then -1.
template <typename Body>
void over_panels(const Team& team, long out, const Body& body) {
  const long panels = (out + kPanel - 1) / kPanel, workers = team.workers(panels);
  const long tasks = workers * kTasks < panels ? workers * kTasks : panels;
  team.run(tasks, [&](int, auto next) {
    long panel = 0, end = 0;
    body([&] {
      if (panel == end) {
        const long task = next();
        if (task < 0) return -1l;
        panel = panels * task / tasks, end = panels * (task + 1) / tasks;
      }
      return panel++;
    });
  });
}

}  // namespace

template <typename Number>
void packed_linear(const Team& team, long rows, const bf16* x, const PackedWeight<Number>& weight, bf16* y) {
  if (rows <= 0) return;
  if (rows <= 32) {
    over_panels(team, weight.out, [&](auto next) {
      alignas(64) bf16 ring[kRing * kNumbers];
      alignas(64) float sums[32 * kPanel];
      const Tiles tiles(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 16);
      for (long p; (p = next()) >= 0;) {
        const Number* panel = weight.packed + p * kPanel * weight.in;
        if (rows > 16)
          few_rows<true>(x, weight, panel, ring, sums);
        else
          few_rows<false>(x, weight, panel, ring, sums);
        finish(sums, rows, weight, p * kPanel, y);
      }
    });
    return;
  }
  const long most = kBlock / weight.in < 32 ? 32 : kBlock / weight.in / 32 * 32;
  if (rows > most) {
    packed_linear(team, most, x, weight, y);
    packed_linear(team, rows - most, x + most * weight.in, weight, y + most * weight.out);
    return;
  }
  const long pairs = (rows + 31) / 32;
  const Buffer<bf16> packed(pairs * 32 * weight.in);
  team.run(pairs, [&](int, auto next) {
    for (long pair; (pair = next()) >= 0;) pack_rows(x, rows, weight.in, pair, packed.data());
  });
  over_panels(team, weight.out, [&](auto next) {
    const Buffer<bf16> chunk(kChunk * kNumbers);
    const Buffer<float> sums(pairs * 32 * kPanel);
    const Tiles tiles;
    for (long p; (p = next()) >= 0;) {
      const Number* panel = weight.packed + p * kPanel * weight.in;
      many_rows(packed.data(), pairs, weight, panel, chunk.data(), sums.data());
      finish(sums.data(), rows, weight, p * kPanel, y);
    }
  });
}

#else

// has_amx() is false here, and nobody calls this.
template <typename Number>
void packed_linear(const Team&, long, const std::uint16_t*, const PackedWeight<Number>&, std::uint16_t*) {
  std::abort();
}

#endif

template void packed_linear(const Team&, long, const std::uint16_t*, const PackedWeight<std::int8_t>&,
                            std::uint16_t*);
template void packed_linear(const Team&, long, const std::uint16_t*, const PackedWeight<std::uint16_t>&,
                            std::uint16_t*);
