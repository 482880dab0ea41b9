"""A model to convert, of either kind: what it says of itself, checked, and its weights, not yet read."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_codec.codecs import Codec, JpegCodec, get_codec
from megatron_codec.config import ModelConfig
from megatron_codec.conversion import config_json, distributed, folder, shards, vocabulary
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description


@dataclass(frozen=True)
class Source:
    """A model to convert.

    Attributes:
        path: its folder.
        description: as a checkpoint has it.
        weights: reads them.
        notes: what was assumed or changed, for the user to know.
        foreign: whether it came from elsewhere, with a tokenizer that others made.
    """

    path: Path
    description: Description
    tokenizer: Tokenizer
    codec: Codec
    weights: "shards.Folder | distributed.Checkpoint"
    notes: list[str] = field(default_factory=list)
    foreign: bool = False


def open_checkpoint(path: Path) -> Source:
    """The newest checkpoint of a run, or one of its checkpoints.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = checkpoint.latest(path)
    description = Description.read(path)
    tokenizer = Tokenizer.from_dict(description.tokenizer)
    codec = get_codec(description.codec["name"], description.codec["settings"])
    weights = distributed.Checkpoint(path, description.model, tokenizer.num_tokens)
    return Source(path, description, tokenizer, codec, weights)


def open_hugging_face(path: Path, assumed: JpegCodec) -> Source:
    """A folder that `convert` wrote, or one of the public model's kind.

    Args:
        assumed: the codec of the streams, where the folder does not say it.

    Raises:
        UserError: everything that `config_json`, `vocabulary` and `shards` refuse; more ids than rows.
    """
    shape = config_json.read(path)
    foreign = not (path / folder.DESCRIPTION).exists()
    notes = []
    if foreign:
        codec = assumed
        tokenizer = vocabulary.read(path, codec.to_dict())
        description = Description(
            model=shape.model,
            tokenizer=tokenizer.to_dict(),
            codec=codec.to_dict(),
            dataset_hash="",
            iteration=0,
            consumed_samples=0,
            bf16=False,
        )
        notes.append(
            f"{path} does not say which files its model writes; assumed are those of the JPEG-LM paper: "
            f"{codec.image_size} x {codec.image_size} pixels, quality {codec.quality}, 4:2:0, a restart "
            "marker after each patch, tables removed"
        )
    else:
        description = Description.read(path, folder.DESCRIPTION)
        tokenizer = Tokenizer.from_dict(description.tokenizer)
        codec = get_codec(description.codec["name"], description.codec["settings"])
        vocabulary.require_same(path, tokenizer)
        _require_same_shape(path, shape.model, description.model)
    count, rows = tokenizer.num_tokens, shape.vocab_size
    if count > rows:
        raise UserError(
            f"{path}: a tokenizer of {count} ids",
            f"must not have more than the {rows} rows of the embedding",
            "tokenizer and weights must be of one model",
        )
    if count < rows:
        notes.append(
            f"{rows - count} rows of embedding and output layer belong to no id: they are taken for padding"
        )
    heads = description.model.num_attention_heads
    if shape.key_value_heads != heads:
        notes.append(
            f"grouped-query attention: each of {shape.key_value_heads} key-value heads is repeated for "
            f"{heads // shape.key_value_heads} query heads; the logits stay the same, the model grows"
        )
    if foreign:
        special = f"BOS {tokenizer.bos}, EOS {tokenizer.eos}"
        if tokenizer.prefix:
            special += f", {tokenizer.prefix[0]} in front of every document"
        if tokenizer.unused:
            special += f", {len(tokenizer.unused)} without a use"
        notes.append(f"ids are kept: {count} of them, {special}")
    weights = shards.Folder(path, description.model, count, rows, shape.key_value_heads)
    return Source(path, description, tokenizer, codec, weights, notes, foreign)


def _require_same_shape(path: Path, there: ModelConfig, ours: ModelConfig) -> None:
    """config.json of a folder of our making must not have been edited."""
    # What a Llama of transformers does not know.
    names = ("max_position_embeddings", "make_vocab_size_divisible_by", "init_method_std")
    ours = replace(ours, **{name: getattr(there, name) for name in names})
    if ours != there:
        differing = [name for name, value in asdict(ours).items() if getattr(there, name) != value]
        raise UserError(
            str(path / config_json.CONFIG),
            f"differs from {folder.DESCRIPTION} in {', '.join(differing)}",
            f"copy the folder again, or delete {folder.DESCRIPTION} to go by {config_json.CONFIG} alone",
        )


def check_tokenizer(source: Source) -> str:
    """Encodes a picture both ways; what came out, for the user to read.

    Raises:
        UserError: the ids differ.
    """
    assert isinstance(source.codec, JpegCodec)
    size = source.codec.image_size
    ramp = np.linspace(0, 255, size)
    noise = np.random.default_rng(0).normal(0, 20, (size, size, 3))
    picture = np.stack(
        [ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.flip(ramp)[:, None] + 0 * ramp], -1
    )
    stream = source.codec.encode(np.clip(picture + noise, 0, 255).astype(np.uint8))
    ids = source.tokenizer.encode_to_list(stream)
    if source.tokenizer.decode(ids) != stream:
        raise UserError(
            f"--load {source.path}", "has a tokenizer that does not give a picture back", "give another one"
        )
    encode = vocabulary.library_encoder(source.path)
    if encode is None:
        return "a picture's ids were not compared with those of its own tokenizer: transformers is missing"
    theirs = encode(stream)
    if theirs != ids:
        first = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(ids))
        raise UserError(
            f"--load {source.path}",
            f"has a tokenizer that gives other ids than ours for a picture, from position {first} on",
            "convert with the release of transformers that the model was made with",
        )
    return f"a picture of {len(stream)} bytes has the same {len(ids)} ids in its own tokenizer and in ours"
