"""Matrix products with a fixed weight, for few rows at a time.

On a CPU torch's bf16 product first lays the weight out anew, at every call, which for few rows takes longer
than the product. Laid out once, it is read at the speed of memory: by the kernel of csrc/ where the processor
has AMX, else by oneDNN's, or, where the processor cannot multiply bf16, in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.inference.packed import PackedLinear
from megatron_codec.model import kernels
from megatron_codec.model.products import needs_copies

Linear = Callable[[Tensor], Tensor]  # [t, in] to [t, out]
_ROWS = 16  # oneDNN's layout is chosen for so many rows


def make_linear(weight: Tensor, int8: bool = False) -> Linear:
    """x -> x weight^T for a weight [out, in]. A later change of the weight may or may not be seen.

    Args:
        int8: round the weight to int8 first, and keep that only. In a row-parallel layer of tensor
            parallelism every rank has scales of its own.
    """
    packs = kernels.fits(weight, weight.shape[1])
    if int8:
        rounded, scales = quantize(weight)
        if packs:
            return PackedLinear(rounded, scales)
        # This saves memory, but no time.
        dtype = torch.float32 if needs_copies(weight) else weight.dtype
        return lambda x: (F.linear(x.to(dtype), rounded.to(dtype)).float() * scales).to(x.dtype)
    if packs:
        return PackedLinear(weight)
    if needs_copies(weight):
        return CopiedLinear(weight)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_packing():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


class CopiedLinear:
    """x -> x weight^T, bf16 x [t, in] to bf16 [t, out], from an fp32 copy of the weight, which it keeps: made
    anew at every call it would take longer than the product of a few rows."""

    def __init__(self, weight: Tensor):
        self.weight = weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        """The product, rounded once."""
        return F.linear(x.float(), self.weight).to(x.dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q [out, in] from -127 to 127, and fp32 scales [out], so that weight is scale * q to half a scale.

    The weight has to be finite.
    """
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    return (weight / scales.clamp_min(torch.finfo().tiny)[:, None]).round().to(torch.int8), scales


def _has_packing() -> bool:
    """The operators by which torch.compile lays out frozen weights; they are not public, so ask for them."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
