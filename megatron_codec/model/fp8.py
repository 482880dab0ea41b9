"""FP8 emulated: linear layers that round as a recipe of Transformer Engine does, on any device.

Values are rounded to the numbers that e4m3 or e5m2 can hold and multiplied in the precision of training, so a
recipe can be tried without a GPU; nothing becomes faster or smaller. Of each product Y = X W^T all three
matrix products are rounded: Y itself, the gradient of X, and the gradient of W.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); the recipes as Transformer Engine 2.20
documents them (`transformer_engine.common.recipe`); Rouhani et al., "Microscaling Data Formats for Deep
Learning" (2023) for mxfp8.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.config import Fp8Config
from megatron_codec.model.products import OwnProduct, multiply
from megatron_codec.model.weights import global_name
from megatron_codec.parallel import Layout

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values that `dtype` has, ties to even, in fp32; what is too large becomes the largest."""
    most = torch.finfo(dtype).max
    return x.float().clamp(-most, most).to(dtype).float()


def scale_for(amax: Tensor, dtype: torch.dtype, otherwise: Tensor | float = 1.0, margin: int = 0) -> Tensor:
    """The factor that brings `amax` to the largest value of `dtype`, or `margin` powers of two below it.

    It is `otherwise` where there is none.
    """
    scale = torch.finfo(dtype).max / amax / 2.0**margin
    scale = torch.where((amax > 0) & amax.isfinite(), scale, otherwise)
    return scale.clamp(max=torch.finfo(torch.float32).max)


class Quantizer(Protocol):
    """Rounds one operand of a linear layer: its input, its weight or the gradient of its output."""

    def observe(self, x: Tensor) -> None:
        """Takes notice of a tensor in training, before it is rounded."""

    def rows(self, x: Tensor) -> Tensor:
        """`x` [m, n] rounded for a product that sums over n."""
        ...

    def columns(self, x: Tensor) -> Tensor:
        """`x` [m, n] rounded for a product that sums over m."""
        ...


class PerTensor(torch.nn.Module):
    """One scale for a tensor: none, from its own largest value (tensorwise), or from those of earlier steps.

    Attributes:
        scale: of the next rounding, fp32 scalar; in use under delayed scaling.
        history: largest absolute values of the last steps, fp32 [amax_history_len], as Transformer Engine
            keeps them: place 0 is of the step that runs.
    """

    def __init__(self, config: Fp8Config, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.margin, self.algorithm = config.fp8_margin, config.fp8_amax_compute_algo
        self.scaling = config.fp8_recipe if config.fp8_emulation_scaling else "none"
        # Not in the state dict: they travel as `DelayedScales.sharded_state_dict` says.
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("history", torch.zeros(config.fp8_amax_history_len), persistent=False)
        self.scale: Tensor
        self.history: Tensor

    def observe(self, x: Tensor) -> None:
        """See `Quantizer`."""
        if self.scaling == "delayed":
            self.history[0] = torch.maximum(self.history[0], x.detach().abs().amax())

    def rows(self, x: Tensor) -> Tensor:
        """See `Quantizer`."""
        scale = scale_for(x.abs().amax().float(), self.dtype) if self.scaling == "tensorwise" else self.scale
        return (round_to(x.float() * scale, self.dtype) / scale).to(x.dtype)

    columns = rows

    def update(self, amax: Tensor) -> None:
        """Ends a step whose largest absolute value was `amax`: the scale of the next one."""
        self.history[0] = amax
        chosen = self.history.max() if self.algorithm == "max" else amax
        self.scale.copy_(scale_for(chosen, self.dtype, self.scale, self.margin))
        self.history.copy_(self.history.roll(-1))
        self.history[0] = 0.0


class PerBlock:
    """A scale, a power of two, for each block along the sum of the product.

    Args:
        across, along: height and width of a block, `along` in the direction of the sum.
    """

    def __init__(self, dtype: torch.dtype, across: int, along: int):
        self.dtype, self.across, self.along = dtype, across, along

    def observe(self, x: Tensor) -> None:
        """See `Quantizer`."""

    def rows(self, x: Tensor) -> Tensor:
        """See `Quantizer`."""
        (m, n), size = x.shape, (self.across, self.along)
        padded = F.pad(x.float(), (0, -n % size[1], 0, -m % size[0]))
        blocks = padded.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))  # [m / a, a, n / b, b]
        scale = scale_for(blocks.abs().amax((1, 3), keepdim=True), self.dtype)
        _, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale), exponent - 1)
        rounded = round_to(blocks * power, self.dtype) / power
        return rounded.flatten(2).flatten(0, 1)[:m, :n].to(x.dtype)

    def columns(self, x: Tensor) -> Tensor:
        """See `Quantizer`."""
        return self.rows(x.T).T


