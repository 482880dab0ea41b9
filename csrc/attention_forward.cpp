// Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023),
// algorithm 1. Scores are held transposed, keys by queries: the maxima and sums of the softmax then go down the
// columns, one query a lane, and the exponentials come out as the right factor of the next product.
#include "attention.hpp"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention_pack.hpp"
#include "buffer.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

constexpr long kKeys = 4;  // blocks of 32 keys between two looks at the maximum

// What one thread needs: keys and values of a group as tiles.
template <int D>
struct ForwardBuffers {
  explicit ForwardBuffers(long blocks) : key(blocks * 32 * D), value(blocks * 32 * D) {}
  Buffer<bf16> key, value;
};

// 32 queries against all keys before them: `sums` gets the output times `total`, transposed, [d / 32] blocks.
template <int D>
AMX_TARGET void attend(const bf16* query, const ForwardBuffers<D>& group, long q, float scale, float* sums,
                       float* maximum, float* total) {
  alignas(64) float scores[kKeys * 1024];
  alignas(64) bf16 weights[kKeys * 2 * kTile];
  constexpr long kInner = D / 32;
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most[2], sum[2];
  for (int t = 0; t < 2; ++t) most[t] = _mm512_set1_ps(-1e30f), sum[t] = _mm512_setzero_ps();
  for (long first = 0; first <= q; first += kKeys) {
    const long count = q + 1 - first < kKeys ? q + 1 - first : kKeys;
    for (long k = 0; k < count; ++k)
      product(scores + k * 1024, 32, group.key.data() + (first + k) * 32 * D, kInner * kTile, kTile, query,
              kInner * kTile, kTile, kInner, false);
    // Of the last block, which lies on the diagonal, a key counts for the queries from its own place on.
    const long diagonal = first + count > q ? (count - 1) * 32 : count * 32;
    bool moved = false;
    __m512 correction[2];
    for (int t = 0; t < 2; ++t) {
      __m512 high = _mm512_set1_ps(-1e30f);
      for (long k = 0; k < diagonal; ++k) high = _mm512_max_ps(high, _mm512_load_ps(scores + k * 32 + t * 16));
      for (long k = diagonal; k < count * 32; ++k) {
        const __mmask16 seen = static_cast<__mmask16>((0xffffffffu << (k - diagonal)) >> (t * 16));
        high = _mm512_mask_max_ps(high, seen, high, _mm512_load_ps(scores + k * 32 + t * 16));
      }
      high = _mm512_max_ps(_mm512_mul_ps(high, factor), most[t]);
      correction[t] = amx::exp2(_mm512_sub_ps(most[t], high));
      moved |= _mm512_cmp_ps_mask(most[t], high, _CMP_NEQ_OQ) != 0;
      most[t] = high;
      sum[t] = _mm512_mul_ps(sum[t], correction[t]);
    }
    for (long k = 0; k < count * 32; k += 2) {
      for (int t = 0; t < 2; ++t) {
        __m512 p[2];
        for (int odd = 0; odd < 2; ++odd) {
          const __m512 score = _mm512_load_ps(scores + (k + odd) * 32 + t * 16);
          p[odd] = amx::exp2(_mm512_fmsub_ps(score, factor, most[t]));
          if (k >= diagonal) {
            const long place = k + odd - diagonal;
            const __mmask16 seen = static_cast<__mmask16>((0xffffffffu << place) >> (t * 16));
            p[odd] = _mm512_maskz_mov_ps(seen, p[odd]);
          }
          sum[t] = _mm512_add_ps(sum[t], p[odd]);
        }
        _mm512_store_si512(weights + ((k / 32) * 2 + t) * kTile + (k % 32) * 16,
                           interleave_halves(amx::round(p[0], p[1])));
      }
    }
    if (first > 0 && moved)
      for (long i = 0; i < D; ++i)
        for (int t = 0; t < 2; ++t) {
          float* at = sums + i * 32 + t * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), correction[t]));
        }
    for (long d = 0; d < kInner; ++d)
      product(sums + d * 1024, 32, group.value.data() + first * 32 * D + d * 2 * kTile, kTile, D / 16 * kTile,
              weights, kTile, 2 * kTile, count, first > 0);
  }
  for (int t = 0; t < 2; ++t) {
    _mm512_store_ps(maximum + t * 16, most[t]);
    _mm512_store_ps(total + t * 16, sum[t]);
  }
}

