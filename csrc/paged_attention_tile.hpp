// Up to 32 queries against the keys of a split, in AMX tiles; d is the width of a head.
//
// Scores are held transposed, keys by queries, as in attention_forward.cpp: keys are the left factor just as
// they lie in the pool, one query is one lane of the softmax, and the weights come out as a right factor.
// Columns never meet, so a query's bits do not depend on its neighbours. `N` is how many times 16 columns
// there are, 1 or 2.
#pragma once

#include "amx.hpp"

#if defined(HAVE_AMX)

namespace amx {

constexpr long kChunk = 4;       // blocks of 32 keys between two looks at the maximum
constexpr float kNone = -1e30f;  // the maximum of no scores

// scores [32, N * 16] of 32 keys in a row; query: tiles [N][d / 32].
template <int D, int N>
AMX_INLINE void score_product(const bf16* keys, const bf16* query, float* scores) {
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (N == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (long k = 0; k < D / 32; ++k) {
    _tile_loadd(6, query + k * kTile, 64);
    _tile_loadd(4, keys + k * 32, D * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, keys + 16 * D + k * 32, D * 2);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, query + (D / 32 + k) * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, N * 64);
  _tile_stored(2, scores + 16 * N * 16, N * 64);
  if constexpr (N == 2) {
    _tile_stored(1, scores + 16, N * 64);
    _tile_stored(3, scores + 16 * N * 16 + 16, N * 64);
  }
  __asm__ volatile("" ::: "memory");
}

// sums [d, N * 16] = or += values, tiles [count][d / 16], times weights, tiles [count][N].
template <int D, int N>
AMX_INLINE void value_product(const bf16* values, const bf16* weights, long count, bool add, float* sums) {
  __asm__ volatile("" ::: "memory");
  for (long i = 0; i < D / 32; ++i, sums += 32 * N * 16, values += 2 * kTile) {
    if (add) {
      _tile_loadd(0, sums, N * 64);
      _tile_loadd(2, sums + 16 * N * 16, N * 64);
      if constexpr (N == 2) {
        _tile_loadd(1, sums + 16, N * 64);
        _tile_loadd(3, sums + 16 * N * 16 + 16, N * 64);
      }
    } else {
      _tile_zero(0);
      _tile_zero(2);
      if constexpr (N == 2) {
        _tile_zero(1);
        _tile_zero(3);
      }
    }
    for (long k = 0; k < count; ++k) {
      _tile_loadd(6, weights + k * N * kTile, 64);
      _tile_loadd(4, values + k * (D / 16) * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, values + (k * (D / 16) + 1) * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, weights + (k * N + 1) * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, N * 64);
    _tile_stored(2, sums + 16 * N * 16, N * 64);
    if constexpr (N == 2) {
      _tile_stored(1, sums + 16, N * 64);
      _tile_stored(3, sums + 16 * N * 16 + 16, N * 64);
    }
  }
  __asm__ volatile("" ::: "memory");
}

AMX_INLINE __m128i load_eight(const bf16* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// 32 rows of values, of which those from `valid` on count as zeros, as left factors with the keys along their
// columns: tiles [d / 16]. Eight registers hold 8 numbers of all 32 rows, and are transposed within their
// lanes.
template <int D>
AMX_TARGET inline void pack_values(const bf16* rows, long valid, bf16* tiles) {
  alignas(64) bf16 padded[32 * D];
  if (valid < 32) {
    for (long i = 0; i < 32 * D; i += 32)
      _mm512_store_si512(padded + i, i < valid * D ? _mm512_loadu_si512(rows + i) : _mm512_setzero_si512());
    rows = padded;
  }
  for (int c = 0; c < D; c += 8) {
    __m512i r[8], t[8];
    for (int i = 0; i < 8; ++i) {
      const bf16* at = rows + i * D + c;
      r[i] = _mm512_castsi128_si512(load_eight(at));
      r[i] = _mm512_inserti32x4(r[i], load_eight(at + 8 * D), 1);
      r[i] = _mm512_inserti32x4(r[i], load_eight(at + 16 * D), 2);
      r[i] = _mm512_inserti32x4(r[i], load_eight(at + 24 * D), 3);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
      t[i + 4] = _mm512_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      r[2 * i] = _mm512_unpacklo_epi32(t[2 * i], t[2 * i + 1]);
      r[2 * i + 1] = _mm512_unpackhi_epi32(t[2 * i], t[2 * i + 1]);
    }
    bf16* to = tiles + (c / 16) * kTile + (c % 16) * 32;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 2; ++i) {
        const __m512i low = r[half * 4 + i], high = r[half * 4 + 2 + i];
        _mm512_store_si512(to + (half * 4 + i * 2) * 32, _mm512_unpacklo_epi64(low, high));
        _mm512_store_si512(to + (half * 4 + i * 2 + 1) * 32, _mm512_unpackhi_epi64(low, high));
      }
  }
}

AMX_INLINE __mmask16 before(long place, __m512i limits) {
  return _mm512_cmplt_epi32_mask(_mm512_set1_epi32(static_cast<int>(place)), limits);
}

// What a softmax has come to: output times total, transposed [d, N * 16]; of each column its maximum (scaled,
// to base 2) and total.
template <int D>
struct Partial {
  alignas(64) float sums[32 * D];
  alignas(64) float most[32], total[32];
};

// Queries against `count` blocks of 32 keys. keys: where each block is; values: packed. A column sees the
// first limits[column] of these keys; all of them see the first `full` blocks.
template <int D, int N>
AMX_TARGET inline void attend(const bf16* query, const bf16* const* keys, const bf16* values, long count,
                              long full, const std::int32_t* limits, float scale, Partial<D>& to) {
  alignas(64) float scores[kChunk * 32 * N * 16];
  alignas(64) bf16 weights[kChunk * N * kTile];
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most[N], sum[N];
  __m512i limit[N];
  for (int t = 0; t < N; ++t) {
    most[t] = _mm512_set1_ps(kNone), sum[t] = _mm512_setzero_ps();
    limit[t] = _mm512_loadu_si512(limits + t * 16);
  }
  for (long first = 0; first < count; first += kChunk) {
    const long blocks = count - first < kChunk ? count - first : kChunk;
    for (long k = 0; k < blocks; ++k) score_product<D, N>(keys[first + k], query, scores + k * 32 * N * 16);
    const long place = first * 32;
    const long clear = full - first < 0 ? 0 : (full - first < blocks ? full - first : blocks) * 32;
    bool moved = false;
    __m512 correction[N];
    for (int t = 0; t < N; ++t) {
      __m512 high = _mm512_set1_ps(kNone);
      for (long k = 0; k < clear; ++k) high = _mm512_max_ps(high, _mm512_load_ps(scores + (k * N + t) * 16));
      for (long k = clear; k < blocks * 32; ++k)
        high = _mm512_mask_max_ps(high, before(place + k, limit[t]), high,
                                  _mm512_load_ps(scores + (k * N + t) * 16));
      high = _mm512_max_ps(_mm512_mul_ps(high, factor), most[t]);
      correction[t] = amx::exp2(_mm512_sub_ps(most[t], high));
      moved |= _mm512_cmp_ps_mask(most[t], high, _CMP_NEQ_OQ) != 0;
      most[t] = high;
      sum[t] = _mm512_mul_ps(sum[t], correction[t]);
    }
    for (long k = 0; k < blocks * 32; k += 2)
      for (int t = 0; t < N; ++t) {
        __m512 p[2];
        for (int odd = 0; odd < 2; ++odd) {
          const __m512 score = _mm512_load_ps(scores + ((k + odd) * N + t) * 16);
          p[odd] = amx::exp2(_mm512_fmsub_ps(score, factor, most[t]));
          if (k >= clear) p[odd] = _mm512_maskz_mov_ps(before(place + k + odd, limit[t]), p[odd]);
          sum[t] = _mm512_add_ps(sum[t], p[odd]);
        }
        _mm512_store_si512(weights + ((k / 32) * N + t) * kTile + (k % 32) * 16,
                           interleave_halves(amx::round(p[0], p[1])));
      }
    if (first > 0 && moved)
      for (long i = 0; i < D; ++i)
        for (int t = 0; t < N; ++t) {
          float* at = to.sums + (i * N + t) * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), correction[t]));
        }
    value_product<D, N>(values + first * 32 * D, weights, blocks, first > 0, to.sums);
  }
  for (int t = 0; t < N; ++t) {
    _mm512_store_ps(to.most + t * 16, most[t]);
    _mm512_store_ps(to.total + t * 16, sum[t]);
  }
}

