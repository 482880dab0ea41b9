"""How often the tokens of a prompt are not those of the whole stream, and what it costs to take it as it is.

    python benchmarks/prompt_ends.py --data runs/avclm-tiny/data/test --load runs/avclm-tiny/checkpoint

Every document of a dataset is cut after each of its frames or patches, at most --cuts of them. A prompt is
changed by the cut where its ids by itself are no beginning of the document's ids. With a checkpoint it also
prints the nats of what really follows, to the first common border of tokens at least --bytes bytes behind
the cut: after the prompt as it is; healed, as the engine draws; and by all encodings that begin with the
prompt's bytes, weighed with all of their tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from megatron_codec.codecs import AvcCodec, JpegCodec, get_codec
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError, run_tool
from megatron_codec.inference import Engine, Sampling
from megatron_codec.inference.healing import heal
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.open_end import open_end


@dataclass(frozen=True)
class Arguments:
    """Counts prompts that the cut changes, and scores what follows them."""

    data: tuple[Path, ...]
    """Prefixes of datasets."""
    load: Path | None = None
    """A checkpoint that was trained with the tokenizer of the data."""
    documents: int = 60
    """At most so many, evenly spread."""
    cuts: int = 16
    """At most so many of each, evenly spread; the first is before everything, the last before the end."""
    bytes: int = 100
    """How far behind a cut what follows is scored, at least."""


class Scores:
    """Log-probabilities by the model of an engine.

    Args:
        engine: is used by nobody else.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._next: dict[tuple[int, ...], dict[int, float]] = {}

    def next(self, ids: tuple[int, ...]) -> dict[int, float]:
        """Of every token behind these."""
        if ids not in self._next:
            events, tokens = [], self.engine.tokenizer.num_tokens
            sampling = Sampling(max_tokens=1, logprobs=tokens, constrain=False)
            self.engine.add(self.engine.request(ids, sampling, events.extend))
            while self.engine.busy:
                self.engine.step()
            self._next[ids] = events[0].top_logprobs[0]
        return self._next[ids]

    def total(self, ids: tuple[int, ...], start: int) -> float:
        """Of the tokens from place `start` on, together."""
        settings = Sampling(max_tokens=0, prompt_logprobs=True, constrain=False)
        [scored] = self.engine.generate([ids], settings)
        return sum(scored.prompt_logprobs[start - 1 :])


def borders(tokenizer: Tokenizer, ids: list[int]) -> np.ndarray:
    """Where tokens end, in bytes."""
    return np.cumsum([len(tokenizer.token_bytes(id)) for id in ids])


def nats(scores: Scores, stream: bytes, cut: int, least: int) -> tuple[float, float, float] | None:
    """Of what follows a cut: as it is, healed, by all encodings. None if it is too near to the end."""
    tokenizer = scores.engine.tokenizer
    bos, alone = tokenizer.bos, tokenizer.encode(stream[:cut]).tolist()
    whole, rest = tokenizer.encode(stream).tolist(), tokenizer.encode_later_part(stream[cut:]).tolist()
    ends, rest_ends = borders(tokenizer, whole), cut + borders(tokenizer, rest)
    common = np.intersect1d(ends, rest_ends)
    common = common[common >= cut + least]
    if not len(common):
        return None
    true = (bos, *whole[: np.searchsorted(ends, common[0]) + 1])
    plain = (bos, *alone, *rest[: np.searchsorted(rest_ends, common[0]) + 1])
    if max(len(true), len(plain)) >= scores.engine.config.seq_length:
        return None
    as_it_is = scores.total(plain, 1 + len(alone))
    healing = heal((bos, *alone), tokenizer, None, None, 1 << 30)
    if healing is None:
        return (-as_it_is,) * 3
    place = start = len(healing.certain)
    refused = 0.0
    while (choice := healing.choice(true[start:place])) is not None:
        row = scores.next(true[:place])
        refused += log_sum([row[id] for id in choice.agreeing])
        place += 1
    of_ways = []
    for way in open_end(tokenizer, stream[:cut]).ways:
        ids = (*healing.certain, *way.within)
        known = sum(scores.next(ids[:i])[ids[i]] for i in range(start, len(ids)))
        beyond = [scores.next(ids)[id] for id in way.beyond]
        of_ways.append(known + (log_sum(beyond) if beyond else 0))
    true_total = scores.total(true, start)
    return -as_it_is, refused - true_total, log_sum(of_ways) - true_total


def log_sum(values: list[float]) -> float:
    """The logarithm of a sum of exponentials."""
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def show(prefix: Path, arguments: Arguments, engine: Engine | None) -> None:
    """Prints what was found in one dataset."""
    dataset = CodecDataset.open(prefix)
    tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
    codec = get_codec(dataset.manifest.codec["name"], dataset.manifest.codec["settings"])
    if not isinstance(codec, AvcCodec | JpegCodec):
        raise UserError(f"--data {prefix}", f"is of the codec {codec.name}", "give pictures or clips")
    if engine is not None and engine.tokenizer.hash != tokenizer.hash:
        raise UserError(f"--data {prefix}", "has another tokenizer than --load", "give data of the model")
    scores = engine and Scores(engine)
    parts = codec.frames if isinstance(codec, AvcCodec) else codec.num_patches
    chosen = np.unique(np.linspace(0, parts - 1, min(parts, arguments.cuts)).astype(int)).tolist()
    count = min(dataset.num_documents, arguments.documents)
    tokens, scored = [], []
    for number in range(count):
        ids = dataset.document(number * dataset.num_documents // count)
        stream = tokenizer.decode(ids)
        whole = tokenizer.encode(stream).tolist()
        for cut in sorted({len(codec.prompt(stream, part / parts)) for part in chosen} - {0}):
            alone = tokenizer.encode(stream[:cut]).tolist()
            alike = next((i for i, id in enumerate(alone) if id != whole[i]), len(alone))
            tokens.append(len(alone) - alike)
            found = scores and nats(scores, stream, cut, arguments.bytes)
            if found:
                scored.append((tokens[-1] > 0, *found))
    changed = np.count_nonzero(tokens)
    mean = sum(tokens) / max(1, changed)
    print(
        f"{prefix}: {len(tokens)} prompts of {count} documents, {changed / len(tokens):.1%} of them changed, "
        f"in {mean:.1f} tokens on average and {max(tokens)} at most"
    )
    for name, rows in (("all", scored), ("changed", [row for row in scored if row[0]])):
        if rows:
            values = np.mean([row[1:] for row in rows], axis=0)
            print(
                f"  nats of what follows, {name} ({len(rows)}): as it is {values[0]:.1f}, healed "
                f"{values[1]:.1f}, by all encodings {values[2]:.1f}"
            )


def main() -> None:
    """Prints a few lines a dataset."""
    arguments = tyro.cli(Arguments, description=__doc__)
    engine = None if arguments.load is None else Engine.load(arguments.load)
    for prefix in arguments.data:
        show(prefix, arguments, engine)


if __name__ == "__main__":
    run_tool(main)
