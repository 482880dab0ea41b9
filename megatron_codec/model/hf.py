"""Names and shapes of a Llama's weights here and in Hugging Face's transformers: one table, for both ways.

Letters of the shapes: v ids, h hidden size, f FFN size, k width of all key-value heads together (h, unless
query heads share them).

Ours are the names in a checkpoint, `decoder.layers.` followed by the layer's number; theirs are those of
LlamaForCausalLM. Weights are whole, not cut for tensor parallelism, and have a row for each id, no padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_codec.config import ModelConfig

# One matrix of ours holds several of theirs: "heads", q k v of the first head, then of the second, and so
# on; "stacked", one below the other.
How = Literal["same", "heads", "stacked"]


@dataclass(frozen=True)
class Row:
    """One weight of ours and what it is at theirs, each name with its shape."""

    ours: str
    shape: str
    theirs: dict[str, str]
    how: How = "same"


BEFORE = (Row("embedding.word_embeddings.weight", "v h", {"model.embed_tokens.weight": "v h"}),)
LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "h", {"input_layernorm.weight": "h"}),
    Row(
        "self_attention.linear_qkv.weight",
        "3h h",
        {
            "self_attn.q_proj.weight": "h h",
            "self_attn.k_proj.weight": "k h",
            "self_attn.v_proj.weight": "k h",
        },
        "heads",
    ),
    Row("self_attention.linear_proj.weight", "h h", {"self_attn.o_proj.weight": "h h"}),
    Row("mlp.linear_fc1.layer_norm_weight", "h", {"post_attention_layernorm.weight": "h"}),
    Row(
        "mlp.linear_fc1.weight",
        "2f h",
        {"mlp.gate_proj.weight": "f h", "mlp.up_proj.weight": "f h"},
        "stacked",
    ),
    Row("mlp.linear_fc2.weight", "h f", {"mlp.down_proj.weight": "h f"}),
)
AFTER = (
    Row("decoder.final_layernorm.weight", "h", {"model.norm.weight": "h"}),
    Row("output_layer.weight", "v h", {"lm_head.weight": "v h"}),
)


@dataclass(frozen=True)
class Weight:
    """A row of the table for one layer, or for none."""

    row: Row
    layer: int | None = None

    @property
    def key(self) -> str:
        """Its name in a checkpoint, where the layers are stacked."""
        return self.row.ours if self.layer is None else f"decoder.layers.{self.row.ours}"

    @property
    def theirs(self) -> list[str]:
        """Its names at Hugging Face."""
        prefix = "" if self.layer is None else f"model.layers.{self.layer}."
        return [prefix + name for name in self.row.theirs]

    @property
    def has_rows_of_ids(self) -> bool:
        """Whether each row belongs to an id: embedding and output layer."""
        return self.row.shape.startswith("v")


def weights_of(model: ModelConfig) -> Iterator[Weight]:
    """All weights of a model, in the order in which a token meets them."""
    yield from map(Weight, BEFORE)
    for layer in range(model.num_layers):
        yield from (Weight(row, layer) for row in LAYER)
    yield from map(Weight, AFTER)


def shape_of(
    shape: str, model: ModelConfig, num_ids: int, key_value_heads: int | None = None
) -> tuple[int, ...]:
    """A shape of the table in numbers.

    Args:
        num_ids: rows of embedding and output layer.
        key_value_heads: where they are fewer than the heads.
    """
    width = model.hidden_size // model.num_attention_heads
    sizes = {
        "v": num_ids,
        "h": model.hidden_size,
        "f": model.ffn_hidden_size,
        "k": width * (key_value_heads or model.num_attention_heads),
    }
    return tuple(int(word[:-1] or 1) * sizes[word[-1]] for word in shape.split())


def split(weight: Weight, whole: Tensor, model: ModelConfig) -> list[Tensor]:
    """Our weight as theirs, in the order of `weight.theirs`."""
    if weight.row.how == "heads":
        heads = whole.view(model.num_attention_heads, 3, -1, model.hidden_size)
        return [part.flatten(0, 1) for part in heads.unbind(1)]
    return list(whole.chunk(len(weight.row.theirs)))


def join(weight: Weight, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Their weights as ours. Key-value heads that several query heads share are repeated for each of them,
    which changes no logit (Ainslie et al., "GQA", 2023, section 2.1, the other way round)."""
    if weight.row.how == "heads":
        width = model.hidden_size // model.num_attention_heads
        heads = [part.view(-1, width, model.hidden_size) for part in parts]
        whole = [part.repeat_interleave(model.num_attention_heads // len(part), 0) for part in heads]
        return torch.stack(whole, 1).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
