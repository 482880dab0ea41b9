"""Attention, RMSNorm and SwiGLU in bf16 on a CPU with AMX, by the kernels of csrc/, for training.

Each is an autograd Function over the same tensors as the one on torch's own kernels in `layers.py`, which
is used wherever `fits` says no: fp32, GPUs, other processors, other widths. Results do not depend on the
number of threads: a group of heads, or 32 rows, is computed by one of them, and sums are taken in one order.

Shapes: s sequence, b batch, h hidden, n heads of this tensor-parallel rank, g key-value groups, d head width.
"""

import ctypes
import functools
import os

import torch
from torch import Tensor

from megatron_codec import _csrc

HEAD_WIDTHS = (32, 64, 128)


def fits(x: Tensor, width: int) -> bool:
    """Whether the kernels take `x`, when a row of theirs has `width` numbers."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and width % 32 == 0 and _csrc.has_amx()


class Attention(torch.autograd.Function):
    """Causal attention with rotary embedding and without dropout; it keeps no s x s matrix.

    The softmax is in fp32. The products take its weights, and the rotated queries and keys, in bf16.

    Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, scale: float
    ) -> Tensor:
        """Attends, `query` [s, b, n, d] to `key` and `value` [s, b, g, d], giving [s, b, n, d].

        Args:
            cos, sin: of the rotary embedding's angles, fp32 [s, d / 2].
            scale: of the scores.
        """
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        s, b, n, d = query.shape
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(b, n, s)
        places = [_place(x) for x in (query, key, value, output)]
        shape = _csrc.AttentionShape(s, b, n, key.shape[2], d, scale)
        _csrc.attention_forward(team(), shape, cos.data_ptr(), sin.data_ptr(), *places, lse.data_ptr())
        ctx.save_for_backward(query, key, value, output, lse, cos, sin)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """The gradients of query, key and value."""
        query, key, value, output, lse, cos, sin = ctx.saved_tensors
        s, b, n, d = query.shape
        results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        _csrc.attention_backward(
            team(),
            _csrc.AttentionShape(s, b, n, key.shape[2], d, ctx.scale),
            *(cos.data_ptr(), sin.data_ptr()),
            *(_place(x) for x in (query, key, value, output)),
            lse.data_ptr(),
            *(_place(x) for x in (gradients[0].contiguous(), *results)),
        )
        return *results, None, None, None


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Norms `x` [..., h] with `weight` [h]."""
        x = x.contiguous()
        result, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """The gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        gradient, to_x, to_weight = gradients[0].contiguous(), torch.empty_like(x), torch.empty_like(weight)
        _csrc.rms_norm_backward(
            team(), scale.numel(), x.shape[-1], *_addresses(x, weight, scale, gradient, to_x, to_weight)
        )
        return to_x, to_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, computed in fp32.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
    """

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        """Takes [..., 2 * f], gate and up side by side, to [..., f]."""
        gate_and_up = gate_and_up.contiguous()
        ctx.save_for_backward(gate_and_up)
        return swiglu(gate_and_up)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        """The gradient of gate and up."""
        (gate_and_up,), gradient = ctx.saved_tensors, gradients[0].contiguous()
        width, result = gate_and_up.shape[-1], torch.empty_like(gate_and_up)
        rows = gate_and_up.numel() // width
        _csrc.swiglu_backward(team(), rows, width // 2, *_addresses(gate_and_up, gradient, result))
        return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` where no gradient is wanted."""
    return _rms_norm(x.contiguous(), weight, eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows of `x`, and what each was multiplied with, fp32."""
    width = x.shape[-1]
    rows = x.numel() // width
    result, scale = torch.empty_like(x), torch.empty(rows)
    _csrc.rms_norm_forward(team(), rows, width, eps, *_addresses(x, weight, result, scale))
    return result, scale


def swiglu(gate_and_up: Tensor) -> Tensor:
    """`SwiGLU` where no gradient is wanted."""
    gate_and_up = gate_and_up.contiguous()
    *rows, width = gate_and_up.shape
    result = gate_and_up.new_empty(*rows, width // 2)
    _csrc.swiglu_forward(team(), gate_and_up.numel() // width, width // 2, *_addresses(gate_and_up, result))
    return result


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Where a tensor [s, b, n, d] is: its address, and its strides but for the last, which is 1."""
    return x.data_ptr(), *x.stride()[:3]  # type: ignore[return-value]


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def team() -> _csrc.Team:
    """The threads that torch's own kernels run on."""
    return _csrc.Team(_openmp(), torch.get_num_threads())


@functools.cache
def _openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; 0 where there is none."""
    if os.name != "posix":
        return 0
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return ctypes.cast(entry, ctypes.c_void_p).value or 0 if entry is not None else 0
