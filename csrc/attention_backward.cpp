// Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023),
// algorithm 2. As in the forward pass scores are held transposed, keys by queries. One thread computes a whole
// group of heads, keys outside and queries inside, so sums are taken in one order whatever the number of threads.
#include "attention.hpp"

#include <cstdlib>
#include <memory>
#include <vector>

#include "attention_pack.hpp"
#include "buffer.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

constexpr long kSide = 2;  // blocks of 32 keys, and of 32 queries, that are computed together

// What one thread needs of a group of heads. A name says how a matrix is packed: as left or right factor, and
// `_t` if transposed.
template <int D>
struct BackwardBuffers {
  explicit BackwardBuffers(long blocks)
      : key_left(blocks * 32 * D), key_left_t(blocks * 32 * D), value_left(blocks * 32 * D),
        query_right(blocks * 32 * D), query_right_t(blocks * 32 * D), gradient_right(blocks * 32 * D),
        gradient_right_t(blocks * 32 * D), lse(blocks * 32), along(blocks * 32), to_query(blocks * 32 * D),
        to_key(blocks * 32 * D), to_value(blocks * 32 * D) {}

  Buffer<bf16> key_left, key_left_t, value_left;
  Buffer<bf16> query_right, query_right_t, gradient_right, gradient_right_t;
  Buffer<float> lse, along;  // along: the sum over d of output times its gradient
  Buffer<float> to_query, to_key, to_value;  // blocks of 32 x 32; to_query transposed
};

// Of kSide * kSide blocks of 32 x 32: the weights P and the gradients of the scores as left factors (keys by
// queries), and the latter as right factors (keys the inner dimension).
struct Scores {
  alignas(64) bf16 weights[kSide * kSide * 2 * kTile];
  alignas(64) bf16 left[kSide * kSide * 2 * kTile];
  alignas(64) bf16 right[kSide * kSide * 2 * kTile];
};

// Block (i, j) of Scores, from blocks k of the keys and q of the queries.
template <int D>
AMX_TARGET void score_block(const BackwardBuffers<D>& all, long k, long q, float scale, Scores& to, long i, long j) {
  alignas(64) float scores[1024], to_weights[1024];
  constexpr long kInner = D / 32;
  product(scores, 32, all.key_left.data() + k * 32 * D, kInner * kTile, kTile,
          all.query_right_t.data() + q * 32 * D, kInner * kTile, kTile, kInner, false);
  product(to_weights, 32, all.value_left.data() + k * 32 * D, kInner * kTile, kTile,
          all.gradient_right_t.data() + q * 32 * D, kInner * kTile, kTile, kInner, false);
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 lse[2], along[2];
  for (int t = 0; t < 2; ++t) {
    lse[t] = _mm512_load_ps(all.lse.data() + q * 32 + t * 16);
    along[t] = _mm512_load_ps(all.along.data() + q * 32 + t * 16);
  }
  for (long pair = 0; pair < 16; ++pair) {
    __m512 p[2][2], gradient[2][2];
    for (int odd = 0; odd < 2; ++odd) {
      const long r = 2 * pair + odd;
      for (int t = 0; t < 2; ++t) {
        p[odd][t] = amx::exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + r * 32 + t * 16), factor, lse[t]));
        if (k == q) {  // on the diagonal a key counts for the queries from its own place on
          const __mmask16 seen = static_cast<__mmask16>((0xffffffffu << r) >> (t * 16));
          p[odd][t] = _mm512_maskz_mov_ps(seen, p[odd][t]);
        }
        const __m512 inward = _mm512_load_ps(to_weights + r * 32 + t * 16);
        gradient[odd][t] = _mm512_mul_ps(p[odd][t], _mm512_sub_ps(inward, along[t]));
      }
      const long at = ((i * 2 + r / 16) * kSide + j) * kTile + (r % 16) * 32;
      store(to.weights + at, p[odd][0], p[odd][1]);
      store(to.left + at, gradient[odd][0], gradient[odd][1]);
    }
    for (int t = 0; t < 2; ++t)
      _mm512_store_si512(to.right + ((j * 2 + t) * kSide + i) * kTile + pair * 32,
                         interleave_halves(amx::round(gradient[0][t], gradient[1][t])));
  }
}

// All of one head; `first` if it is the first of its group, whose gradients of keys and values are added up.
template <int D>
AMX_TARGET void backward_head(BackwardBuffers<D>& all, long blocks, float scale, bool first) {
  Scores scores;
  constexpr long kBlock = 32 * D, kWide = D / 16 * kTile, kNext = kSide * kTile;
  for (long k0 = 0; k0 < blocks; k0 += kSide)
    for (long q0 = k0; q0 < blocks; q0 += kSide) {
      const long k1 = k0 + kSide < blocks ? k0 + kSide : blocks, q1 = q0 + kSide < blocks ? q0 + kSide : blocks;
      for (long k = k0; k < k1; ++k)
        for (long q = q0 > k ? q0 : k; q < q1; ++q) score_block<D>(all, k, q, scale, scores, k - k0, q - q0);
      for (long k = k0; k < k1; ++k) {
        const long q = q0 > k ? q0 : k;
        if (q >= q1) continue;
        const long at = (k - k0) * 2 * kNext + (q - q0) * kTile;
        const bool add = !first || q0 > k0;
        for (long d = 0; d < D / 32; ++d) {
          product(all.to_value.data() + k * kBlock + d * 1024, 32, scores.weights + at, kNext, kTile,
                  all.gradient_right.data() + q * kBlock + d * 2 * kTile, kTile, kWide, q1 - q, add);
          product(all.to_key.data() + k * kBlock + d * 1024, 32, scores.left + at, kNext, kTile,
                  all.query_right.data() + q * kBlock + d * 2 * kTile, kTile, kWide, q1 - q, add);
        }
      }
      for (long q = q0; q < q1; ++q) {
        const long end = q + 1 < k1 ? q + 1 : k1;
        for (long d = 0; d < D / 32; ++d)
          product(all.to_query.data() + q * kBlock + d * 1024, 32,
                  all.key_left_t.data() + k0 * kBlock + d * 2 * kTile, kTile, kWide,
                  scores.right + (q - q0) * 2 * kNext, kNext, kTile, end - k0, k0 > 0);
      }
    }
}

