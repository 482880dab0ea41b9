"""Weights in safetensors files, as Hugging Face cuts them into shards: read and written tensor by tensor.

model.safetensors                            all in one file, or
model-00001-of-00003.safetensors ...         shards, and
model.safetensors.index.json                 which tensor is in which
padding.st                                   of a folder of our making: rows of no id, for the way back
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_codec.config import ModelConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.files import write_json
from megatron_codec.model.hf import Weight, join, shape_of, split, weights_of

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Training has these rows in its loss. The name keeps transformers and vLLM from reading it.
PADDING = "padding.st"
# safetensors writes a shard from memory.
SHARD_BYTES = 1 << 30
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# A buffer that older releases of transformers saved; it follows from the base of the rotary embedding.
_BUFFER = "rotary_emb.inv_freq"


class Folder:
    """The weights of a Hugging Face folder, by our names. Nothing is read before it is asked for.

    Args:
        model: the shape that config.json tells.
        num_tokens: ids of the tokenizer; rows beyond are padding.
        vocab_size, key_value_heads: of config.json.

    Raises:
        UserError: files or tensors are missing or unknown, or have a shape or type that does not fit, all at
            once.
    """

    def __init__(
        self, path: Path, model: ModelConfig, num_tokens: int, vocab_size: int, key_value_heads: int
    ):
        self.path, self.model, self.num_tokens = path, model, num_tokens
        self._files = _files(path)
        faults: list[UserError] = []
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(set(self._files.values())):
            with _opened(path / file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    part = tensors.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype()
                    if self._files.setdefault(name, file) != file:
                        faults.append(UserError(f"{path}: {name}", f"is in {file} too", f"mend {INDEX}"))
        expected = {
            name: shape_of(shape, model, vocab_size, key_value_heads)
            for weight in weights_of(model)
            for name, shape in zip(weight.theirs, weight.row.theirs.values(), strict=True)
        }
        self._files = {name: file for name, file in self._files.items() if not name.endswith(_BUFFER)}
        faults += _faults(path, expected, {n: f for n, f in found.items() if n in self._files}, self._files)
        raise_all(faults)
        types = {DTYPES[kind] for name, (_, kind) in found.items() if name in expected}
        # What checkpoints of ours do not have, float16 or several types, is kept exactly in float32.
        self.dtypes = types
        self.dtype = torch.bfloat16 if types == {torch.bfloat16} else torch.float32

    def read(self, weight: Weight) -> Tensor:
        """A weight, with a row for each id where it has such rows, in the type of the file."""
        whole = join(weight, [self._tensor(name) for name in weight.theirs], self.model)
        return whole[: self.num_tokens] if weight.has_rows_of_ids else whole

    def padding(self, weight: Weight) -> Tensor:
        """The rows behind those of the ids, in the weights or, of a folder of our making, beside them.

        Raises:
            UserError: the file is damaged or of another shape.
        """
        if not (self.path / PADDING).exists():
            [name] = weight.theirs
            return self._tensor(name)[self.num_tokens :]
        with _opened(self.path / PADDING) as tensors:
            rows = tensors.get_tensor(weight.key).clone()
        if rows.dim() != 2 or rows.shape[1] != self.model.hidden_size:
            raise UserError(
                f"{self.path / PADDING}: {weight.key}",
                f"has the shape {list(rows.shape)}",
                "copy the folder again, or delete the file: its rows stand for no id",
            )
        return rows

    def _tensor(self, name: str) -> Tensor:
        # A file is opened anew for each tensor: of a mapped file, what was read stays in memory.
        with _opened(self.path / self._files[name]) as tensors:
            return tensors.get_tensor(name).clone()


def write(
    path: Path,
    model: ModelConfig,
    read: Callable[[Weight], Tensor],
    padding: Callable[[Weight], Tensor],
    dtype: torch.dtype,
    num_tokens: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all weights that `read` gives into shards of at most `shard_bytes`, or of one tensor.

    Args:
        path: a folder that exists.
        padding: rows behind those of the `num_tokens` ids, kept in a file of their own.
    """
    rest = {weight.key: padding(weight).to(dtype) for weight in weights_of(model) if weight.has_rows_of_ids}
    if any(len(rows) for rows in rest.values()):
        _save(rest, path / PADDING)
    shards = _plan(model, num_tokens, dtype.itemsize, shard_bytes)
    numbers = {name: number for number, shard in enumerate(shards) for name in shard}
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WHOLE]
    waiting: dict[str, Tensor] = {}
    left = [set(shard) for shard in shards]
    size = 0
    for weight in weights_of(model):
        for name, part in zip(weight.theirs, split(weight, read(weight), model), strict=True):
            tensor = part.to(dtype).contiguous()
            size += tensor.nbytes
            # Of a view, the whole of it would wait.
            waiting[name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
            number = numbers[name]
            left[number].discard(name)
            if not left[number]:
                shard = {name: waiting.pop(name) for name in shards[number]}
                _save(shard, path / files[number])
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": size}}
        index["weight_map"] = {name: files[number] for name, number in numbers.items()}
        write_json(path / INDEX, index)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # of its own it would be private


def _plan(model: ModelConfig, num_tokens: int, item_size: int, most: int) -> list[list[str]]:
    """Which tensors each shard holds, in the order in which they are made."""
    shards: list[list[str]] = [[]]
    filled = 0
    for weight in weights_of(model):
        for name, shape in zip(weight.theirs, weight.row.theirs.values(), strict=True):
            size = item_size
            for length in shape_of(shape, model, num_tokens):
                size *= length
            if shards[-1] and filled + size > most:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    return shards


def _files(path: Path) -> dict[str, str]:
    """The file of each tensor that the index names; of a folder without an index, none yet.

    Raises:
        UserError: there are no weights, or files are missing.
    """
    index = path / INDEX
    if not index.exists():
        if (path / WHOLE).exists():
            with _opened(path / WHOLE) as tensors:
                return dict.fromkeys(tensors.keys(), WHOLE)
        others = sorted(file.name for file in path.glob("*.bin"))
        raise UserError(
            f"--load {path}",
            f"has no {WHOLE} and no {INDEX}" + (f", only {', '.join(others[:3])}" if others else ""),
            "save the model with transformers' save_pretrained, which writes safetensors",
        )
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({file for file in files.values() if not (path / file).is_file()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            str(index), f"is no index of shards ({type(error).__name__}: {error})", "copy the folder again"
        ) from error
    if missing:
        raise UserError(
            f"--load {path}",
            f"lacks {len(missing)} of {len(set(files.values()))} shards: {', '.join(missing)}",
            "copy the folder again",
        )
    return files


def _faults(
    path: Path,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[tuple[int, ...], str]],
    files: dict[str, str],
) -> Iterator[UserError]:
    """What the tensors of a folder have that a Llama of this shape has not, and the other way round."""
    missing = [name for name in expected if name not in found]
    if missing:
        yield UserError(
            f"--load {path}",
            f"lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}",
            "copy the folder again; config.json and weights must be of one model",
        )
    unknown = sorted(files.keys() - expected.keys())
    if unknown:
        yield UserError(
            f"--load {path}",
            f"has {len(unknown)} tensors that a plain Llama has not, first {unknown[0]}",
            "merge adapters and leave out biases before conversion",
        )
    for name, (shape, kind) in found.items():
        if name not in expected:
            continue
        if shape != expected[name]:
            yield UserError(
                f"{path / files[name]}: {name}",
                f"has the shape {list(shape)}; by config.json it is {list(expected[name])}",
                "config.json and weights must be of one model",
            )
        if kind not in DTYPES:
            yield UserError(
                f"{path / files[name]}: {name}", f"is of type {kind}", f"must be one of {', '.join(DTYPES)}"
            )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(
            str(file), f"cannot be read as safetensors ({error})", "it is damaged: copy it again"
        ) from error
