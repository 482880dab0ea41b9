// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1, by blocks.
#include "row_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "paged_plan.hpp"

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

namespace {

using bf16 = std::uint16_t;
constexpr int kLanes = 8;

ALWAYS_INLINE void widen(const float* from, long count, float* to) { std::copy_n(from, count, to); }
ALWAYS_INLINE void widen(const bf16* from, long count, float* to) {
  for (long i = 0; i < count; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// The numbers themselves where they are floats, or else widened into `place`.
ALWAYS_INLINE const float* widened(const float* from, long, float*) { return from; }
ALWAYS_INLINE const float* widened(const bf16* from, long count, float* place) {
  widen(from, count, place);
  return place;
}

ALWAYS_INLINE void narrow(float number, float* to) { *to = number; }
// To the nearest, ties to even.
ALWAYS_INLINE void narrow(float number, bf16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  *to = std::isnan(number) ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Sums by lanes, so that compilers need not be allowed to reorder them.
ALWAYS_INLINE float dot(const float* a, const float* b, long width) {
  float sums[kLanes] = {};
  for (long i = 0; i < width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <typename T>
struct Call {
  const PagedShape& shape;
  const T* query;
  const std::int64_t* positions;
  const PoolOf<T>& pool;
  const Pieces& pieces;
  const Plan& plan;
  const std::vector<long>& rows;  // that see anything
  T* output;
};

// Of one thread.
struct Scratch {
  std::vector<float> query, sums, keys, values, scores;

  explicit Scratch(const PagedShape& shape)
      : query(shape.width), sums(shape.width), keys(shape.block * shape.width),
        values(shape.block * shape.width), scores(shape.block) {}
};

// One query of a row against all of its pieces.
template <typename T>
ALWAYS_INLINE void attend(const Call<T>& call, long row, long head, Scratch& scratch) {
  const PagedShape& shape = call.shape;
  const long width = shape.width, group = head / (shape.heads / shape.groups);
  const long place = (row * shape.heads + head) * width;
  float *query = scratch.query.data(), *sums = scratch.sums.data(), *scores = scratch.scores.data();
  widen(call.query + place, width, query);
  for (long i = 0; i < width; ++i) query[i] *= shape.scale, sums[i] = 0;
  float most = -std::numeric_limits<float>::infinity(), total = 0;
  for (long s = call.plan.seen_first[row]; s < call.plan.seen_first[row + 1]; ++s) {
    const long piece = call.plan.seen[s].piece;
    const std::int32_t* block = call.pieces.blocks + call.pieces.block_offsets[piece];
    const long seen = std::min<long>(call.pieces.lengths[piece],
                                     call.positions[row] - call.pieces.starts[piece] + 1);
    for (long first = 0; first < seen; first += shape.block, ++block) {
      const long count = std::min(shape.block, seen - first);
      const long at = (*block * shape.groups + group) * shape.block * width;
      const float* keys = widened(call.pool.keys + at, count * width, scratch.keys.data());
      float highest = most;
      for (long t = 0; t < count; ++t) {
        scores[t] = dot(query, keys + t * width, width);
        highest = std::max(highest, scores[t]);
      }
      if (highest > most) {
        const float kept = std::exp(most - highest);  // 0 the first time
        total *= kept;
        for (long i = 0; i < width; ++i) sums[i] *= kept;
        most = highest;
      }
      const float* values = widened(call.pool.values + at, count * width, scratch.values.data());
      for (long t = 0; t < count; ++t) {
        const float weight = std::exp(scores[t] - most);
        total += weight;
        for (long i = 0; i < width; ++i) sums[i] += weight * values[t * width + i];
      }
    }
  }
  const float inverse = total > 0 ? 1 / total : 0;
  for (long i = 0; i < width; ++i) narrow(sums[i] * inverse, call.output + place + i);
}

// Heads after heads: rows that share a piece find it in the processor's cache.
template <typename T, typename Next>
ALWAYS_INLINE void work(const Call<T>& call, Next next, Scratch& scratch) {
  const long rows = static_cast<long>(call.rows.size());
  for (long task = next(); task >= 0; task = next())
    attend(call, call.rows[task % rows], task / rows, scratch);
}

#if defined(__GNUC__) && defined(__x86_64__)
template <typename T, typename Next>
__attribute__((target("avx2,fma"))) void work_avx2(const Call<T>& call, Next next, Scratch& scratch) {
  work(call, next, scratch);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
template <typename T, typename Next>
void work_avx2(const Call<T>& call, Next next, Scratch& scratch) {
  work(call, next, scratch);
}
bool has_avx2() { return false; }
#endif

}  // namespace

template <typename T>
void row_attention(const Team& team, const PagedShape& shape, long tokens, const T* query,
                   const std::int64_t* positions, const PoolOf<T>& pool, const Pieces& pieces, T* output) {
  if (tokens == 0) return;
  const Plan plan(shape, tokens, {nullptr, nullptr, pool.blocks}, pieces, 1);
  std::vector<long> rows;
  for (long row = 0; row < tokens; ++row)
    if (plan.seen_first[row] < plan.seen_first[row + 1]) rows.push_back(row);
  const Call<T> call{shape, query, positions, pool, pieces, plan, rows, output};
  const long tasks = static_cast<long>(rows.size()) * shape.heads;
  const bool fast = has_avx2();
  team.run(tasks, [&](int, auto next) {
    Scratch scratch(shape);
    if (fast)
      work_avx2(call, next, scratch);
    else
      work(call, next, scratch);
  });
}

template void row_attention(const Team&, const PagedShape&, long, const float*, const std::int64_t*,
                            const PoolOf<float>&, const Pieces&, float*);
template void row_attention(const Team&, const PagedShape&, long, const bf16*, const std::int64_t*,
                            const PoolOf<bf16>&, const Pieces&, bf16*);
