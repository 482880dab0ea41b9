"""Matrix products with a fixed weight, for few rows at a time.

On a CPU torch's bf16 product first lays the weight out anew, at every call, which for few rows takes longer
than the product; laid out once, it reads the weight at the speed of memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.inference.int8 import Int8Linear

Linear = Callable[[Tensor], Tensor]  # [t, in] to [t, out]
_ROWS = 16  # the layout is chosen for so many rows


def make_linear(weight: Tensor, int8: bool = False) -> Linear:
    """x -> x weight^T for a weight [out, in]. A later change of the weight may or may not be seen.

    Args:
        int8: round the weight to int8 first, and keep that only.
    """
    if int8:
        return Int8Linear(weight)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_packing():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        product = torch.ops.mkldnn._linear_pointwise

        def linear(x: Tensor) -> Tensor:
            return product(x, packed, None, "none", [], "")

        return linear
    return lambda x: F.linear(x, weight)


def _has_packing() -> bool:
    """The operators by which torch.compile lays out frozen weights; they are not public, so ask for them."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
