"""Byte-pair encoding beside tiktoken, Hugging Face `tokenizers`, SentencePiece and a byte histogram.

    python benchmarks/bpe.py                           # streams of photographs from requirements/dev.txt
    python benchmarks/bpe.py --input PHOTOS            # of your own pictures
    python benchmarks/bpe.py --clips CLIPS/*.h264      # and raw H.264 streams, a file each

One thread unless a row says otherwise. All rows of a table run in turn, round by round, and the fastest round
of each counts; the median for threads, whose fastest rounds are luck. Peers get their input in the form they
want it before the clock starts. Ids and merges are compared as well. Prints tables of MB/s, and as the last
line one JSON object of ratios, ours to the peer's.
"""

import hashlib
import io
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import sentencepiece
import tiktoken
import tyro
from PIL import Image
from tokenizers import Tokenizer as HuggingFace
from tokenizers.models import BPE
from tqdm import trange

from megatron_codec import _csrc
from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.exchange import CHARACTERS, to_text

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.bpe_oracles import hugging_face, merges_of
from tests.data_sources import real_photos


@dataclass(frozen=True)
class Arguments:
    """Measures encoding and training beside other libraries."""

    input: tuple[Path, ...] = ()
    """Folders of photographs, instead of random windows of those in requirements/dev.txt."""
    clips: tuple[Path, ...] = ()
    """Raw H.264 streams, a file each, to be encoded with 1024 entries."""
    streams: int = 10000
    """Streams to train on; the encoders run over 500 others."""
    streams_hugging_face: int = 2000
    """Streams to train on beside Hugging Face, which takes a time quadratic in the length of a stream."""
    rounds: int = 7
    """How often each row runs."""
    keep: Path | None = None
    """A folder for the tokenizers trained on the pictures, to be looked at with tools/show_tokenizer.py."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    count = arguments.streams + 500
    if arguments.input:
        streams = list(iterate_streams(arguments.input, JpegCodec(), limit=count))
    else:
        streams = photo_streams(count)
    training, held_out = streams[:-500], streams[-500:]
    ratios: dict[str, float] = {}
    before = peak_memory()
    Tokenizer.train(training, 1024)
    ratios["training: memory / corpus"] = (peak_memory() - before) / sum(map(len, training))
    for vocab_size in (320, 1024):
        tokenizer = Tokenizer.train(training, vocab_size, JpegCodec().to_dict())
        if arguments.keep:
            tokenizer.save(arguments.keep / f"jpeg-{vocab_size}.json")
        measure_encoding(f"JPEG {vocab_size}", tokenizer, held_out, arguments.rounds, ratios)
    if arguments.clips:
        clips = [path.read_bytes() for path in arguments.clips]
        tokenizer = Tokenizer.train(clips[::2], 1024)
        measure_encoding("AVC 1024", tokenizer, clips[1::2][:100], arguments.rounds, ratios)
    for merges in (8, 16):
        measure_run(merges, arguments.rounds, ratios)
    measure_training(training, arguments.streams_hugging_face, ratios)
    print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}))


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def photo_streams(count: int) -> list[bytes]:
    """Streams of random windows of real photographs, 256x256 at quality 25."""
    rng, codec = random.Random(0), JpegCodec()
    photos = [Image.open(path).convert("RGB") for path in real_photos()]
    streams = []
    for i in trange(count, desc="streams", leave=False):
        photo = photos[i % len(photos)]
        side = rng.randint(256, min(photo.size))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        box = (left, top, left + side, top + side)
        window = photo.resize((256, 256), Image.Resampling.BICUBIC, box=box)
        streams.append(codec.encode(np.asarray(window)[:, :: rng.choice([1, -1])]))
    return streams


def in_turn(
    rows: dict[str, Callable[[], object]], rounds: int, choose: Callable[[list[float]], float] = min
) -> dict[str, float]:
    """Seconds of the fastest round of each row, or of the one that `choose` picks."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in trange(rounds, leave=False):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: choose(taken) for name, taken in seconds.items()}


def show(title: str, size: int, seconds: dict[str, float]) -> None:
    print(f"{title}: {size / 1e6:.1f} MB")
    for name, value in seconds.items():
        print(f"    {name:32}{size / 1e6 / value:10.1f} MB/s")


