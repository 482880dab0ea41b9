"""One forward pass over a step's tokens, with the weights of a trained GPTModel.

The weights are those of the model object, in its memory or laid out anew; the layers' arithmetic is written
out, because Megatron-Core's modules spend more time in Python than a decoding step of a small model takes
(docs/decisions.md). Tests hold that the logits are the model's.

Shapes: t tokens of the step, h hidden, g key-value groups of this tensor-parallel rank, d head width.
"""

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import all_gather_into_tensor, all_reduce, get_process_group_ranks
from torch.nn import functional as F

from megatron_codec.inference.attention import PagedAttention
from megatron_codec.inference.blocks import BLOCK
from megatron_codec.inference.graphs import DecodeGraphs
from megatron_codec.inference.linear import CopiedLinear, Linear, make_linear
from megatron_codec.inference.packed import PackedLinear
from megatron_codec.inference.step import Step
from megatron_codec.model import kernels
from megatron_codec.parallel import Layout


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer, and its keys and values, [blocks, g, BLOCK, d] each."""

    attention_norm: Tensor
    qkv: Linear
    projection: Linear
    mlp_norm: Tensor
    gate_and_up: Linear
    down: Linear
    keys: Tensor
    values: Tensor


class _Weights:
    """The parameters of a model by name, which may be let go as they are packed; see `Decoder`."""

    def __init__(self, model: GPTModel, frees: bool):
        self.parameters, self.frees = dict(model.named_parameters()), frees

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def get(self, name: str) -> Tensor | None:
        """The parameter, if there is one on this stage."""
        parameter = self.parameters.get(name)
        return None if parameter is None else parameter.detach()

    def linear(self, name: str, int8: bool = False) -> Linear:
        """The product with it."""
        product = make_linear(self[name], int8)
        if self.frees and isinstance(product, PackedLinear | CopiedLinear):
            parameter = self.parameters[name]
            parameter.data = parameter.data.new_empty(0)
        return product


class Decoder:
    """The pipeline stage of this process, with its part of the key-value cache.

    Args:
        blocks: of the cache, `BLOCK` tokens each.
        rotary_base: of the rotary embedding.
        max_length: tokens that a sequence may have.
        int8: keep the layers' matrices in int8. The output layer, a hundredth of them, stays: its errors
            are those of the logits.
        frees: the model is not needed any more: its weights are let go one by one as they are packed, so
            that no second copy of all of them is ever held.
        graph_rows: on a GPU that shares the model with no other, record steps of up to so many rows that
            decode as CUDA graphs (`graphs.py`); 0 records none.
    """

    def __init__(
        self,
        model: GPTModel,
        layout: Layout,
        blocks: int,
        rotary_base: float,
        max_length: int,
        int8: bool = False,
        graph_rows: int = 0,
        frees: bool = False,
    ):
        config = model.config
        self.layout, self.config = layout, config
        self.hidden_size, self.dtype = config.hidden_size, config.params_dtype
        self.epsilon = config.layernorm_epsilon
        groups = (config.num_query_groups or config.num_attention_heads) // layout.tp
        heads, width = config.num_attention_heads // layout.tp, config.kv_channels
        assert width is not None
        self.attention = PagedAttention(
            heads, groups, width, rotary_base, max_length, self.dtype, layout.device
        )
        weights = _Weights(model, frees)
        cache = torch.zeros(
            (2, len(model.decoder.layers), blocks, groups, BLOCK, width),
            dtype=self.dtype,
            device=layout.device,
        )
        self.layers = [
            _layer(weights, f"decoder.layers.{i}.", cache[0, i], cache[1, i], int8)
            for i in range(cache.shape[1])
        ]
        self.embedding = weights.get("embedding.word_embeddings.weight")
        self.norm = weights.get("decoder.final_layernorm.weight")
        self.output = weights.linear("output_layer.weight") if layout.has_output() else None
        self.graphs = None
        if graph_rows and self.attention.on_gpu and layout.tp == layout.pp == 1:
            self.graphs = DecodeGraphs(self._decode, graph_rows, max_length, layout.device)

    def bytes_per_block(self) -> int:
        """Memory of one block in all layers of this process."""
        layer = self.layers[0]
        return 2 * len(self.layers) * layer.keys[0].numel() * layer.keys.element_size()

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor | None:
        """The logits of the wanted rows, fp32 [wanted, padded vocabulary], on the process that leads its
        layout's; None on the others. Every process of the layout calls it with the same step."""
        device = self.layout.device
        for source, target in step.copies:
            for layer in self.layers:
                layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]
        if self.graphs is not None and self.graphs.takes(step):
            return self.graphs(step)
        self.attention.begin(step)
        hidden = self._through_layers(self._input(step))
        wanted = torch.from_numpy(step.wanted).to(device)
        if self.output is None:
            ranks = get_process_group_ranks(self.layout.groups.pp)
            torch.distributed.send(hidden, ranks[self.layout.pp_rank + 1])
            return self._receive_logits(len(wanted))
        if len(wanted) < len(hidden):
            hidden = hidden[wanted]
        if not len(hidden):
            return self._hand_over(hidden.new_empty(0, 0))
        assert self.norm is not None
        return self._hand_over(self.output(_normed(hidden, self.norm, self.epsilon)))

    def _decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor) -> Tensor:
        """Logits of rows that decode, fp32 [b, padded vocabulary]; see `DecodeGraphs`."""
        assert self.embedding is not None and self.output is not None and self.norm is not None
        self.attention.begin_decoding(positions, slots, tables)
        hidden = self._through_layers(F.embedding(tokens, self.embedding))
        return self.output(_normed(hidden, self.norm, self.epsilon)).float()

    def _through_layers(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            qkv = layer.qkv(_normed(hidden, layer.attention_norm, self.epsilon))
            context = self.attention(qkv, layer.keys, layer.values)
            hidden = hidden + self._summed(layer.projection(context))
            gate_and_up = layer.gate_and_up(_normed(hidden, layer.mlp_norm, self.epsilon))
            hidden = hidden + self._summed(layer.down(_swiglu(gate_and_up)))
        return hidden

    def _input(self, step: Step) -> Tensor:
        """The embedded tokens, or what the stage before has made of them, [t, h]."""
        layout = self.layout
        if not layout.has_embedding():
            hidden = torch.empty(len(step.tokens), self.hidden_size, dtype=self.dtype, device=layout.device)
            ranks = get_process_group_ranks(layout.groups.pp)
            torch.distributed.recv(hidden, ranks[layout.pp_rank - 1])
            return hidden
        assert self.embedding is not None
        tokens = torch.from_numpy(step.tokens).to(layout.device)
        if layout.tp == 1:
            return F.embedding(tokens, self.embedding)
        local = tokens - layout.tp_rank * len(self.embedding)
        elsewhere = (local < 0) | (local >= len(self.embedding))
        hidden = F.embedding(local.masked_fill(elsewhere, 0), self.embedding)
        return self._summed(hidden.masked_fill(elsewhere[:, None], 0))

    def _summed(self, part: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks."""
        if self.layout.tp > 1:
            all_reduce(part, group=self.layout.groups.tp)
        return part

    def _hand_over(self, logits: Tensor) -> Tensor | None:
        """On the last stage: the whole vocabulary, to the process that leads."""
        layout, rows = self.layout, len(logits)
        if not rows:
            return logits.float() if layout.pp == 1 else None
        if layout.tp > 1:
            gathered = logits.new_empty(layout.tp * rows, logits.shape[1])
            all_gather_into_tensor(gathered, logits, group=layout.groups.tp)
            logits = torch.cat(gathered.chunk(layout.tp), dim=1)
        logits = logits.float()
        if layout.pp == 1:
            return logits
        if layout.tp_rank == 0:
            torch.distributed.send(logits, get_process_group_ranks(layout.groups.pp)[0])
        return None

    def _receive_logits(self, rows: int) -> Tensor | None:
        layout = self.layout
        if not (layout.has_embedding() and layout.tp_rank == 0 and rows):
            return None
        assert self.embedding is not None
        logits = torch.empty(rows, layout.tp * len(self.embedding), device=layout.device)
        torch.distributed.recv(logits, get_process_group_ranks(layout.groups.pp)[-1])
        return logits


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if kernels.fits(x, x.shape[-1]):
        return kernels.rms_norm(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    if kernels.fits(gate_and_up, gate_and_up.shape[-1] // 2):
        return kernels.swiglu(gate_and_up)
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def _layer(weights: _Weights, prefix: str, keys: Tensor, values: Tensor, int8: bool) -> _Layer:
    def norm(ours: str, fused: str) -> Tensor:
        # Transformer Engine keeps the norm's weight in the linear layer behind it.
        name = prefix + ours
        return weights[name] if name in weights else weights[prefix + fused]

    def linear(name: str) -> Linear:
        return weights.linear(f"{prefix}{name}.weight", int8)

    return _Layer(
        attention_norm=norm("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        qkv=linear("self_attention.linear_qkv"),
        projection=linear("self_attention.linear_proj"),
        mlp_norm=norm("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        gate_and_up=linear("mlp.linear_fc1"),
        down=linear("mlp.linear_fc2"),
        keys=keys,
        values=values,
    )
