"""What a Hugging Face folder of our making has besides weights and tokenizer.

megatron_codec.json    shape, tokenizer and codec as in a checkpoint, so that the way back loses nothing
generation_config.json defaults of sampling
README.md              the model card
make_picture.py        a generation of transformers as a picture
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_codec import __version__
from megatron_codec.codecs import Codec, JpegCodec
from megatron_codec.conversion import config_json, vocabulary
from megatron_codec.files import whole_file, write_json
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training.checkpoint import Description

DESCRIPTION = "megatron_codec.json"
SCRIPT = "make_picture.py"


def write(folder: Path, description: Description, tokenizer: Tokenizer, codec: Codec, dtype: str) -> None:
    """Writes all but the weights.

    Args:
        folder: it exists.
        dtype: of the weights.
    """
    model = description.model
    fields: dict[str, Any] = asdict(description)
    if isinstance(codec, JpegCodec):
        fields["jpeg"] = {"preamble": codec.preamble.hex(), "file_head": codec.file_head.hex()}
        shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    write_json(folder / DESCRIPTION, fields)
    write_json(folder / config_json.CONFIG, config_json.fields_of(model, tokenizer, dtype))
    generation = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "suppress_tokens": [tokenizer.bos, *tokenizer.unused],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": tokenizer.num_tokens,  # all; older releases of vLLM refuse 0
        "top_p": 1.0,
        "max_length": model.seq_length,
    }
    write_json(folder / "generation_config.json", generation)
    vocabulary.write(folder, tokenizer, model.seq_length)
    with whole_file(folder / "README.md", "w") as stream:
        stream.write(_card(description, tokenizer, codec, dtype))


def _card(description: Description, tokenizer: Tokenizer, codec: Codec, dtype: str) -> str:
    model, settings = description.model, codec.to_dict()["settings"]
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    trained = (
        f"{description.iteration:,} steps, {description.consumed_samples:,} sequences of up to "
        f"{model.seq_length:,} tokens"
        if description.iteration
        else "not known: the weights were converted from elsewhere"
    )
    use = shared = ""
    if isinstance(codec, JpegCodec):
        use = f"\n`python {SCRIPT} picture.jpg` makes a picture with transformers alone.\n"
        shared = (
            "\nTables that all files share are left out of the stream and have to be put in again; "
            f"`{DESCRIPTION}` has\nthem.\n"
        )
    return f"""---
library_name: transformers
tags:
- jpeg-lm
- megatron_codec
---

# A language model that writes {codec.name} files byte by byte

A Llama whose tokens are the bytes of canonical {codec.name} files and merges of them, after *JPEG-LM: LLMs as Image
Generators with Canonical Codec Representations* (Han et al., 2024). It writes files, not text.

| | |
|---|---|
| layers, hidden size, FFN size, heads | {model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}, {model.num_attention_heads} |
| context | {model.seq_length:,} tokens |
| weights | {dtype} |
| codec | {codec.name}: {described} |
| ids | {tokenizer.num_tokens}: 256 bytes, {tokenizer.vocab_size - 256} merges, BOS {tokenizer.bos}, EOS {tokenizer.eos} |
| tokenizer | sha256 {tokenizer.hash} |
| training | {trained} |
| written by | megatron_codec {__version__} |

## Use
{use}
A byte is written as the character U+2800 + byte. The tokenizer puts BOS in front and no EOS behind; a file is complete
when the model gives EOS. `{DESCRIPTION}` has the settings of the codec and the tokenizer as they were trained.
{shared}
    vllm serve FOLDER

serves it; prompts are best given as token ids. `tools/convert_checkpoint.py --from hf --to megatron` of megatron_codec
takes the folder back, for training on and for its own server.

The model knows only files of the kind that it was trained on, made by these settings.
"""  # noqa: E501
