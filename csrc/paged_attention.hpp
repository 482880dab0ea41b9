// Attention over a paged cache of keys and values, in bf16 on AMX tiles, for generation.
//
// A pool is bf16 [blocks, groups, block, width]: of each block of tokens, the keys (rotated) or the values of
// every key-value group. What rows may see of it comes in pieces; several rows may share one, and a row have
// several.
#pragma once

#include <cstdint>

#include "team.hpp"

struct PagedShape {
  long heads, groups;  // heads is a multiple of groups
  long block;          // tokens of a block, a multiple of 32
  int width;           // 32, 64 or 128
  float scale;         // of the scores, more than 0
};

struct Pool {
  std::uint16_t *keys, *values;
  long blocks;
};

// Of the rotary embedding: fp32 [positions, width / 2].
struct AngleTable {
  const float *cos, *sin;
  long positions;
};

// Piece p holds the keys of the positions starts[p] to starts[p] + lengths[p] - 1, in the blocks
// blocks[block_offsets[p]] and so on, from the first place of the first. The rows rows[row_offsets[p]] and so
// on see it, each as far as its own position.
struct Pieces {
  long count;
  const std::int32_t *starts, *lengths, *blocks, *block_offsets, *rows, *row_offsets;
};

// Takes qkv [tokens, groups, heads / groups + 2, width] apart (a group's queries, key, value): rotated
// queries go to `query` [tokens, heads, width], the rotated key and the value into the pool at the token's
// slot (block * shape.block + place), or nowhere if that is negative. Throws if a slot or a position is out
// of range.
void rotate_and_store(const Team& team, const PagedShape& shape, long tokens, const std::uint16_t* qkv,
                      const AngleTable& angles, const std::int64_t* positions, const std::int64_t* slots,
                      const Pool& pool, std::uint16_t* query);

// query, output: [tokens, heads, width]. A row that sees nothing gets zeros. A row's bits depend on its own
// pieces only: not on the other rows of the call, nor on the threads. Throws if a piece names rows or blocks
// that are not there.
void paged_attention(const Team& team, const PagedShape& shape, long tokens, const std::uint16_t* query,
                     const std::int64_t* positions, const Pool& pool, const Pieces& pieces,
                     std::uint16_t* output);
