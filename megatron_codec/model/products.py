"""Matrix products in bf16 on processors that cannot multiply bf16.

Without instructions for it (many laptops, whatever has nothing newer than AVX2)
torch multiplies bf16 number by number, 4 to 11 times slower than fp32 (docs/performance.md). Products of fp32
copies, rounded once to bf16, are as exact, since sums are in fp32 either way. On a GPU, and where the
processor can, nothing of this is used.
"""

import functools

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def processor_lacks_bf16() -> bool:
    """Whether torch multiplies bf16 number by number on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return True
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def needs_copies(x: Tensor) -> bool:
    """Whether products of `x` are better made from fp32 copies."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and processor_lacks_bf16()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of the type of `a`."""
    return (a.float() @ b.float()).to(a.dtype) if needs_copies(a) else a @ b


def attention(query: Tensor, key: Tensor, value: Tensor, **flags) -> Tensor:
    """`scaled_dot_product_attention`, of the type of `query`."""
    if not needs_copies(query):
        return F.scaled_dot_product_attention(query, key, value, **flags)
    out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **flags)
    return out.to(query.dtype)


class _Product(torch.autograd.Function):
    """x W^T by `multiply`; what is kept for its gradient is bf16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """`x` [..., i] and `weight` [o, i] give [..., o]."""
        ctx.save_for_backward(x, weight)
        return multiply(x, weight.T)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """The gradients of `x` and `weight`."""
        x, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        return multiply(gradient, weight).view_as(x), multiply(gradient.T, x.flatten(0, -2))


class OwnProduct(torch.nn.Module):
    """A parallel linear layer of Megatron-Core with another product, and the same exchange of inputs."""

    tp_group: torch.distributed.ProcessGroup

    def _forward_impl(
        self, input: Tensor, weight: Tensor, sequence_parallel=False, allreduce_dgrad=False, **unused
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return self._product(input, weight)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return _Product.apply(x, weight)


class CopyingColumnParallelLinear(OwnProduct, ColumnParallelLinear):
    """Megatron-Core's layer whose weight is cut by rows, multiplied from fp32 copies."""


class CopyingRowParallelLinear(OwnProduct, RowParallelLinear):
    """Megatron-Core's layer whose weight is cut by columns, multiplied from fp32 copies."""


def plain_linears(bf16: bool) -> tuple[type[ColumnParallelLinear], type[RowParallelLinear]]:
    """The layer cut by rows, then the one cut by columns, for where Transformer Engine is not.

    Args:
        bf16: whether the weights are.
    """
    if bf16 and not torch.cuda.is_available() and processor_lacks_bf16():
        return CopyingColumnParallelLinear, CopyingRowParallelLinear
    return ColumnParallelLinear, RowParallelLinear
