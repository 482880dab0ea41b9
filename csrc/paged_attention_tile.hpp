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

// So many numbers into the second cache, to be there when they are needed: blocks lie anywhere, and each is
// too short for the processor to see where it goes on.
AMX_INLINE void prefetch(const bf16* from, long count) {
  for (long i = 0; i < count; i += 32) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
}

AMX_INLINE __m128i load_eight(const bf16* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// 32 rows of values, of which those from `valid` on count as zeros, as left factors with the keys along their
// columns: tiles [d / 16]. Eight registers hold 8 numbers of all 32 rows, and are transposed within their
// lanes. Brings 32 rows at `ahead` nearer, unless it is null.
template <int D>
AMX_TARGET inline void pack_values(const bf16* rows, long valid, const bf16* ahead, bf16* tiles) {
  alignas(64) bf16 padded[32 * D];
  if (valid < 32) {
    for (long i = 0; i < 32 * D; i += 32)
      _mm512_store_si512(padded + i, i < valid * D ? _mm512_loadu_si512(rows + i) : _mm512_setzero_si512());
    rows = padded;
  }
  for (int c = 0; c < D; c += 8) {
    if (ahead != nullptr) prefetch(ahead + c * 32, 8 * 32);
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

// 2 to the power of x, to 3e-6 relative, and 1 for 0: a polynomial in the part behind the point, which the
// instruction of scaling cuts off by itself.
AMX_INLINE __m512 weight_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(1.3426684e-2f);
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.2242474e-2f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.4128020e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.9304484e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, x);
}

// The largest of `keys` scores, of which the first `clear` all count; a multiple of 4, like `clear`.
template <int N>
AMX_INLINE __m512 largest(const float* scores, long keys, long clear, long place, __m512i limits) {
  __m512 high[4];  // one would wait for itself
  for (auto& each : high) each = _mm512_set1_ps(kNone);
  for (long k = 0; k < clear; k += 4)
    for (int i = 0; i < 4; ++i) high[i] = _mm512_max_ps(high[i], _mm512_load_ps(scores + (k + i) * N * 16));
  for (long k = clear; k < keys; ++k)
    high[0] =
        _mm512_mask_max_ps(high[0], before(place + k, limits), high[0], _mm512_load_ps(scores + k * N * 16));
  return _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
}

// Weights of 32 keys, as tiles [N]; their sums are added to `sum`. Brings 32 keys at `ahead` nearer.
template <int D, int N, bool kMasked>
AMX_INLINE void weigh_block(const float* scores, __m512 factor, const __m512* most, long place,
                            const __m512i* limits, const bf16* ahead, __m512* sum, bf16* weights) {
  for (long k = 0; k < 32; k += 2) {
    for (int t = 0; t < N; ++t) {
      __m512 p[2];
      for (int odd = 0; odd < 2; ++odd) {
        const __m512 score = _mm512_load_ps(scores + ((k + odd) * N + t) * 16);
        p[odd] = weight_of(_mm512_fmsub_ps(score, factor, most[t]));
        if constexpr (kMasked) p[odd] = _mm512_maskz_mov_ps(before(place + k + odd, limits[t]), p[odd]);
      }
      sum[t] = _mm512_add_ps(sum[t], _mm512_add_ps(p[0], p[1]));
      _mm512_store_si512(weights + t * kTile + k * 16, interleave_halves(amx::round(p[0], p[1])));
    }
    if (ahead != nullptr) prefetch(ahead + k * D, 2 * D);
  }
}

// Queries against blocks first to first + count - 1 of a split, going on from what `to` has if first is not
// 0. keys: where `known` blocks are, from the split's first on; behind each that is computed, the one `ahead`
// is brought nearer. values: those of the `count` blocks, packed. A column sees the first limits[column] keys
// of the split; all columns see the first `full` blocks.
template <int D, int N>
AMX_TARGET inline void attend(const bf16* query, const bf16* const* keys, const bf16* values, long first,
                              long count, long ahead, long known, long full, const std::int32_t* limits,
                              float scale, Partial<D>& to) {
  alignas(64) float scores[kChunk * 32 * N * 16];
  alignas(64) bf16 weights[kChunk * N * kTile];
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most[N], sum[N];
  __m512i limit[N];
  for (int t = 0; t < N; ++t) {
    most[t] = first > 0 ? _mm512_load_ps(to.most + t * 16) : _mm512_set1_ps(kNone);
    sum[t] = first > 0 ? _mm512_load_ps(to.total + t * 16) : _mm512_setzero_ps();
    limit[t] = _mm512_loadu_si512(limits + t * 16);
  }
  for (const long end = first + count; first < end; first += kChunk) {
    const long blocks = end - first < kChunk ? end - first : kChunk;
    for (long k = 0; k < blocks; ++k) score_product<D, N>(keys[first + k], query, scores + k * 32 * N * 16);
    const long clear = full - first < 0 ? 0 : full - first < blocks ? full - first : blocks;
    bool moved = false;
    __m512 correction[N];
    for (int t = 0; t < N; ++t) {
      __m512 high = largest<N>(scores + t * 16, blocks * 32, clear * 32, first * 32, limit[t]);
      high = _mm512_max_ps(_mm512_mul_ps(high, factor), most[t]);
      correction[t] = weight_of(_mm512_sub_ps(most[t], high));
      moved |= _mm512_cmp_ps_mask(most[t], high, _CMP_NEQ_OQ) != 0;
      most[t] = high;
      sum[t] = _mm512_mul_ps(sum[t], correction[t]);
    }
    for (long k = 0; k < blocks; ++k) {
      const bf16* fetched = first + k + ahead < known ? keys[first + k + ahead] : nullptr;
      const float* from = scores + k * 32 * N * 16;
      bf16* weight = weights + k * N * kTile;
      if (k < clear)
        weigh_block<D, N, false>(from, factor, most, 0, limit, fetched, sum, weight);
      else
        weigh_block<D, N, true>(from, factor, most, (first + k) * 32, limit, fetched, sum, weight);
    }
    if (first > 0 && moved)
      for (long i = 0; i < D; ++i)
        for (int t = 0; t < N; ++t) {
          float* at = to.sums + (i * N + t) * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), correction[t]));
        }
    value_product<D, N>(values, weights, blocks, first > 0, to.sums);
    values += kChunk * 32 * D;
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
