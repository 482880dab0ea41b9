"""What the tests of training and generation share: a small dataset of real photographs, the flags of a model
that takes milliseconds a step, and the reading of what a run wrote.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_codec.codecs import JpegCodec
from megatron_codec.data import write_dataset
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

CODEC = JpegCodec(image_size=32, quality=25)
STEPS, SAVED_AT = 12, 6
# --lr-decay-iters, so that a run of another length has the same learning rates.
FLAGS = f"""
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --seq-length 160
    --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --lr-decay-iters 20
    --lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 4 --log-interval 1 --eval-interval {SAVED_AT} --eval-iters 2
""".split()


@dataclass(frozen=True)
class Corpus:
    """Two datasets with one tokenizer, and the pictures that they were made of.

    Attributes:
        train, valid: prefixes of the datasets.
        pictures: folder of the pictures of `valid` as PNG files.
        tokenizer: path of the vocabulary.
    """

    train: str
    valid: str
    pictures: Path
    tokenizer: Path

    @property
    def flags(self) -> list[str]:
        """Model, training and data; layouts and folders go behind them."""
        return [*FLAGS, "--train-data-path", self.train, "--valid-data-path", self.valid]


def make_corpus(folder: Path, vocab_size: int = 320) -> Corpus:
    """Writes 90 pictures to train on and 30 to validate with, 32 pixels wide, about 120 tokens each."""
    crops = photo_crops(120, CODEC.image_size)
    streams = [CODEC.encode(crop) for crop in crops]
    tokenizer = Tokenizer.train(streams, vocab_size, codec=CODEC.to_dict())
    tokenizer.save(folder / "tokenizer.json")
    parts = {"train": range(120), "valid": range(0, 120, 4)}
    parts["train"] = [i for i in parts["train"] if i not in parts["valid"]]
    for name, chosen in parts.items():
        ids, offsets = tokenizer.encode_batch([streams[i] for i in chosen], add_special_tokens=True)
        documents = [ids[start:stop] for start, stop in pairwise(offsets.tolist())]
        write_dataset(folder / name, documents, CODEC.to_dict(), tokenizer.to_dict())
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in parts["valid"]:
        crops[i].save(pictures / f"photo-{i}.png")
    return Corpus(str(folder / "train"), str(folder / "valid"), pictures, folder / "tokenizer.json")


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """What a run wrote about each iteration. A line that comes twice or too early is an AssertionError."""
    steps: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        values = json.loads(line)
        iteration = values.pop("iteration")
        assert not steps or iteration >= max(steps), f"{path}: iteration {iteration} after {max(steps)}"
        step = steps.setdefault(iteration, {})
        assert not step.keys() & values.keys(), f"{path}: iteration {iteration} twice"
        step.update(values)
    return steps


def assert_same_course(
    run: Mapping[int, Mapping[str, float]],
    reference: Mapping[int, Mapping[str, float]],
    tolerance: float = 1e-5,
) -> None:
    """At the iterations of `run`, losses, gradient norms and learning rates are those of the reference.

    The norm of a gradient, a difference of large numbers, shows the order of fp32 sums sooner than a loss: it
    is given five times the tolerance.
    """
    names = ("loss", "grad_norm", "learning_rate", "validation_loss")
    for iteration, step in run.items():
        expected = reference[iteration]
        assert [name for name in names if name in step] == [name for name in names if name in expected]
        for name in names:
            if name in step:
                allowed = tolerance * (5 if name == "grad_norm" else 1)
                assert math.isclose(step[name], expected[name], rel_tol=allowed), (
                    f"iteration {iteration}: {name} {step[name]!r}, of the reference {expected[name]!r}"
                )
