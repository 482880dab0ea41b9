"""Weights in int8 for products that are bound by reading them; activations and results stay as they are.

Rounding is symmetric, with one scale for each output channel: w = scale * q, q from -127 to 127. In bf16 on
a CPU with AMX the kernel of csrc/ computes, which turns the bytes into bf16 on the way; bf16 holds them
exactly. Everywhere else torch multiplies with the bytes in the type of x: that saves memory, but no time.

Shapes: t rows, out and in of the weight.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_codec import _csrc
from megatron_codec.inference.pages import in_huge_pages
from megatron_codec.model import kernels

_PANEL, _TILE, _STEP = 32, 16, 32  # csrc/int8_linear.hpp


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and fp32 scales [out], within half a scale of `weight`, which has to be finite."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    return (weight / scales.clamp_min(torch.finfo().tiny)[:, None]).round().to(torch.int8), scales


class Int8Linear:
    """x -> x weight^T, x [t, in] to [t, out], with the weight rounded to int8; it keeps no other.

    In a row-parallel layer of tensor parallelism every rank has scales of its own.
    """

    def __init__(self, weight: Tensor):
        self.out, self.width = weight.shape
        self.weight, self.scales = quantize(weight)
        self.fused = kernels.fits(weight, self.width)
        if self.fused:
            self.weight, self.scales = in_huge_pages(_packed(self.weight)), _padded(self.scales)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, summed in fp32 where the kernel computes it."""
        if not self.fused:
            return (F.linear(x, self.weight.to(x.dtype)).float() * self.scales).to(x.dtype)
        x = x.contiguous()
        if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != self.width or not x.is_cpu:
            raise ValueError(f"x has to be bf16 [t, {self.width}] on the CPU, not {x.dtype} {list(x.shape)}")
        y = x.new_empty(len(x), self.out)
        addresses = (tensor.data_ptr() for tensor in (x, self.weight, self.scales, y))
        _csrc.int8_linear(kernels.team(), len(x), self.out, self.width, *addresses)
        return y


def _packed(weight: Tensor) -> Tensor:
    """The kernel's order of an int8 weight [out, in]."""
    tiles = _padded(weight).view(-1, _PANEL // _TILE, _TILE, weight.shape[1] // _STEP, _STEP // 4, 4)
    return tiles.permute(0, 3, 1, 4, 2, 5)


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the last channel, to whole panels."""
    padding = -len(x) % _PANEL
    return torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) if padding else x
