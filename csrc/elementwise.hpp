// RMSNorm and SwiGLU, forward and backward, in bf16 with AVX-512: one pass over memory each.
#pragma once

#include <cstdint>

#include "team.hpp"

// y = x * scale * weight over rows of `width` numbers, a multiple of 32; scale [rows] is kept, fp32.
void rms_norm_forward(const Team& team, long rows, long width, float epsilon, const std::uint16_t* x,
                      const std::uint16_t* weight, std::uint16_t* y, float* scale);

// The gradients of x and of the weight.
void rms_norm_backward(const Team& team, long rows, long width, const std::uint16_t* x,
                       const std::uint16_t* weight, const float* scale, const std::uint16_t* to_y,
                       std::uint16_t* to_x, std::uint16_t* to_weight);

// silu(gate) * up, from rows of `width` numbers of each side by side; width is a multiple of 32.
void swiglu_forward(const Team& team, long rows, long width, const std::uint16_t* gate_and_up, std::uint16_t* y);

void swiglu_backward(const Team& team, long rows, long width, const std::uint16_t* gate_and_up,
                     const std::uint16_t* to_y, std::uint16_t* to_gate_and_up);
