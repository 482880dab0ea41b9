"""What the grammar of JPEG scans costs: a row of the mask, its tables, its first use, beside a decode step.

    python benchmarks/grammar.py                     # times a decode step of 85M parameters as well
    python benchmarks/grammar.py --step-ms 60        # or takes its milliseconds

Rows are timed in batches, along samples from random logits and along real pictures; the fastest round counts.
A tight budget is one in which every token has to be asked whether the rest still fits: at most as many tokens
more than the shortest end takes as a byte can add to it. Prints the figures beside their marks, and as the
last line one JSON object of figure / mark: 1 or less holds it.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from megatron_codec._csrc import JpegGrammar
from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import run_tool
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data_sources import photo_crops

MEMORY = 64 << 20  # of rows, as the mark has it
MARKS = {"row": 10.0, "step": 0.05, "memory": 64.0, "first use": 1.0}  # us, share, MiB, s
STEP_TOKENS = 24


@dataclass(frozen=True)
class Arguments:
    """Times the grammar's mask."""

    image_size: int = 256
    """Side of the pictures."""
    vocabularies: tuple[int, ...] = (320, 1024)
    """Sizes of the tokenizers, trained on windows of the photographs in requirements/dev.txt."""
    batch: int = 32
    """Rows at a time."""
    rounds: int = 5
    """Of everything; the fastest counts."""
    tokens: int = 1500
    """Of each row in a round."""
    step_ms: float | None = None
    """Milliseconds of a decode step of an 85M model at this batch on one core; measured if not given."""


class Rows:
    """A batch of streams in which tokens are drawn at random, or are those of real pictures.

    Args:
        real: ids of pictures; with them the rows go along these.
        tight: with the smallest budget.
    """

    def __init__(self, grammar: JpegGrammar, vocabulary: int, batch: int, real: list[list[int]], tight: bool):
        self.grammar, self.vocabulary, self.real, self.tight = grammar, vocabulary, real, tight
        self.rows = np.zeros((batch, vocabulary), np.uint8)

    def seconds(self, tokens: int, seed: int) -> float:
        """Processor time of a row, over so many tokens of each stream; a stream that ends begins again."""
        rng, batch = np.random.default_rng(seed), len(self.rows)
        cursors, left, done, spent = [None] * batch, [-1] * batch, [0] * batch, 0.0
        for _ in range(tokens):
            for i, at in enumerate(cursors):
                if at is None or self.grammar.done(at):
                    cursors[i], done[i] = self.grammar.begin(), 0
                    left[i] = self.grammar.finish(cursors[i]) + int(rng.integers(4)) if self.tight else -1
            started = time.thread_time()
            self.grammar.allow(cursors, left, self.rows.ctypes.data, self.vocabulary)
            spent += time.thread_time() - started
            drawn = (rng.random(self.rows.shape, np.float32) * self.rows).argmax(1).tolist()
            for i, at in enumerate(cursors):
                token = self.real[(i + seed) % len(self.real)][done[i]] if self.real else drawn[i]
                assert self.grammar.read(at, token)
                done[i] += 1
                left[i] -= left[i] > 0
        return spent / tokens / batch


def measure(config: Arguments) -> dict[str, float]:
    """Prints the figures; returns them as shares of their marks."""
    codec = JpegCodec(config.image_size, remove_head=True)
    streams = [codec.encode(crop) for crop in photo_crops(200, config.image_size)]
    shares: dict[str, float] = {}

    def show(name: str, value: float, unit: str, mark: str) -> None:
        shares[name] = round(value / MARKS[mark], 3)
        print(f"| {name} | {value:.3g} {unit} | {MARKS[mark]:g} |", flush=True)

    step = config.step_ms / 1e3 if config.step_ms else decode_step(config)
    print(f"\na decode step at batch {config.batch}: {step * 1e3:.1f} ms on one core")
    print("| what | figure | at most |\n|---|---|---|")
    for vocabulary in config.vocabularies:
        tokenizer = Tokenizer.train(streams, vocabulary)
        table = [tokenizer.token_bytes(i) for i in range(vocabulary)]
        real = [tokenizer.encode_to_list(stream) for stream in streams[:: max(1, len(streams) // 64)]]
        first = min(first_use(config.image_size, table) for _ in range(config.rounds))
        show(f"{vocabulary}: first use", first, "s", "first use")
        plain = JpegGrammar(codec.format.scan(), b"", table, MEMORY)
        ranged = JpegGrammar(codec.format.scan(in_range=True), b"", table, MEMORY)
        loads = {
            "random logits": Rows(plain, vocabulary, config.batch, [], False),
            "real pictures": Rows(plain, vocabulary, config.batch, real, False),
            "tight budget": Rows(plain, vocabulary, config.batch, [], True),
            "in range": Rows(ranged, vocabulary, config.batch, [], False),
            "in range, tight budget": Rows(ranged, vocabulary, config.batch, [], True),
        }
        for name, rows in loads.items():
            title = f"{vocabulary}: {name}"
            rounds = tqdm(range(config.rounds), title, leave=False)
            seconds = min(rows.seconds(config.tokens, seed) for seed in rounds)
            show(f"{title}, a row", seconds * 1e6, "us", "row")
            if name in ("random logits", "in range, tight budget"):
                show(f"{title}, share of a step", seconds * config.batch / step, "", "step")
        show(f"{vocabulary}: tables after these", plain.memory / 2**20, "MiB", "memory")
    return shares


def first_use(image_size: int, table: list[bytes]) -> float:
    """Seconds from a codec's settings to the first row, file headers read anew."""
    codec = JpegCodec(image_size)
    started = time.perf_counter()
    grammar = JpegGrammar(codec.format.scan(), codec.preamble, table, MEMORY)
    at, row = grammar.begin(), np.zeros(len(table), np.uint8)
    grammar.read_bytes(at, codec.head)
    grammar.allow([at], [-1], row.ctypes.data, len(table))
    assert row.any()
    return time.perf_counter() - started


def decode_step(config: Arguments) -> float:
    """Seconds of a step of the model of benchmarks/generate.py, one token of each of a batch, on one core."""
    import torch
    from generate import Load, Ours

    torch.set_num_threads(1)
    ours = Ours()
    prompt = [ours.tokenizer.bos, 1, 2, 3]

    def run(tokens: int, seed: int) -> float:
        started = time.perf_counter()
        ours.run(Load("", [prompt], [tokens], n=config.batch), seed)
        return time.perf_counter() - started

    run(2, 0)
    # The difference of two lengths leaves the prompt out.
    short = min(run(1, seed) for seed in range(config.rounds))
    return (min(run(STEP_TOKENS + 1, seed) for seed in range(config.rounds)) - short) / STEP_TOKENS


def main() -> None:
    print(json.dumps(measure(tyro.cli(Arguments, description=__doc__))))


if __name__ == "__main__":
    run_tool(main)
