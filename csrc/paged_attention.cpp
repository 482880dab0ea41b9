// Sources: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
// (2023), the cache; Dao et al., "Flash-Decoding for long-context inference" (2023), keys split among threads
// and merged by their log-sum-exp; Athiwaratkun et al., "Bifurcated Attention" (2024), keys that many rows
// share read once.
#include "paged_attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "attention_pack.hpp"
#include "buffer.hpp"
#include "paged_attention_tile.hpp"
#include "paged_plan.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

constexpr long kMergeRows = 16;  // of a task

// A result: d sums over the keys, then the maximum and the total.
template <int D>
constexpr long kResult = D + 16;

// What one call computes with; a column is a row of a piece times a head of the group.
template <int D>
struct Call {
  const PagedShape& shape;
  const bf16* query;
  const std::int64_t* positions;
  const Pool& pool;
  const Pieces& pieces;
  const Plan& plan;
  bf16* output;
  float* results;  // [groups][plan.results][kResult]
  long share = shape.heads / shape.groups;

  const bf16* in_pool(const bf16* from, long piece, long key, long group) const {
    const long block = pieces.blocks[pieces.block_offsets[piece] + key / shape.block];
    return from + ((block * shape.groups + group) * shape.block + key % shape.block) * D;
  }
  long row(long piece, long column) const { return pieces.rows[pieces.row_offsets[piece] + column / share]; }
  long head(long group, long column) const { return group * share + column % share; }
  float* result(long group, long piece, long split, long column) const {
    const long columns = (pieces.row_offsets[piece + 1] - pieces.row_offsets[piece]) * share;
    return results + (group * plan.results + plan.first[piece] + split * columns + column) * kResult<D>;
  }
};

// Up to 32 columns of a task.
template <int D>
struct Tile {
  alignas(64) bf16 query[32 * D];       // a right factor: tiles [2][d / 32]
  alignas(64) std::int32_t limits[32];  // how many keys of the piece each column sees
  std::int32_t least, most;             // of these
  long column, count;
  Partial<D> folded;
};

// What one thread needs.
template <int D>
struct Worker {
  Buffer<bf16> values{kSplit * D};
  std::vector<Tile<D>> tiles;
  Partial<D> partial;
};

template <int D>
AMX_TARGET void read_tile(const Call<D>& call, long piece, long group, long column, long end, Tile<D>& tile) {
  alignas(64) bf16 rows[32 * D];
  tile.column = column;
  tile.count = std::min(32L, end - column);
  tile.most = 0, tile.least = call.pieces.lengths[piece];
  for (long i = 0; i < tile.count; ++i) {
    const long row = call.row(piece, column + i);
    const bf16* from = call.query + (row * call.shape.heads + call.head(group, column + i)) * D;
    for (int k = 0; k < D; k += 32) _mm512_store_si512(rows + i * D + k, _mm512_loadu_si512(from + k));
    const std::int64_t sees = call.positions[row] + 1 - call.pieces.starts[piece];
    tile.limits[i] = static_cast<std::int32_t>(
        std::max<std::int64_t>(0, std::min<std::int64_t>(sees, call.pieces.lengths[piece])));
    tile.most = std::max(tile.most, tile.limits[i]);
    tile.least = std::min(tile.least, tile.limits[i]);
  }
  for (long i = tile.count; i < 32; ++i) {
    for (int k = 0; k < D; k += 32) _mm512_store_si512(rows + i * D + k, _mm512_setzero_si512());
    tile.limits[i] = tile.most;
  }
  pack_right_transposed<D>(rows, tile.query);
}

template <int D, int N>
AMX_TARGET void write_tile(const Call<D>& call, const Partial<D>& from, const Tile<D>& tile, float* result) {
  alignas(64) float turned[16 * 16];
  for (int t = 0; t < N; ++t) {
    const long count = std::min(16L, tile.count - t * 16);
    for (int d = 0; d < D; d += 16) {
      transpose(from.sums + (d * N + t) * 16, N * 64, turned, 64);
      for (long i = 0; i < count; ++i)
        _mm512_store_ps(result + (t * 16 + i) * kResult<D> + d, _mm512_load_ps(turned + i * 16));
    }
    for (long i = 0; i < count; ++i) {
      result[(t * 16 + i) * kResult<D> + D] = from.most[t * 16 + i];
      result[(t * 16 + i) * kResult<D> + D + 1] = from.total[t * 16 + i];
    }
  }
}

