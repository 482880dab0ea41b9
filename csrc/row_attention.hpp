// Attention over a paged cache in fp32 or bf16 on any processor, for rows that decode.
//
// Where there is no AMX, gathering and widening the keys of a row costs several times what its scores do. Here
// they are read where they lie, once, and sums are in fp32.
#pragma once

#include "paged_attention.hpp"

// `Pool`, of numbers of the type T: float, or std::uint16_t for bf16.
template <typename T>
struct PoolOf {
  const T *keys, *values;
  long blocks;
};

// As `paged_attention`, with any width that is a multiple of 8 and blocks of any size; but a row of no piece is
// left as it is, and the weights of the softmax are not rounded.
template <typename T>
void row_attention(const Team& team, const PagedShape& shape, long tokens, const T* query,
                   const std::int64_t* positions, const PoolOf<T>& pool, const Pieces& pieces, T* output);
