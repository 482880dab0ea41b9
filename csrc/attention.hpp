// Causal attention with rotary embedding, forward and backward, in bf16 on AMX tiles.
#pragma once

#include <cstdint>

#include "team.hpp"

// bf16 [s, b, n, d] anywhere in memory: strides in numbers, the last dimension without gaps.
struct Heads {
  std::uint16_t* data;
  long s, b, n;
};

struct AttentionShape {
  long sequence, batch, heads, groups;  // heads is a multiple of groups
  int width;                            // 32, 64 or 128
  float scale;                          // of the scores
};

// Angles of the rotary embedding: fp32 [sequence, width / 2].
struct Angles {
  const float *cos, *sin;
};

// Whether this processor and system have what the functions below need.
bool has_amx();

// `lse` gets the logarithm to base 2 of each row's sum of exponentials, fp32 [batch, heads, sequence].
void attention_forward(const Team& team, const AttentionShape& shape, const Angles& angles, const Heads& query,
                       const Heads& key, const Heads& value, const Heads& output, float* lse);

// The gradients of query, key and value, from that of the output and what the forward pass has left.
void attention_backward(const Team& team, const AttentionShape& shape, const Angles& angles, const Heads& query,
                        const Heads& key, const Heads& value, const Heads& output, const float* lse,
                        const Heads& to_output, const Heads& to_query, const Heads& to_key, const Heads& to_value);