// The columns of a tile against one split, folded into what they have if `whole`, or else written out.
template <int D, int N>
AMX_TARGET void attend_tile(const Call<D>& call, const Plan::Item& item, long group, long split,
                            const bf16* const* keys, Worker<D>& worker, Tile<D>& tile) {
  const long first = split * kSplit, count = (std::min<long>(kSplit, tile.most - first) + 31) / 32;
  const bool whole = item.split < 0;
  Partial<D>& partial = whole && split == 0 ? tile.folded : worker.partial;
  if (count > 0) {
    alignas(64) std::int32_t limits[32];
    for (int i = 0; i < N * 16; ++i) limits[i] = tile.limits[i] - static_cast<std::int32_t>(first);
    attend<D, N>(tile.query, keys, worker.values.data(), count, (tile.least - first) / 32, limits,
                 call.shape.scale * 1.44269504f, partial);
    if (whole && split > 0) fold<D, N>(tile.folded, partial);
  } else if (!whole || split == 0) {
    std::fill_n(partial.sums, D * N * 16, 0.0f);
    std::fill_n(partial.total, N * 16, 0.0f);
    std::fill_n(partial.most, N * 16, kNone);
  }
  if (!whole) write_tile<D, N>(call, partial, tile, call.result(group, item.piece, split, tile.column));
}

template <int D>
AMX_TARGET void run_item(const Call<D>& call, const Plan::Item& item, long group, Worker<D>& worker) {
  const std::size_t tiles = (item.end - item.column + 31) / 32;
  if (worker.tiles.size() < tiles) worker.tiles.resize(tiles);
  std::int32_t most = 0;
  for (std::size_t i = 0; i < tiles; ++i) {
    read_tile<D>(call, item.piece, group, item.column + i * 32, item.end, worker.tiles[i]);
    most = std::max(most, worker.tiles[i].most);
  }
  const long start = std::max(0L, item.split),
             end = item.split < 0 ? (most + kSplit - 1) / kSplit : start + 1;
  for (long split = start; split < std::max(end, start + 1); ++split) {
    const bf16* keys[kSplit / 32];
    const long first = split * kSplit, blocks = (std::min(kSplit, most - first) + 31) / 32;
    for (long k = 0; k < blocks; ++k) {
      const long key = first + k * 32;
      keys[k] = call.in_pool(call.pool.keys, item.piece, key, group);
      pack_values<D>(call.in_pool(call.pool.values, item.piece, key, group),
                     std::min<long>(32, call.pieces.lengths[item.piece] - key),
                     worker.values.data() + k * 32 * D);
    }
    for (std::size_t i = 0; i < tiles; ++i) {
      Tile<D>& tile = worker.tiles[i];
      if (tile.count > 16)
        attend_tile<D, 2>(call, item, group, split, keys, worker, tile);
      else
        attend_tile<D, 1>(call, item, group, split, keys, worker, tile);
    }
  }
  if (item.split >= 0) return;
  for (std::size_t i = 0; i < tiles; ++i) {
    const Tile<D>& tile = worker.tiles[i];
    float* to = call.result(group, item.piece, 0, tile.column);
    if (tile.count > 16)
      write_tile<D, 2>(call, tile.folded, tile, to);
    else
      write_tile<D, 1>(call, tile.folded, tile, to);
  }
}

// Folds a result into another, as `fold` does with tiles.
template <int D>
AMX_INLINE void fold_result(__m512* sums, __m512& most, __m512& total, const __m512* added, __m512 most_added,
                            __m512 total_added) {
  const Weights w = weigh(most, total, most_added, total_added);
  for (int i = 0; i < D / 16; ++i)
    sums[i] = _mm512_fmadd_ps(added[i], w.added, _mm512_mul_ps(sums[i], w.old));
}