template <int D>
AMX_TARGET void forward_group(const AttentionShape& shape, const Angles& angles, const Heads& query,
                              const Heads& key, const Heads& value, const Heads& output, float* lse,
                              ForwardBuffers<D>& buffers, long b, long g) {
  alignas(64) bf16 rows[32 * D], tiles[32 * D];
  alignas(64) float sums[32 * D], maximum[32], total[32];
  const Tiles configured;
  const long blocks = (shape.sequence + 31) / 32, share = shape.heads / shape.groups;
  const float scale = shape.scale * 1.44269504f;  // the exponentials are to base 2
  for (long k = 0; k < blocks; ++k) {
    const long s = k * 32, valid = shape.sequence - s < 32 ? shape.sequence - s : 32;
    const float *cos = angles.cos + s * (D / 2), *sin = angles.sin + s * (D / 2);
    read_rows<D>(key.data + s * key.s + b * key.b + g * key.n, key.s, valid, cos, sin, rows);
    pack_left<D>(rows, buffers.key.data() + s * D);
    read_rows<D>(value.data + s * value.s + b * value.b + g * value.n, value.s, valid, nullptr, nullptr, rows);
    pack_left_transposed<D>(rows, buffers.value.data() + s * D);
  }
  for (long n = g * share; n < (g + 1) * share; ++n)
    for (long q = 0; q < blocks; ++q) {
      const long s = q * 32, valid = shape.sequence - s < 32 ? shape.sequence - s : 32;
      const float *cos = angles.cos + s * (D / 2), *sin = angles.sin + s * (D / 2);
      read_rows<D>(query.data + s * query.s + b * query.b + n * query.n, query.s, valid, cos, sin, rows);
      pack_right_transposed<D>(rows, tiles);
      attend<D>(tiles, buffers, q, scale, sums, maximum, total);
      for (int t = 0; t < 2; ++t) {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(total + t * 16));
        for (long i = 0; i < D; ++i) {
          float* at = sums + i * 32 + t * 16;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), inverse));
        }
      }
      transpose_blocks<D>(sums);
      bf16* to = output.data + s * output.s + b * output.b + n * output.n;
      write_rows<D>(sums, 1.0f, valid, nullptr, nullptr, to, output.s);
      float* row = lse + (b * shape.heads + n) * shape.sequence + s;
      for (long i = 0; i < valid; ++i) row[i] = maximum[i] + std::log2(total[i]);
    }
}

template <int D>
void forward(const Team& team, const AttentionShape& shape, const Angles& angles, const Heads& query,
             const Heads& key, const Heads& value, const Heads& output, float* lse) {
  std::vector<std::unique_ptr<ForwardBuffers<D>>> buffers(team.workers(shape.batch * shape.groups));
  for (auto& each : buffers) each = std::make_unique<ForwardBuffers<D>>((shape.sequence + 31) / 32);
  team.run(shape.batch * shape.groups, [&](int worker, auto next) {
    for (long task; (task = next()) >= 0;)
      forward_group<D>(shape, angles, query, key, value, output, lse, *buffers[worker], task / shape.groups,
                       task % shape.groups);
  });
}

}  // namespace

void attention_forward(const Team& team, const AttentionShape& shape, const Angles& angles, const Heads& query,
                       const Heads& key, const Heads& value, const Heads& output, float* lse) {
  const auto compute = shape.width == 32 ? forward<32> : shape.width == 64 ? forward<64> : forward<128>;
  compute(team, shape, angles, query, key, value, output, lse);
}

#else

void attention_forward(const Team&, const AttentionShape&, const Angles&, const Heads&, const Heads&, const Heads&,
                       const Heads&, float*) {
  std::abort();  // has_amx() is false
}

#endif