Operand = Literal["input", "weight", "gradient"]


def quantizer(config: Fp8Config, operand: Operand) -> PerTensor | PerBlock:
    """What rounds this operand of every layer under the recipe."""
    dtype = E5M2 if config.fp8_format == "hybrid" and operand == "gradient" else E4M3
    if not config.fp8_emulation_scaling or config.fp8_recipe in ("delayed", "tensorwise"):
        return PerTensor(config, dtype)
    if config.fp8_recipe == "blockwise":
        return PerBlock(dtype, across=128 if operand == "weight" else 1, along=128)
    return PerBlock(dtype, across=1, along=32)


class _Product(torch.autograd.Function):
    """x W^T whose three matrix products take rounded operands."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: "_Emulated") -> Tensor:
        """`x` [..., i] and `weight` [o, i] give [..., o]."""
        flat = x.flatten(0, -2)
        if layer.training:
            layer.fp8_input.observe(flat)
            layer.fp8_weight.observe(weight)
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        product = multiply(layer.fp8_input.rows(flat), layer.fp8_weight.rows(weight).T)
        return product.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """The gradients of `x` and `weight`."""
        x, weight = ctx.saved_tensors
        layer, gradient = ctx.layer, gradients[0].flatten(0, -2)
        layer.fp8_gradient.observe(gradient)
        to_x = multiply(layer.fp8_gradient.rows(gradient), layer.fp8_weight.columns(weight))
        flat = x.flatten(0, -2)
        if layer.fp8_config.fp8_wgrad:
            gradient, flat = layer.fp8_gradient.columns(gradient), layer.fp8_input.columns(flat)
        return to_x.view_as(x), multiply(gradient.T, flat), None


class _Emulated(OwnProduct):
    """What both kinds of parallel layers add to Megatron-Core's.

    Under delayed scaling each tensor's scale is that of all ranks; under the others a rank scales its part.
    """

    fp8_config: Fp8Config

    def __init__(self, *args, fp8: Fp8Config, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp8_config = fp8
        self.fp8_input = quantizer(fp8, "input")
        self.fp8_weight = quantizer(fp8, "weight")
        self.fp8_gradient = quantizer(fp8, "gradient")

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return _Product.apply(x, weight, self)


class Fp8ColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Megatron-Core's layer whose weight is cut by rows, with emulated FP8."""


class Fp8RowParallelLinear(_Emulated, RowParallelLinear):
    """Megatron-Core's layer whose weight is cut by columns, with emulated FP8."""


class DelayedScales:
    """The scales of delayed scaling in all layers of this process, updated together after each step.

    Transformer Engine updates the scales of the forward pass after every micro-batch; here all are updated
    after the step, so that they do not depend on the layout.
    """

    def __init__(self, chunks: Sequence[GPTModel], layout: Layout):
        self.scales = {
            global_name(chunk, name): module
            for chunk in chunks
            for name, module in chunk.named_modules()
            if isinstance(module, PerTensor) and module.scaling == "delayed"
        }
        self.layout = layout

    def update(self) -> None:
        """Ends a step; every process calls it."""
        if not self.scales:
            return
        amaxes = torch.stack([scale.history[0] for scale in self.scales.values()])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
        for scale, amax in zip(self.scales.values(), amaxes, strict=True):
            scale.update(amax)

    def sharded_state_dict(self) -> dict[str, ShardedObject]:
        """Scales and histories for a checkpoint that any layout can read."""
        layout = self.layout
        replica = (0, layout.tp_rank, layout.dp_rank * layout.cp + layout.cp_rank)
        return {
            name: ShardedObject(
                f"fp8_emulation.{name}", torch.cat([scale.scale[None], scale.history]), (1,), (0,), replica
            )
            for name, scale in self.scales.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `sharded_state_dict` gave to a checkpoint."""
        for name, scale in self.scales.items():
            scale.scale.copy_(state[name][0])
            scale.history.copy_(state[name][1:])


def emulated_linears(config: Fp8Config) -> Iterator[tuple[type, dict]]:
    """Yields class and parameters of the layer cut by rows, then of the one cut by columns."""
    yield Fp8ColumnParallelLinear, {"fp8": config}
    yield Fp8RowParallelLinear, {"fp8": config}
