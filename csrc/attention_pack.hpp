// Rows of a head to and from AMX tiles, 32 rows at a time; d is the width of the head.
//
// Each layout takes 32 * d numbers for 32 rows, and its tiles lie so that amx::product can step through them.
#pragma once

#include "amx.hpp"
#include "attention.hpp"

#if defined(HAVE_AMX)

namespace amx {

// Reads `valid` rows, turns them by their angles unless `cos` is null, and fills up with zeros.
template <int D>
AMX_TARGET void read_rows(const bf16* from, long stride, long valid, const float* cos, const float* sin,
                          bf16* rows) {
  constexpr int kHalf = D / 2;
  for (long r = 0; r < 32; ++r, rows += D) {
    for (int i = 0; i < kHalf; i += 16) {
      __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
      if (r < valid) {
        first = load(from + r * stride + i), second = load(from + r * stride + kHalf + i);
        if (cos != nullptr) {
          const __m512 c = _mm512_loadu_ps(cos + r * kHalf + i), s = _mm512_loadu_ps(sin + r * kHalf + i);
          const __m512 x = first;
          first = _mm512_fnmadd_ps(second, s, _mm512_mul_ps(x, c));
          second = _mm512_fmadd_ps(x, s, _mm512_mul_ps(second, c));
        }
      }
      store(rows + i, first);
      store(rows + kHalf + i, second);
    }
  }
}

// Writes `valid` of 32 fp32 rows, given as d / 32 blocks of 32 x 32: multiplied by `scale` and turned back.
template <int D>
AMX_TARGET void write_rows(const float* blocks, float scale, long valid, const float* cos, const float* sin,
                           bf16* to, long stride) {
  constexpr int kHalf = D / 2;
  const __m512 factor = _mm512_set1_ps(scale);
  for (long r = 0; r < valid; ++r) {
    for (int i = 0; i < kHalf; i += 16) {
      const int j = i + kHalf;
      __m512 first = _mm512_mul_ps(_mm512_load_ps(blocks + (i / 32) * 1024 + r * 32 + i % 32), factor);
      __m512 second = _mm512_mul_ps(_mm512_load_ps(blocks + (j / 32) * 1024 + r * 32 + j % 32), factor);
      if (cos != nullptr) {
        const __m512 c = _mm512_loadu_ps(cos + r * kHalf + i), s = _mm512_loadu_ps(sin + r * kHalf + i);
        const __m512 x = first;
        first = _mm512_fmadd_ps(second, s, _mm512_mul_ps(x, c));
        second = _mm512_fnmadd_ps(x, s, _mm512_mul_ps(second, c));
      }
      store(to + r * stride + i, first);
      store(to + r * stride + j, second);
    }
  }
}

// Transposes d / 32 blocks of 32 x 32 in place.
template <int D>
AMX_TARGET void transpose_blocks(float* blocks) {
  alignas(64) float other[1024];
  for (int block = 0; block < D / 32; ++block, blocks += 1024) {
    for (int i = 0; i < 32; i += 16)
      for (int j = 0; j < 32; j += 16) transpose(blocks + i * 32 + j, 128, other + j * 32 + i, 128);
    for (int i = 0; i < 1024; i += 16) _mm512_store_ps(blocks + i, _mm512_load_ps(other + i));
  }
}

// X as a left factor: tiles [2 of 16 rows][d / 32].
template <int D>
AMX_TARGET void pack_left(const bf16* rows, bf16* tiles) {
  for (int r = 0; r < 32; ++r)
    for (int k = 0; k < D / 32; ++k)
      _mm512_store_si512(tiles + ((r / 16) * (D / 32) + k) * kTile + (r % 16) * 32,
                         _mm512_load_si512(rows + r * D + k * 32));
}

// X transposed as a right factor: tiles [2 of 16 columns][d / 32].
template <int D>
AMX_TARGET void pack_right_transposed(const bf16* rows, bf16* tiles) {
  for (int n = 0; n < 2; ++n)
    for (int k = 0; k < D / 32; ++k)
      transpose(rows + n * 16 * D + k * 32, D * 2, tiles + (n * (D / 32) + k) * kTile, 64);
}

// X as a right factor, its 32 rows the inner dimension: tiles [d / 16].
template <int D>
AMX_TARGET void pack_right(const bf16* rows, bf16* tiles) {
  for (int pair = 0; pair < 16; ++pair)
    for (int n = 0; n < D / 16; ++n) {
      const bf16* at = rows + 2 * pair * D + n * 16;
      const __m256i even = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
      const __m256i odd = _mm256_load_si256(reinterpret_cast<const __m256i*>(at + D));
      const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_store_si512(tiles + n * kTile + pair * 32, interleave_halves(halves));
    }
}

// X transposed as a left factor, its 32 rows the inner dimension: tiles [d / 16].
template <int D>
AMX_TARGET void pack_left_transposed(const bf16* rows, bf16* tiles) {
  pack_right<D>(rows, tiles);
  for (int n = 0; n < D / 16; ++n) transpose(tiles + n * kTile, 64, tiles + n * kTile, 64);
}

}  // namespace amx

#endif
