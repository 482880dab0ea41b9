"""What tools/convert_checkpoint.py does: a model of either kind in, a folder of either kind out.

Weights pass one by one: a tensor is read, brought into the other form and written before the next is read.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from megatron_codec.codecs import JpegCodec
from megatron_codec.config import ModelConfig
from megatron_codec.conversion import distributed, folder, shards
from megatron_codec.conversion.check import Side, check, documents
from megatron_codec.conversion.sources import Source, check_tokenizer, open_checkpoint, open_hugging_face
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.files import whole_folder
from megatron_codec.model.hf import Weight, shape_of, weights_of
from megatron_codec.training import checkpoint

Kind = Literal["hf", "megatron"]


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a checkpoint of ours into a Hugging Face folder, or the other way round."""

    source: Annotated[Kind, tyro.conf.arg(name="from")]
    """What --load is: a folder of checkpoints, or a folder that transformers loads."""
    target: Annotated[Kind, tyro.conf.arg(name="to")]
    """What --save will be."""
    load: Path
    """The folder to read."""
    save: Path
    """The folder to write; it appears when it is complete."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; by default as they are (float16 becomes float32, which holds it exactly)."""
    max_shard_size: float = 1.0
    """Of a safetensors file, in GiB; a shard is written from memory."""
    image_size: int = 256
    """Of a Hugging Face folder that does not say which JPEG files its model writes: their side in pixels;
    by default the paper's."""
    quality: int = 25
    """Of such a folder: their quality."""
    check: tuple[Path, ...] = ()
    """Pictures (videos for a model of clips), or folders of them: load both models and compare logits and ids
    on them, weights and files."""
    check_samples: int = 4
    """How many of them."""
    check_dtype: Literal["float32", "bfloat16"] = "float32"
    """What to compute logits in. One model is in memory at a time."""


def convert(config: ConvertConfig) -> bool:
    """Converts, prints what was done, and with --check proves it.

    Returns:
        Whether both are the same model, as far as it was checked.

    Raises:
        UserError: what is read is no model of ours or of a plain Llama over bytes, or is damaged; --save
            exists, or there is no room for it.
    """
    faults = [
        UserError(f"--{name.replace('_', '-')} {value}", "must be above 0", "leave it out for the default")
        for name in ("max_shard_size", "check_samples")
        if not (value := getattr(config, name)) > 0
    ]
    if config.save.exists() and (not config.save.is_dir() or any(config.save.iterdir())):
        faults.append(
            UserError(f"--save {config.save}", "exists already", "name another folder, or remove it first")
        )
    with collecting(faults):
        assumed = JpegCodec(config.image_size, config.quality)
    raise_all(faults)
    if config.source == "hf":
        source = open_hugging_face(config.load, assumed)
    else:
        source = open_checkpoint(config.load)
    dtype = getattr(torch, config.dtype) if config.dtype else source.weights.dtype
    name = str(dtype).removeprefix("torch.")
    description = replace(source.description, bf16=dtype == torch.bfloat16, optimizer=False)
    size = _bytes_of(description.model, source.tokenizer.num_tokens, dtype)
    for note in [*source.notes, *_changes_of_type(source.weights.dtypes, dtype)]:
        print(f" {note}")
    if source.foreign:
        print(f" {check_tokenizer(source)}")
    chosen = []
    if config.check:  # what cannot be checked is said before hours of work
        _require_transformers()
        chosen = documents(config.check, config.check_samples, source.codec, source.tokenizer)
    _require_room(config.save, size)

    with whole_folder(config.save) as partial, _reader(source, dtype, size) as (read, digest):
        if config.target == "hf":
            folder.write(partial, description, source.tokenizer, source.codec, name)
            shards.write(
                partial, description.model, read, source.weights.padding, dtype,
                source.tokenizer.num_tokens, int(config.max_shard_size * 2**30),
            )  # fmt: skip
        else:
            target = partial / checkpoint.name_of(description.iteration)
            target.mkdir()
            distributed.write(target, description, read, source.weights.padding, source.tokenizer.num_tokens)
            (partial / checkpoint.LATEST).write_text(f"{description.iteration}\n")
            source.tokenizer.save(partial / "tokenizer.json")
    print(f" {size / 1e9:.3f} GB of weights in {name}, sha256 {digest.hexdigest()}\n saved {config.save}")
    if not config.check:
        return True
    made = checkpoint.latest(config.save) if config.target == "megatron" else config.save
    sides = [Side(config.source, source.path), Side(config.target, made)]
    with _reader(_reopened(sides[1], source), dtype, size) as (read, again):
        for weight in weights_of(description.model):
            read(weight)
    same = again.hexdigest() == digest.hexdigest()
    print(
        f" weights read again: {'the same sha256' if same else f'sha256 {again.hexdigest()}: NOT the same'}"
    )
    context, dtype = description.model.seq_length, getattr(torch, config.check_dtype)
    return check(sides, chosen, source.tokenizer, context, dtype) and same


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise UserError("--check", "needs transformers", "pip install 'megatron_codec[hf]'")


def _require_room(path: Path, size: int) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(
            f"--save {path}",
            f"needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "make room, or name a folder on another disk",
        )


def _reopened(side: Side, source: Source) -> Source:
    model, count = source.description.model, source.tokenizer.num_tokens
    if side.kind == "megatron":
        weights = distributed.Checkpoint(side.path, model, count)
    else:
        weights = shards.Folder(side.path, model, count, count, model.num_attention_heads)
    return replace(source, weights=weights)


@contextmanager
def _reader(
    source: Source, dtype: torch.dtype, size: int
) -> Iterator[tuple[Callable[[Weight], Tensor], "hashlib._Hash"]]:
    """Reads weights as `dtype`, in the order of the table, and hashes them; shows progress."""
    digest = hashlib.sha256()
    with tqdm(total=size, unit="B", unit_scale=True, desc=str(source.weights.path)) as bar:

        def read(weight: Weight) -> Tensor:
            tensor = source.weights.read(weight).to(dtype).contiguous()
            digest.update(tensor.view(torch.uint8).numpy().data)
            bar.update(tensor.nbytes)
            return tensor

        yield read, digest


def _bytes_of(model: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(
        int(np.prod(shape_of(weight.row.shape, model, num_tokens))) for weight in weights_of(model)
    )


def _changes_of_type(found: set[torch.dtype], dtype: torch.dtype) -> list[str]:
    if found == {dtype}:
        return []
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in found))
    exact = dtype == torch.float32
    return [f"weights in {names} become {dtype}".replace("torch.", "") + (", exactly" if exact else "")]
