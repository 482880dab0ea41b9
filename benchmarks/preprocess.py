"""Preprocessing against the least that any program must do: read, decode, resize and encode with Pillow.

    python benchmarks/preprocess.py                    # photographs cut from those in requirements/dev.txt
    python benchmarks/preprocess.py --input PHOTOS     # your own folder
    python benchmarks/preprocess.py --idx FILE         # small grey pictures too, such as Fashion-MNIST's
    python benchmarks/preprocess.py --memory 100000    # and the memory of a worker over so many pictures
    python benchmarks/preprocess.py --scaled-error     # and what scaled decode does to the pixels

Both sides run in turn over the same files, in this process. Ours writes a whole dataset: tokens, index,
checksums, journal, manifest. The bare loop decodes whole pictures; ours does too under "whole", and lets
libjpeg decode reduced ones under "scaled". Prints a table of pictures a second (the fastest round of each),
and as the last line one JSON object of ratios: ours to the bare loop (median over rounds, each with both),
and two workers to one (median over rounds, over many times the pictures, the start of the processes
included).
"""

import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageOps
from tqdm import tqdm

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry, canonical
from megatron_codec.data import CodecDataset, write_dataset
from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import (
    PictureEncoder,
    PillowDecoder,
    Selection,
    build_dataset,
    iterate_streams,
    open_inputs,
)
from megatron_codec.preprocessing.sources import Item
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data_sources import photo_crops, real_photos


@dataclass(frozen=True)
class Arguments:
    """Measures preprocessing beside a bare Pillow loop over the same pictures."""

    input: tuple[Path, ...] = ()
    """Folders of photographs, instead of those that are made."""
    idx: Path | None = None
    """An idx array of small pictures, measured at 32x32."""
    count: int = 100
    """Photographs to make of each size."""
    rounds: int = 9
    """How often each side runs."""
    repeat: int = 10
    """How often the pictures are given to two workers and to one, so that their start counts little."""
    memory: int = 0
    """Measure the memory of a process over so many pictures of 640x480, and nothing else."""
    documents: int = 0
    """Measure how long a dataset of so many documents takes to open, and nothing else."""

    scaled_error: bool = False
    """Measure how far scaled decode and quality 25 are from pictures decoded whole, and nothing else."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    inputs: Sequence[Path]
    encoder: PictureEncoder


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            measure_memory(folder, arguments.memory)
            return
        if arguments.documents:
            measure_opening(folder, arguments.documents)
            return
        if arguments.scaled_error:
            measure_scaled_error()
            return
        heads = ("bare loop", "one worker", "one/bare", "one, longer", "two workers", "two/one")
        print(f"{'':24}" + "".join(f"{head:>12}" for head in heads))
        ratios = {}
        for case in cases(arguments, folder):
            bare, one = measure_bare_and_one(case, arguments.rounds)
            single, double = measure_one_and_two(case, max(1, arguments.rounds // 2), arguments.repeat)
            ratio = statistics.median(b / o for b, o in zip(bare, one, strict=True))
            scaling = statistics.median(s / d for s, d in zip(single, double, strict=True))
            count = len(pictures_of(case, folder))
            more = arguments.repeat * count
            rates = [count / min(bare), count / min(one), more / min(single), more / min(double)]
            print(
                f"{case.name:24}{rates[0]:12.0f}{rates[1]:12.0f}{ratio:12.2f}"
                f"{rates[2]:12.0f}{rates[3]:12.0f}{scaling:12.2f}"
            )
            ratios[f"{case.name}: one worker / bare loop"] = round(ratio, 3)
            ratios[f"{case.name}: two workers / one"] = round(scaling, 3)
    print(json.dumps(ratios))


def cases(arguments: Arguments, folder: Path) -> list[Case]:
    encoder = PictureEncoder(JpegCodec(256))
    whole = replace(encoder, decoder=PillowDecoder(scaled_decode=False))
    if arguments.input:
        inputs = {"photographs": arguments.input}
    else:
        sizes = ((640, 480), (1024, 1024), (1280, 960))
        inputs = {f"{w}x{h}": [_make(folder, w, h, arguments.count)] for w, h in sizes}
    found = [
        Case(f"{name}, {kind}", paths, each)
        for name, paths in inputs.items()
        for kind, each in (("whole", whole), ("scaled", encoder))
    ]
    if arguments.idx:
        small = PictureEncoder(JpegCodec(32, remove_head=True), Geometry("pad"))
        found.append(Case("idx array", [arguments.idx], small))
    return found


def measure_bare_and_one(case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the bare loop and of one worker, round by round."""
    return in_turn(case.name, rounds, partial(bare_loop, case), partial(build, case, trained(case), 1, 1))


