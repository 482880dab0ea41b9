"""What the grammar of clips costs: processor time of a row of the mask, along real clips and random samples.

    OPENCV_DOC=opencv python benchmarks/avc_grammar.py

Real clips come from the videos that the tests use; the tokenizers are trained on the same clips.
"""

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from megatron_codec.codecs import AvcCodec
from megatron_codec.codecs.avc_grammar import AvcGrammar
from megatron_codec.errors import run_tool
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data_sources import DEBIAN_VIDEOS, VIDEOS, debian_video, real_video


@dataclass(frozen=True)
class Arguments:
    """Times the grammar's mask."""

    vocabularies: tuple[int, ...] = (320, 1024)
    """Sizes of the tokenizers."""
    spare: float = 1.25
    """The budget of random samples, as a multiple of the fewest tokens there can be."""


def clips(codec: AvcCodec) -> list[bytes]:
    """The first clip of every video that is here."""
    sources = [real_video(name) for name in VIDEOS]
    sources += [io.BytesIO(content) for name in DEBIAN_VIDEOS if (content := debian_video(name))]
    return [codec.encode(source, pad_short=True) for source in sources]


def microseconds(grammar: AvcGrammar, budget: int, ids: list[int] | None, rng: np.random.Generator) -> float:
    """Of a row, along these tokens or random ones."""
    cursor, row, spent, count = grammar.begin(b""), np.zeros((1, len(grammar.tokens)), np.uint8), 0.0, 0
    while not (grammar.done(cursor) and (budget == 0 or count == len(ids or ()))):
        start = time.process_time()
        grammar.allow([cursor], [budget], row)
        spent += time.process_time() - start
        token = ids[count] if ids else int(rng.choice(np.flatnonzero(row[0])))
        if not (row[0, token] and grammar.read(cursor, token)):
            raise RuntimeError(f"token {count} of a real clip is masked")
        budget -= len(grammar.tokens[token]) if ids else 1
        count += 1
    return 1e6 * spent / count


def main() -> None:
    """Prints a line a vocabulary."""
    arguments = tyro.cli(Arguments, description=__doc__)
    codec, rng = AvcCodec(), np.random.default_rng(0)
    real = clips(codec)
    for size in arguments.vocabularies:
        tokenizer = Tokenizer.train(real, size, codec=codec.to_dict())
        tokens = [tokenizer.token_bytes(id) for id in range(size)]
        grammar = AvcGrammar(codec.layout, tokens)
        start = time.process_time()
        least = grammar.finish(grammar.begin(b""))
        first = time.process_time() - start
        found = [
            microseconds(grammar, len(clip), [int(i) for i in tokenizer.encode(clip)], rng) for clip in real
        ]
        sampled = microseconds(AvcGrammar(codec.layout, tokens), int(least * arguments.spare), None, rng)
        print(
            f"vocabulary {size}: {found[0]:.0f} us a row along the first real clip, {np.mean(found[1:]):.0f} "
            f"along {len(found) - 1} more, {sampled:.0f} along a random sample; first use {first:.2f} s; "
            f"the shortest clip has {least} bytes"
        )


if __name__ == "__main__":
    run_tool(main)