template <int D>
AMX_TARGET void merge_head(const Call<D>& call, long row, long group, long n) {
  __m512 sums[D / 16], most = _mm512_set1_ps(kNone), total = _mm512_setzero_ps();
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (long i = call.plan.seen_first[row]; i < call.plan.seen_first[row + 1]; ++i) {
    const auto [piece, place] = call.plan.seen[i];
    __m512 part[D / 16], part_most = _mm512_set1_ps(kNone), part_total = _mm512_setzero_ps();
    for (auto& sum : part) sum = _mm512_setzero_ps();
    for (long split = 0; split < call.plan.partials[piece]; ++split) {
      const float* from = call.result(group, piece, split, place * call.share + n);
      __m512 added[D / 16];
      for (int d = 0; d < D / 16; ++d) added[d] = _mm512_load_ps(from + d * 16);
      fold_result<D>(part, part_most, part_total, added, _mm512_set1_ps(from[D]),
                     _mm512_set1_ps(from[D + 1]));
    }
    fold_result<D>(sums, most, total, part, part_most, part_total);
  }
  const __mmask16 any = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0f), total);
  bf16* to = call.output + (row * call.shape.heads + group * call.share + n) * D;
  for (int i = 0; i < D / 16; i += 2)
    store(to + i * 16, _mm512_mul_ps(sums[i], inverse), _mm512_mul_ps(sums[i + 1], inverse));
}

template <int D>
AMX_TARGET void work(const Call<D>& call, Worker<D>& worker, long items, long task, std::atomic<long>* done) {
  const Tiles configured;
  run_item<D>(call, call.plan.items[task % items], task / items, worker);
  done[task / items].fetch_add(1, std::memory_order_release);
}

template <int D>
void attention(const Team& team, const PagedShape& shape, long tokens, const bf16* query,
               const std::int64_t* positions, const Pool& pool, const Pieces& pieces, const Plan& plan,
               bf16* output) {
  const Buffer<float> results(shape.groups * plan.results * kResult<D>);
  const Call<D> call{shape, query, positions, pool, pieces, plan, output, results.data()};
  const long items = static_cast<long>(plan.items.size()), merges = (tokens + kMergeRows - 1) / kMergeRows;
  const long tasks = shape.groups * (items + merges);
  std::vector<Worker<D>> workers(team.workers(tasks));
  std::vector<std::atomic<long>> done(shape.groups);
  for (auto& each : done) each.store(0, std::memory_order_relaxed);
  // Merging a group waits for its tasks. They come before it, so a thread has them, and none of them waits.
  team.run(tasks, [&](int worker, auto next) {
    for (long task; (task = next()) >= 0;) {
      if (task < shape.groups * items) {
        work<D>(call, workers[worker], items, task, done.data());
        continue;
      }
      const long merge = task - shape.groups * items, group = merge / merges,
                 row = merge % merges * kMergeRows;
      while (done[group].load(std::memory_order_acquire) < items) std::this_thread::yield();
      for (long r = row; r < std::min(tokens, row + kMergeRows); ++r)
        for (long n = 0; n < call.share; ++n) merge_head<D>(call, r, group, n);
    }
  });
}

}  // namespace

void paged_attention(const Team& team, const PagedShape& shape, long tokens, const bf16* query,
                     const std::int64_t* positions, const Pool& pool, const Pieces& pieces, bf16* output) {
  if (tokens == 0) return;
  const Plan plan(shape, tokens, pool, pieces, team.workers(1024));
  const auto compute = shape.width == 32 ? attention<32> : shape.width == 64 ? attention<64> : attention<128>;
  compute(team, shape, tokens, query, positions, pool, pieces, plan, output);
}

#else

void paged_attention(const Team&, const PagedShape&, long, const std::uint16_t*, const std::int64_t*,
                     const Pool&, const Pieces&, std::uint16_t*) {
  std::abort();  // has_amx() is false
}

#endif