def tiktoken_of(tokenizer: Tokenizer) -> Callable[[bytes], list[int]]:
    ranks = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    encoding = tiktoken.Encoding("codec", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    return encoding._core_bpe.encode_single_piece


def hugging_face_of(tokenizer: Tokenizer) -> HuggingFace:
    names = [to_text(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
    merges = [(names[left], names[right]) for left, right in tokenizer.merges]

    return HuggingFace(BPE({name: id for id, name in enumerate(names)}, merges))


def measure_encoding(
    title: str, tokenizer: Tokenizer, streams: list[bytes], rounds: int, ratios: dict[str, float]
) -> None:
    size = sum(map(len, streams))
    out = np.zeros(size, np.uint16)
    joined = b"".join(streams)
    texts = [to_text(stream) for stream in streams]
    theirs, tiktoken_encode = hugging_face_of(tokenizer), tiktoken_of(tokenizer)
    pieces = sentencepiece_model(streams, tokenizer.vocab_size)
    for stream, text in zip(streams[:50], texts, strict=False):
        ids = tokenizer.encode_to_list(stream)
        assert ids == tiktoken_encode(stream) == theirs.encode(text).ids

    rows = {
        "byte histogram": lambda: _csrc.byte_histogram(joined),
        "ours, a batch into uint16": lambda: tokenizer.encode_batch(streams, out=out),
        "ours, an array a stream": lambda: [tokenizer.encode(stream) for stream in streams],
        "ours, a list a stream": lambda: [tokenizer.encode_to_list(stream) for stream in streams],
        "tiktoken, a list a stream": lambda: [tiktoken_encode(stream) for stream in streams],
        "sentencepiece, a list a stream": lambda: [pieces.encode(text) for text in texts],
        "Hugging Face, batch_fast": lambda: theirs.encode_batch_fast(texts),
        "Hugging Face, batch": lambda: theirs.encode_batch(texts),
    }
    seconds = in_turn(rows, rounds)
    show(f"Encoding, {title}", size, seconds)
    batch = seconds["ours, a batch into uint16"]
    ratios[f"{title}: batch / tiktoken"] = seconds["tiktoken, a list a stream"] / batch
    ratios[f"{title}: batch / Hugging Face"] = seconds["Hugging Face, batch"] / batch
    ratios[f"{title}: batch / Hugging Face batch_fast"] = seconds["Hugging Face, batch_fast"] / batch
    ratios[f"{title}: batch / sentencepiece"] = seconds["sentencepiece, a list a stream"] / batch
    ratios[f"{title}: byte histogram / batch"] = batch / seconds["byte histogram"]
    ratios[f"{title}: list / tiktoken"] = (
        seconds["tiktoken, a list a stream"] / seconds["ours, a list a stream"]
    )
    measure_threads(title, tokenizer, streams * 8, rounds * 3, ratios)


def measure_threads(
    title: str, tokenizer: Tokenizer, streams: list[bytes], rounds: int, ratios: dict[str, float]
) -> None:
    """Two threads beside one, and beside what the machine gives to two threads with nothing in common."""
    size = sum(map(len, streams))
    out, joined = np.zeros(size, np.uint16), b"".join(streams)
    halves = joined[: size // 2], joined[size // 2 :]
    apart = [
        (part, np.zeros(size, np.uint16))
        for part in (streams[: len(streams) // 2], streams[len(streams) // 2 :])
    ]
    with ThreadPoolExecutor(2) as pool:
        rows = {
            "ours, one thread": lambda: tokenizer.encode_batch(streams, out=out),
            "ours, two threads": lambda: tokenizer.encode_batch(streams, out=out, threads=2),
            "ours, two calls at once": lambda: list(
                pool.map(lambda half: tokenizer.encode_batch(half[0], out=half[1]), apart)
            ),
            "SHA-256, one thread": lambda: hashlib.sha256(joined),
            "SHA-256, two threads": lambda: list(pool.map(hashlib.sha256, halves)),
        }
        seconds = in_turn(rows, rounds, statistics.median)
    show(f"Threads, {title}, medians", size, seconds)
    ratios[f"{title}: two threads / one"] = seconds["ours, one thread"] / seconds["ours, two threads"]
    ratios[f"{title}: two calls at once / one thread"] = (
        seconds["ours, one thread"] / seconds["ours, two calls at once"]
    )
    ratios[f"{title}: two threads / one of SHA-256"] = (
        seconds["SHA-256, one thread"] / seconds["SHA-256, two threads"]
    )


def measure_run(merges: int, rounds: int, ratios: dict[str, float]) -> None:
    """One byte again and again, under merges that double."""
    tokenizer = Tokenizer([(0, 0)] + [(256 + i, 256 + i) for i in range(merges - 1)])
    tiktoken_encode = tiktoken_of(tokenizer)
    long, short = bytes(1_000_000), bytes(100_000)
    assert tokenizer.encode_to_list(long) == tiktoken_encode(long)
    rows = {
        "ours": lambda: tokenizer.encode(long),
        "ours, a tenth of it": lambda: tokenizer.encode(short),
        "tiktoken": lambda: tiktoken_encode(long),
    }
    seconds = in_turn(rows, rounds)
    tenth = seconds.pop("ours, a tenth of it")
    show(f"A run of one byte, {merges} doubling merges", len(long), seconds)
    ratios[f"run, {merges} merges: ours / tiktoken"] = seconds["tiktoken"] / seconds["ours"]
    ratios[f"run, {merges} merges: time of 1 MB / of 0.1 MB"] = seconds["ours"] / tenth


def sentencepiece_model(streams: list[bytes], vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(to_text, streams),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size + 3,  # <unk>, <s>, </s>
        character_coverage=1.0,
        required_chars="".join(CHARACTERS),
        add_dummy_prefix=False,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def measure_training(streams: list[bytes], few: int, ratios: dict[str, float]) -> None:
    size = sum(map(len, streams))
    seconds = in_turn(
        {
            "ours": lambda: Tokenizer.train(streams, 320),
            "sentencepiece": lambda: sentencepiece_model(streams, 320),
        },
        rounds=2,
    )
    show(f"Training 320 entries on {len(streams)} streams", size, seconds)
    ratios[f"training on {len(streams)}: ours / sentencepiece"] = seconds["sentencepiece"] / seconds["ours"]

    fewer = streams[:few]
    assert Tokenizer.train(fewer, 320).merges == merges_of(hugging_face(fewer, 320))
    seconds = in_turn(
        {"ours": lambda: Tokenizer.train(fewer, 320), "Hugging Face": lambda: hugging_face(fewer, 320)},
        rounds=2,
    )
    show(f"Training 320 entries on {few} streams", sum(map(len, fewer)), seconds)
    ratios[f"training on {few}: ours / Hugging Face"] = seconds["Hugging Face"] / seconds["ours"]


if __name__ == "__main__":
    run_tool(main)