struct Tensors {
  Heads query, key, value, output, to_output, to_query, to_key, to_value;
  const float* lse;
};

template <int D>
AMX_TARGET void backward_group(const AttentionShape& shape, const Angles& angles, const Tensors& x,
                               BackwardBuffers<D>& all, long b, long g) {
  alignas(64) bf16 rows[32 * D];
  const Tiles configured;
  const long blocks = (shape.sequence + 31) / 32, share = shape.heads / shape.groups;
  const auto at = [](const Heads& heads, long s, long b, long n) {
    return heads.data + s * heads.s + b * heads.b + n * heads.n;
  };
  const auto valid = [&](long block) {
    return shape.sequence - block * 32 < 32 ? shape.sequence - block * 32 : 32L;
  };
  for (long k = 0; k < blocks; ++k) {
    const long s = k * 32;
    const float *cos = angles.cos + s * (D / 2), *sin = angles.sin + s * (D / 2);
    read_rows<D>(at(x.key, s, b, g), x.key.s, valid(k), cos, sin, rows);
    pack_left<D>(rows, all.key_left.data() + s * D);
    pack_left_transposed<D>(rows, all.key_left_t.data() + s * D);
    read_rows<D>(at(x.value, s, b, g), x.value.s, valid(k), nullptr, nullptr, rows);
    pack_left<D>(rows, all.value_left.data() + s * D);
  }
  for (long n = g * share; n < (g + 1) * share; ++n) {
    for (long q = 0; q < blocks; ++q) {
      const long s = q * 32;
      const float *cos = angles.cos + s * (D / 2), *sin = angles.sin + s * (D / 2);
      read_rows<D>(at(x.query, s, b, n), x.query.s, valid(q), cos, sin, rows);
      pack_right<D>(rows, all.query_right.data() + s * D);
      pack_right_transposed<D>(rows, all.query_right_t.data() + s * D);
      read_rows<D>(at(x.to_output, s, b, n), x.to_output.s, valid(q), nullptr, nullptr, rows);
      pack_right<D>(rows, all.gradient_right.data() + s * D);
      pack_right_transposed<D>(rows, all.gradient_right_t.data() + s * D);
      for (long i = 0; i < 32; ++i) {
        __m512 sum = _mm512_setzero_ps();
        if (i < valid(q)) {
          const bf16* output = at(x.output, s + i, b, n);
          for (int d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(load(output + d), load(rows + i * D + d), sum);
        }
        all.along.data()[s + i] = _mm512_reduce_add_ps(sum);
        all.lse.data()[s + i] = i < valid(q) ? x.lse[(b * shape.heads + n) * shape.sequence + s + i] : 0.0f;
      }
    }
    backward_head<D>(all, blocks, shape.scale * 1.44269504f, n == g * share);
    for (long q = 0; q < blocks; ++q) {
      const long s = q * 32;
      float* block = all.to_query.data() + s * D;
      transpose_blocks<D>(block);
      write_rows<D>(block, shape.scale, valid(q), angles.cos + s * (D / 2), angles.sin + s * (D / 2),
                    at(x.to_query, s, b, n), x.to_query.s);
    }
  }
  for (long k = 0; k < blocks; ++k) {
    const long s = k * 32;
    write_rows<D>(all.to_key.data() + s * D, shape.scale, valid(k), angles.cos + s * (D / 2),
                  angles.sin + s * (D / 2), at(x.to_key, s, b, g), x.to_key.s);
    write_rows<D>(all.to_value.data() + s * D, 1.0f, valid(k), nullptr, nullptr, at(x.to_value, s, b, g),
                  x.to_value.s);
  }
}

template <int D>
void backward(const Team& team, const AttentionShape& shape, const Angles& angles, const Tensors& tensors) {
  std::vector<std::unique_ptr<BackwardBuffers<D>>> buffers(team.workers(shape.batch * shape.groups));
  for (auto& each : buffers) each = std::make_unique<BackwardBuffers<D>>((shape.sequence + 31) / 32);
  team.run(shape.batch * shape.groups, [&](int worker, auto next) {
    for (long task; (task = next()) >= 0;)
      backward_group<D>(shape, angles, tensors, *buffers[worker], task / shape.groups, task % shape.groups);
  });
}

}  // namespace

void attention_backward(const Team& team, const AttentionShape& shape, const Angles& angles, const Heads& query,
                        const Heads& key, const Heads& value, const Heads& output, const float* lse,
                        const Heads& to_output, const Heads& to_query, const Heads& to_key, const Heads& to_value) {
  const Tensors tensors{query, key, value, output, to_output, to_query, to_key, to_value, lse};
  const auto compute = shape.width == 32 ? backward<32> : shape.width == 64 ? backward<64> : backward<128>;
  compute(team, shape, angles, tensors);
}

#else

void attention_backward(const Team&, const AttentionShape&, const Angles&, const Heads&, const Heads&,
                        const Heads&, const Heads&, const float*, const Heads&, const Heads&, const Heads&,
                        const Heads&) {
  std::abort();  // has_amx() is false
}

#endif