// How two partial results are weighed when they are put together; the new maximum and total go where the
// first's were.
struct Weights {
  __m512 old, added;
};

AMX_INLINE Weights weigh(__m512& most, __m512& total, __m512 most_added, __m512 total_added) {
  const __m512 high = _mm512_max_ps(most, most_added);
  const Weights w{amx::exp2(_mm512_sub_ps(most, high)), amx::exp2(_mm512_sub_ps(most_added, high))};
  most = high;
  total = _mm512_fmadd_ps(total_added, w.added, _mm512_mul_ps(total, w.old));
  return w;
}

AMX_INLINE void add_weighed(float* sums, const float* added, const Weights& w) {
  const __m512 old = _mm512_mul_ps(_mm512_load_ps(sums), w.old);
  _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(added), w.added, old));
}

template <int D, int N>
AMX_TARGET inline void fold(Partial<D>& into, const Partial<D>& added) {
  for (int t = 0; t < N; ++t) {
    __m512 most = _mm512_load_ps(into.most + t * 16), total = _mm512_load_ps(into.total + t * 16);
    const Weights w =
        weigh(most, total, _mm512_load_ps(added.most + t * 16), _mm512_load_ps(added.total + t * 16));
    _mm512_store_ps(into.most + t * 16, most);
    _mm512_store_ps(into.total + t * 16, total);
    for (long i = 0; i < D; ++i) add_weighed(into.sums + (i * N + t) * 16, added.sums + (i * N + t) * 16, w);
  }
}

}  // namespace amx

#endif
