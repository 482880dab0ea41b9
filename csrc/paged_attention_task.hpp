// One task of paged_attention: some columns against one split of a piece, or all of them.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_pack.hpp"
#include "buffer.hpp"
#include "paged_attention_tile.hpp"
#include "paged_plan.hpp"

#if defined(HAVE_AMX)

namespace amx {

constexpr long kFewTiles = 4;

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

  // Where in a pool a key of a piece is.
  long place(long piece, long key, long group) const {
    const long block = pieces.blocks[pieces.block_offsets[piece] + key / shape.block];
    return ((block * shape.groups + group) * shape.block + key % shape.block) * D;
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
  Partial<D> folded, split;  // of all splits before, and of the present one
};

// What one thread needs.
template <int D>
struct Worker {
  Buffer<bf16> values{kSplit * D};
  std::vector<Tile<D>> tiles;
  long near = 0;  // how many blocks of the split to come have been brought nearer
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
  const long padded = tile.count > 16 ? 32 : 16;
  for (long i = tile.count; i < padded; ++i) {
    for (int k = 0; k < D; k += 32) _mm512_store_si512(rows + i * D + k, _mm512_setzero_si512());
    tile.limits[i] = tile.most;
  }
  for (long n = 0; n < padded / 16; ++n)
    for (long k = 0; k < D / 32; ++k)
      transpose(rows + n * 16 * D + k * 32, D * 2, tile.query + (n * (D / 32) + k) * kTile, 64);
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

// A split that is computed, or comes next.
struct Place {
  const Plan::Item* item;  // null for none
  long group, split;
};

// Where the blocks of a split are, and behind them the first of the split to come.
struct Blocks {
  const bf16 *keys[kSplit / 32 + kChunk], *values[kSplit / 32 + kChunk];
  long count, known;
};

template <int D>
void add_blocks(const Call<D>& call, const Place& at, long count, Blocks& blocks) {
  for (long k = 0; k < count; ++k, ++blocks.known) {
    const long place = call.place(at.item->piece, at.split * kSplit + k * 32, at.group);
    blocks.keys[blocks.known] = call.pool.keys + place;
    blocks.values[blocks.known] = call.pool.values + place;
  }
}

// How many blocks there are from the beginning of a split to a key; no more than the split has.
inline long blocks_before(long key, long split) {
  return std::clamp((key - split * kSplit + 31) / 32, 0L, kSplit / 32);
}

// A tile against the blocks first to first + count - 1 of a split, as far as it sees them.
template <int D, int N>
AMX_TARGET void attend_blocks(const Call<D>& call, const Blocks& blocks, const bf16* values, long split,
                              long first, long count, long ahead, const Tile<D>& tile, Partial<D>& to) {
  const long before = split * kSplit, seen = (tile.most - before + 31) / 32;
  if (seen > first) {
    alignas(64) std::int32_t limits[32];
    for (int i = 0; i < N * 16; ++i) limits[i] = tile.limits[i] - static_cast<std::int32_t>(before);
    attend<D, N>(tile.query, blocks.keys, values, first, std::min(count, seen - first), ahead, blocks.known,
                 (tile.least - before) / 32, limits, call.shape.scale * 1.44269504f, to);
  } else if (first == 0) {
    std::fill_n(to.sums, D * N * 16, 0.0f);
    std::fill_n(to.total, N * 16, 0.0f);
    std::fill_n(to.most, N * 16, kNone);
  }
}

// All tiles against one split, of which they see `most` keys of the piece at most.
template <int D>
AMX_TARGET void run_split(const Call<D>& call, const Place& at, const Place& next, long most, long tiles,
                          Worker<D>& worker) {
  const Plan::Item& item = *at.item;
  Blocks blocks;
  blocks.known = 0;
  blocks.count = blocks_before(most, at.split);
  add_blocks(call, at, blocks.count, blocks);
  // With few queries reading memory is the bound, so it goes on all the time: behind each block that is
  // computed the one `ahead` is fetched, here or in the split to come.
  const long ahead = std::min(kChunk, blocks.count);
  for (long k = worker.near; k < ahead; ++k) {
    prefetch(blocks.keys[k], 32 * D);
    prefetch(blocks.values[k], 32 * D);
  }
  worker.near = 0;
  if (next.item != nullptr) {
    worker.near = std::min(ahead, blocks_before(call.pieces.lengths[next.item->piece], next.split));
    add_blocks(call, next, worker.near, blocks);
  }
  const long step = tiles <= kFewTiles ? kChunk : kSplit / 32;
  for (long first = 0; first < std::max(1L, blocks.count); first += step) {
    const long count = std::min(step, blocks.count - first);
    for (long k = first; k < first + count; ++k)
      pack_values<D>(blocks.values[k],
                     std::min<long>(32, call.pieces.lengths[item.piece] - at.split * kSplit - k * 32),
                     k + ahead < blocks.known ? blocks.values[k + ahead] : nullptr,
                     worker.values.data() + (k - first) * 32 * D);
    for (long i = 0; i < tiles; ++i) {
      Tile<D>& tile = worker.tiles[i];
      Partial<D>& to = item.split < 0 && at.split == 0 ? tile.folded : tile.split;
      const long fetched = i == 0 ? ahead : blocks.known;  // by the first tile only
      if (tile.count > 16)
        attend_blocks<D, 2>(call, blocks, worker.values.data(), at.split, first, count, fetched, tile, to);
      else
        attend_blocks<D, 1>(call, blocks, worker.values.data(), at.split, first, count, fetched, tile, to);
    }
  }
}

template <int D, int N>
AMX_TARGET void finish_split(const Call<D>& call, const Place& at, bool last, Tile<D>& tile) {
  const long piece = at.item->piece;
  if (at.item->split >= 0) {
    write_tile<D, N>(call, tile.split, tile, call.result(at.group, piece, at.split, tile.column));
    return;
  }
  if (at.split > 0) fold<D, N>(tile.folded, tile.split);
  if (last) write_tile<D, N>(call, tile.folded, tile, call.result(at.group, piece, 0, tile.column));
}

// One task; `next` is that to come.
template <int D>
AMX_TARGET void run_item(const Call<D>& call, Place at, const Place& next, Worker<D>& worker) {
  const Plan::Item& item = *at.item;
  const long tiles = (item.end - item.column + 31) / 32;
  if (static_cast<long>(worker.tiles.size()) < tiles) worker.tiles.resize(tiles);
  long most = 0;
  for (long i = 0; i < tiles; ++i) {
    read_tile<D>(call, item.piece, at.group, item.column + i * 32, item.end, worker.tiles[i]);
    most = std::max<long>(most, worker.tiles[i].most);
  }
  const long end = item.split < 0 ? std::max(1L, (most + kSplit - 1) / kSplit) : at.split + 1;
  for (; at.split < end; ++at.split) {
    const bool last = at.split + 1 == end;
    run_split<D>(call, at, last ? next : Place{at.item, at.group, at.split + 1}, most, tiles, worker);
    for (long i = 0; i < tiles; ++i) {
      Tile<D>& tile = worker.tiles[i];
      if (tile.count > 16)
        finish_split<D, 2>(call, at, last, tile);
      else
        finish_split<D, 1>(call, at, last, tile);
    }
  }
}

}  // namespace amx

#endif
