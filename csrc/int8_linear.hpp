// Products of bf16 rows with a weight in int8, one scale for each output channel, on AMX tiles.
//
// The weight [out, in] is packed as [panels of 32 channels][steps of 32 inputs][2 tiles of 16 channels]
// [8 groups of 4 inputs][16 channels][4 inputs]: the bytes of a panel in the order in which they are read.
// Channels beyond `out` are zeros. On the way to the tiles the bytes turn into bf16, which holds them
// exactly.
#pragma once

#include <cstdint>

#include "team.hpp"

struct Int8Weight {
  long out, in;               // in is a multiple of 32
  const std::int8_t* packed;  // on a cache line
  const float* scales;        // of all channels that are packed
};

// y [rows, out] = x [rows, in] weight^T, summed in fp32. A row's bits depend neither on the other rows nor on
// the threads.
void int8_linear(const Team& team, long rows, const std::uint16_t* x, const Int8Weight& weight,
                 std::uint16_t* y);
