// Products of bf16 rows with a weight in bf16 or int8, on AMX tiles.
//
// The weight [out, in] is packed in the order in which its numbers are read, as [panels of 32 channels]
// [steps of 32 inputs][2 tiles of 16 channels][groups of inputs][16 channels][inputs of the group]: groups of 2
// in bf16, which is a tile, and of 4 in int8, one 32-bit word either way. Channels beyond `out` are zeros. int8
// turns into bf16, which holds it exactly, on the way to the tiles, and has a scale for each output channel.
#pragma once

#include <cstdint>

#include "team.hpp"

template <typename Number>  // std::int8_t, or std::uint16_t for bf16
struct PackedWeight {
  long out, in;          // in is a multiple of 32
  const Number* packed;  // on a cache line
  const float* scales;   // of all channels that are packed; not read in bf16
};

// y [rows, out] = x [rows, in] weight^T, summed in fp32. A row's bits depend neither on the other rows nor on
// the threads.
template <typename Number>
void packed_linear(const Team& team, long rows, const std::uint16_t* x, const PackedWeight<Number>& weight,
                   std::uint16_t* y);
