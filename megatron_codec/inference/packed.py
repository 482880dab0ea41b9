"""Products with a fixed weight in bf16 or int8 on a CPU with AMX, by the kernel of csrc/.

For few rows they are bound by reading the weight, so it lies in memory in the order in which it is read. int8
halves what is read: the kernel turns it into bf16, which holds it exactly, on the way.

Shapes: t rows, out and in of the weight.
"""

import torch
from torch import Tensor

from megatron_codec import _csrc
from megatron_codec.inference.pages import in_huge_pages
from megatron_codec.model import kernels

_PANEL, _TILE, _STEP = 32, 16, 32  # csrc/packed_linear.hpp


class PackedLinear:
    """x -> x weight^T, bf16 x [t, in] to bf16 [t, out], summed in fp32. It keeps a copy of the weight.

    Args:
        weight: bf16 or int8 [out, in], of which in is a multiple of 32.
        scales: of an int8 weight, fp32 [out], to be multiplied with the results.
    """

    def __init__(self, weight: Tensor, scales: Tensor | None = None):
        self.out, self.width = weight.shape
        self.weight = in_huge_pages(_packed(weight))
        self.scales = None if scales is None else in_huge_pages(_padded(scales))

    def __call__(self, x: Tensor) -> Tensor:
        """The product; bits of a row depend neither on the other rows nor on the threads."""
        x = x.contiguous()
        if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != self.width or not x.is_cpu:
            raise ValueError(f"x has to be bf16 [t, {self.width}] on the CPU, not {x.dtype} {list(x.shape)}")
        y = x.new_empty(len(x), self.out)
        shape = kernels.team(), len(x), self.out, self.width
        if self.scales is None:
            _csrc.bf16_linear(*shape, x.data_ptr(), self.weight.data_ptr(), y.data_ptr())
        else:
            addresses = (tensor.data_ptr() for tensor in (x, self.weight, self.scales, y))
            _csrc.int8_linear(*shape, *addresses)
        return y


def _packed(weight: Tensor) -> Tensor:
    """The kernel's order of a weight [out, in]; a group of inputs is a 32-bit word."""
    group = 4 // weight.element_size()
    tiles = _padded(weight).view(-1, _PANEL // _TILE, _TILE, weight.shape[1] // _STEP, _STEP // group, group)
    return tiles.permute(0, 3, 1, 4, 2, 5)


def _padded(x: Tensor) -> Tensor:
    """Zeros behind the last channel, to whole panels."""
    padding = -len(x) % _PANEL
    return torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) if padding else x
