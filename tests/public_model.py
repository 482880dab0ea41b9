"""A folder of the kind that the public JPEG-LM weights come in, with random weights.

A Llama of transformers, and a slow tokenizer trained by SentencePiece over real streams, one character
U+2800 + byte a byte.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_codec.tokenizer.exchange import CHARACTERS, to_text

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 12288,
    "rms_norm_eps": 1e-5,
    # Ten times the usual one, so that attention is far from uniform and logits are of order 1.
    "initializer_range": 0.2,
}
# What a folder of that time says of its tokenizer.
LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False},
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 12288,
    "sp_model_kwargs": {},
}


def sentencepiece_model(streams: Sequence[bytes], vocab_size: int, **settings: Any) -> bytes:
    """A model file; `vocab_size` counts <unk>, <s> and </s>."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "character_coverage": 1.0, "add_dummy_prefix": False} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(to_text, streams),
        model_writer=model,
        vocab_size=vocab_size,
        required_chars="".join(CHARACTERS),
        max_sentence_length=1 << 20,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def write_public_model(
    folder: Path, tokenizer: bytes, dtype: torch.dtype = torch.float16, seed: int = 0, **shape: Any
) -> Path:
    """Writes the folder.

    Args:
        tokenizer: of `sentencepiece_model`.
        shape: fields of LlamaConfig that differ from SHAPE.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    torch.manual_seed(seed)
    fields = SHAPE | {"vocab_size": len(pieces), "tie_word_embeddings": False} | shape
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(dtype)
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_TOKENIZER))
    return folder