def measure_one_and_two(case: Case, rounds: int, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of one worker and of two over the pictures many times, round by round."""
    tokenizer = trained(case)
    runs = [partial(build, case, tokenizer, workers, repeat) for workers in (1, 2)]
    return in_turn(case.name, rounds, *runs)


def in_turn(
    name: str, rounds: int, first: Callable[[], None], second: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of both, in alternating order, so that a busy moment of the machine hits both alike."""
    times: dict[Callable[[], None], list[float]] = {first: [], second: []}
    for i in tqdm(range(rounds), name, leave=False):
        for run in (first, second) if i % 2 == 0 else (second, first):
            start = time.perf_counter()
            run()
            times[run].append(time.perf_counter() - start)
    return times[first], times[second]


def trained(case: Case) -> Tokenizer:
    sample = iterate_streams(case.inputs, case.encoder, limit=200, progress=False)
    return Tokenizer.train(list(sample), vocab_size=320, codec=case.encoder.codec.to_dict())


def build(case: Case, tokenizer: Tokenizer, workers: int, repeat: int) -> None:
    """Ours: the whole dataset."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = [*case.inputs] * repeat
        prefix = Path(folder, "dataset")
        build_dataset(prefix, inputs, case.encoder, tokenizer, workers=workers, progress=False)


def pictures_of(case: Case, folder: Path) -> list[str | np.ndarray]:
    """Paths of the files, or arrays."""
    source = open_inputs(Selection(tuple(case.inputs)), case.encoder.suffixes, folder / "names")
    if case.encoder.geometry.method == "pad":
        return [np.asarray(item.read()) for item in source]
    return [item.label for item in source]


def bare_loop(case: Case) -> None:
    """What one would write first, without tokens and without a file."""
    size = (case.encoder.codec.image_size, case.encoder.codec.image_size)
    with tempfile.TemporaryDirectory() as folder:
        for picture in pictures_of(case, Path(folder)):
            if isinstance(picture, str):
                image = ImageOps.fit(Image.open(picture).convert("RGB"), size, Image.Resampling.BICUBIC)
            else:
                image = Image.new("RGB", size)
                image.paste(Image.fromarray(picture), (2, 2))
            options = {"quality": 25, "subsampling": "4:2:0", "streamtype": 2, "restart_marker_blocks": 1}
            image.save(io.BytesIO(), "JPEG", **options)


def measure_memory(folder: Path, count: int) -> None:
    """The most memory that this process holds, which is the only worker, at first and at the end."""
    photos = sorted(_make(folder, 640, 480, 100).iterdir())
    (folder / "many").mkdir()
    for i in range(count):
        os.link(photos[i % 100], folder / "many" / f"{i:08d}.jpg")
    encoder = PictureEncoder(JpegCodec(256))
    sample = list(iterate_streams([folder / "640x480"], encoder, progress=False))
    tokenizer = Tokenizer.train(sample, vocab_size=320, codec=encoder.codec.to_dict())
    held = {}
    for name, limit in (("1,000", 1000), (f"{count:,}", None)):
        build_dataset(folder / name, [folder / "many"], encoder, tokenizer, limit=limit)
        held[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name} pictures: {held[name]:.0f} MiB at most")
    print(json.dumps({f"MiB over {name} pictures": round(value) for name, value in held.items()}))


def measure_opening(folder: Path, count: int) -> None:
    """Seconds until the last document is at hand, and the memory it takes."""
    document = np.arange(8, dtype=np.uint16)
    tokenizer = Tokenizer.train([b"aaaa"], 257).to_dict()
    write_dataset(folder / "d", (document for _ in range(count)), {"name": "jpeg", "settings": {}}, tokenizer)
    before, start = _resident(), time.perf_counter()
    dataset = CodecDataset.open(folder / "d")
    assert len(dataset.document(count - 1)) == 8
    seconds, held = time.perf_counter() - start, _resident() - before
    print(json.dumps({"documents": count, "seconds to open": round(seconds, 4), "MiB": round(held, 1)}))


def measure_scaled_error() -> None:
    """PSNR at 256x256 of the photographs that are large enough to be reduced, in decibels."""
    codec, found = JpegCodec(256), []
    for path in real_photos():
        file = io.BytesIO()
        Image.open(path).convert("RGB").save(file, "JPEG", quality=90)
        pictures = []
        for decoder in (PillowDecoder(), PillowDecoder(scaled_decode=False)):
            item = Item(path.name, str(path), 0, file.getvalue)
            ((_, picture),) = decoder.decode([item], lambda *size: Geometry().pixels_needed(*size, 256))
            pictures.append((picture.size, canonical(picture, 256)))
        (reduced, scaled), (whole, picture) = pictures
        if reduced != whole:
            coded = codec.decode(codec.encode(picture))
            found.append((psnr(scaled, picture), psnr(coded, picture)))
            print(f"{path.name}: {whole[0]}x{whole[1]}, decoded as {reduced[0]}x{reduced[1]}")
    scaled, coded = np.mean(found, axis=0).round(1).tolist()
    print(json.dumps({"photographs": len(found), "dB, scaled decode": scaled, "dB, quality 25": coded}))


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in decibels."""
    error = np.asarray(one).astype(float) - np.asarray(other)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def _resident() -> float:
    """MiB of memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _make(folder: Path, width: int, height: int, count: int) -> Path:
    """A folder of JPEG files cut from real photographs."""
    target = folder / f"{width}x{height}"
    target.mkdir()
    border = (width - height) // 2
    for i, crop in enumerate(photo_crops(count, width)):
        crop.crop((0, border, width, height + border)).save(target / f"{i:04d}.jpg", quality=90)
    return target


if __name__ == "__main__":
    run_tool(main)
