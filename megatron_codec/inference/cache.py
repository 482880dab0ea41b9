"""The key-value cache, and the attention that makes Megatron-Core's GPTModel use it.

Keys are stored rotated, so a decoding step rotates one position and no earlier one is touched again.
Rows of a batch may stand at different positions: each row writes at its own and sees what lies before.

Shapes: s new positions, b rows, n heads, g key-value groups, d head width, t cached positions.
"""

# torch types the attributes of a module as Tensor or Module.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import math

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.model.layers import Rotary, Rotate


class KeyValueCache:
    """Rotated keys and values of every layer of this pipeline stage, for `rows` sequences.

    Attributes:
        keys, values: [layer, row, g, max_length, d].
        positions: [b, s], where the tokens of the current forward pass stand.
    """

    def __init__(
        self, config: TransformerConfig, layers: int, rows: int, max_length: int, device: torch.device
    ):
        groups = (config.num_query_groups or config.num_attention_heads) // config.tensor_model_parallel_size
        shape = (layers, rows, groups, max_length, config.kv_channels)
        self.keys = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.advance(torch.zeros((rows, 1), dtype=torch.long, device=device))

    def advance(self, positions: Tensor) -> None:
        """Says where the tokens of the next forward pass stand, [b, s]; the same for all layers."""
        self.positions = positions
        self.length = int(positions.max()) + 1
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        # A row sees its own past and present; padding behind a short prompt is overwritten before it is seen.
        self.mask = torch.arange(self.length, device=positions.device) <= positions[:, None, :, None]

    def update(self, layer: int, key_bgsd: Tensor, value_bgsd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values and returns all up to the longest row, [b, g, t, d] each."""
        for store, new in ((self.keys[layer], key_bgsd), (self.values[layer], value_bgsd)):
            store[self.rows, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def select(self, rows: Tensor, length: int) -> None:
        """Keeps copies of the given rows in the given order (a row may come several times)."""
        old_keys, old_values = self.keys, self.values
        layers, _, groups, max_length, width = old_keys.shape
        shape = (layers, len(rows), groups, max_length, width)
        self.keys, self.values = old_keys.new_zeros(shape), old_values.new_zeros(shape)
        self.keys[:, :, :, :length] = old_keys[:, rows, :, :length]
        self.values[:, :, :, :length] = old_values[:, rows, :, :length]


class CachedAttention(MegatronModule):
    """Attention over the cache, in the place of training's core attention; causal by position."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        rotary: Rotary,
        softmax_scale: float | None = None,
        **unused,
    ):
        super().__init__(config=config)
        self.rotary = rotary
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(rotary.width)
        self.cache: KeyValueCache | None = None
        self.layer = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask, **unused) -> Tensor:
        """Takes `query` [s, b, n, d], `key` and `value` [s, b, g, d]; returns [s, b, n * d]."""
        if self.cache is None:
            raise RuntimeError("CachedAttention has no cache: call attach() before the forward pass")
        cos, sin = self.rotary.tables(self.cache.length, like=query)
        cos_b1sd, sin_b1sd = (table[self.cache.positions][:, None] for table in (cos, sin))
        q_bnsd, k_bgsd, v_bgsd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        keys, values = self.cache.update(self.layer, Rotate.apply(k_bgsd, cos_b1sd, sin_b1sd), v_bgsd)
        out_bnsd = F.scaled_dot_product_attention(
            Rotate.apply(q_bnsd, cos_b1sd, sin_b1sd),
            keys,
            values,
            attn_mask=self.cache.mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)


def attach(model: GPTModel, cache: KeyValueCache) -> None:
    """Makes the model, built with `CachedAttention`, read and write this cache."""
    for index, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention.core_attention
        attention.cache, attention.layer = cache, index
