"""Layers for where Transformer Engine is not: attention through SDPA, and RMSNorm for sequence parallelism.

Shapes: s sequence, b batch, h hidden, n heads of this tensor-parallel rank, g key-value groups, d head width.
"""

import math

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.model import kernels
from megatron_codec.model.products import attention
from megatron_codec.parallel import context_parallel_positions


class Rotary:
    """Rotary position embedding, as Llama applies it (halves, not pairs), with its tables kept.

    Megatron-Core takes cosines and sines anew in every layer, and in a decoding step for one new token.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.
    """

    def __init__(self, width: int, base: float):
        self.width, self.base = width, base
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to length - 1, fp32 [length, d / 2] each.

        In bf16 they would put keys out of their place, and a model learns less (docs/decisions.md).
        """
        if device not in self._tables or len(self._tables[device][0]) < length:
            exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=device) / self.width
            positions = torch.arange(length, dtype=torch.float32, device=device)
            angles = torch.outer(positions, 1.0 / self.base**exponents)
            self._tables[device] = angles.cos(), angles.sin()
        cos, sin = self._tables[device]
        return cos[:length], sin[:length]


class Rotate(torch.autograd.Function):
    """Turns the halves of the last dimension by angles; its gradient is the turn back.

    Computes in the type of the angles' tables, and rounds to that of `x` once.
    Written without the concatenations of the usual formula, which cost two more passes over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [..., d] with `cos` and `sin` broadcastable to [..., d / 2]."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """The gradient of `x`, turned back."""
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide = x.to(cos.dtype)
    turned = torch.empty_like(wide)
    (first, second), (to_first, to_second) = wide.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=direction)
    return turned.to(x.dtype)


class ContextParallel:
    """What context-parallel ranks exchange: each has two pieces of every sequence, and gathers the rest.

    Args:
        group: the process group of the ranks that share sequences.
    """

    def __init__(self, group: torch.distributed.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Places in the sequence of this rank's `length` tokens, int64 [length]."""
        return context_parallel_positions(length * self.size, self.size, self.rank, device)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tokens in order, [s * CP, ...] of [s, ...]; gradients are summed and given back."""
        by_rank = gather_from_sequence_parallel_region(x.contiguous(), group=self.group)
        first_to_last = torch.cat(
            [context_parallel_positions(len(by_rank), self.size, rank, x.device) for rank in range(self.size)]
        )
        return by_rank[first_to_last.argsort()]


class SdpaAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`, in the place of Megatron's DotProductAttention.

    Megatron's own writes the s x s matrix; this one lets torch choose a kernel that does not. It applies
    the rotary embedding itself, has no dropout, as Llama has none, and refuses what it would ignore. Under
    context parallelism it gathers keys and values (Llama Team, "The Llama 3 Herd of Models" (2024), 3.3.2).
    With `fused` it takes the kernel of `kernels.py` where that fits.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        rotary: Rotary,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        fused: bool = True,
    ):
        super().__init__(config=config)
        self.fused = fused
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attention_type != "self" or dropout:
            raise ValueError(
                f"SdpaAttention: attention_type={attention_type!r}, dropout={dropout}; "
                "it computes causal self-attention without dropout"
            )
        self.rotary = rotary
        self.context = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context = ContextParallel(pg_collection.cp)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(rotary.width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Attends causally: `query` [s, b, n, d], `key` and `value` [s, b, g, d] give [s, b, n * d].

        Under context parallelism s are the tokens of this rank, as `Layout.positions` tells them.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "SdpaAttention computes the causal mask itself and takes no other mask or packing"
            )
        if self.context is not None:
            return self._with_gathered_keys(self.context, query, key, value)
        width = query.shape[-1]
        cos_sd, sin_sd = self.rotary.tables(query.shape[0], query.device)
        if self.fused and width in kernels.HEAD_WIDTHS and kernels.fits(query, width):
            return kernels.Attention.apply(query, key, value, cos_sd, sin_sd, self.softmax_scale).flatten(2)
        # The values lie between queries and keys in memory; torch's kernel is slower on them than a copy.
        q_bnsd, k_bgsd, v_bgsd = (x.permute(1, 2, 0, 3) for x in (query, key, value.contiguous()))
        out_bnsd = attention(
            Rotate.apply(q_bnsd, cos_sd, sin_sd),
            Rotate.apply(k_bgsd, cos_sd, sin_sd),
            v_bgsd,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)

    def _with_gathered_keys(
        self, context: "ContextParallel", query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        cos, sin = self.rotary.tables(query.shape[0] * context.size, query.device)
        own = context.positions(query.shape[0], query.device)
        key = Rotate.apply(key, cos[own][:, None, None], sin[own][:, None, None])
        k_bgsd, v_bgsd = (context.gather(x).permute(1, 2, 0, 3) for x in (key, value))
        out_bnsd = []
        for positions, piece in zip(own.chunk(2), query.chunk(2), strict=True):
            end = int(positions[-1]) + 1
            mask = positions[:, None] >= torch.arange(end, device=query.device)
            out_bnsd.append(
                attention(
                    Rotate.apply(piece.permute(1, 2, 0, 3), cos[positions], sin[positions]),
                    k_bgsd[:, :, :end],
                    v_bgsd[:, :, :end],
                    attn_mask=mask,
                    scale=self.softmax_scale,
                    enable_gqa=query.shape[2] != key.shape[2],
                )
            )
        return torch.cat(out_bnsd, dim=2).permute(2, 0, 1, 3).flatten(2)


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm in fp32 with its gradient by hand: half the passes over memory of torch's on a CPU.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, weight, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        normed = x.float() * scale
        to_input = gradient * normed
        to_weight = to_input.flatten(0, -2).sum(0)
        torch.mul(gradient, weight.float(), out=to_input)
        along = torch.linalg.vecdot(to_input, normed).unsqueeze(-1).div_(x.shape[-1])
        to_input.addcmul_(normed, along, value=-1).mul_(scale)
        return to_input.to(x.dtype), to_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """RMSNorm, marked for sequence parallelism.

    Under sequence parallelism each rank norms its part of the sequence, so the gradients of the weight
    have to be summed over the tensor-parallel group; Megatron-Core does so for weights with this mark.
    With `fused` it takes the kernel of `kernels.py` where that fits.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, fused: bool = True):
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norms the last dimension of `x`, [..., h]."""
        if x.is_cuda:  # there torch has a kernel of its own
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if self.fused and kernels.fits(x, x.shape[-1]):
            return kernels.RMSNorm.apply(x, self.weight, self.eps)
        return _RMSNormFunction.apply(x, self.weight, self.eps)


class _SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up, whose gradient is written into one tensor without concatenation.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
    """

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (gate_and_up,), gradient = ctx.saved_tensors, gradients[0]
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        to_gate, to_up = result.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=to_up).mul_(gradient)
        torch.mul(gradient, up, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return result


class SwiGLU(MegatronModule):
    """The activation of the MLP: [..., 2 * f], gate and up side by side, to [..., f].

    With `fused` it takes the kernel of `kernels.py` where that fits.
    """

    def __init__(self, config: TransformerConfig, fused: bool = True):
        super().__init__(config=config)
        self.fused = fused

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """silu(gate) * up."""
        if self.fused and kernels.fits(gate_and_up, gate_and_up.shape[-1] // 2):
            return kernels.SwiGLU.apply(gate_and_up)
        return _SwiGLUFunction.apply(gate_and_up)
