"""Matrix products with a fixed weight, for few rows at a time.

On a CPU torch's bf16 product first lays the weight out anew, at every call, which for few rows takes longer
than the product. Laid out once, it is read at the speed of memory: by the kernel of csrc/ where the processor
has AMX, else by oneDNN's. Where it cannot multiply bf16 at all, many rows are multiplied from fp32 copies.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.inference.packed import PackedLinear
from megatron_codec.model import kernels
from megatron_codec.model.products import multiply, needs_copies, processor_lacks_bf16

Linear = Callable[[Tensor], Tensor]  # [t, in] to [t, out]
_ROWS = 16  # oneDNN's layout is chosen for so many rows
_FEW_ROWS = 8  # for which a copy of a large weight takes longer than it saves


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
        return lambda x: (_linear(x, rounded.to(x.dtype)).float() * scales).to(x.dtype)
    if packs:
        return PackedLinear(weight)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_packing():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: _linear(x, weight)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q [out, in] from -127 to 127, and fp32 scales [out], so that weight is scale * q to half a scale.

    The weight has to be finite.
    """
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    return (weight / scales.clamp_min(torch.finfo().tiny)[:, None]).round().to(torch.int8), scales


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, [t, out] of [t, in]."""
    return multiply(x, weight.T) if len(x) > _FEW_ROWS and needs_copies(x) else F.linear(x, weight)


def _has_packing() -> bool:
    """The operators by which torch.compile lays out frozen weights; they are not public, so ask for them."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return known and not processor_lacks_bf16()
