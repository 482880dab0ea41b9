"""Preprocessing against the least that any program must do: read, decode, resize and encode with Pillow.

    python benchmarks/preprocess.py                    # photographs cut from those in requirements/dev.txt
    python benchmarks/preprocess.py --input PHOTOS     # your own folder
    python benchmarks/preprocess.py --idx FILE         # small grey pictures too, such as Fashion-MNIST's

Both sides run in turn over the same files, in this process. Ours writes a whole dataset: tokens, index,
checksums, manifest. Prints a table of pictures a second (the fastest round of each), and as the last line
one JSON object of ratios: ours to the bare loop (median over rounds, each with both), and two workers to one
(fastest rounds, over five times the pictures, the start of the processes included).
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from PIL import Image, ImageOps
from tqdm import tqdm

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import build_dataset, iterate_streams, open_pictures
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data_sources import photo_crops


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


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    inputs: Sequence[Path]
    codec: JpegCodec
    geometry: Geometry


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.input:
            cases = [Case("photographs", arguments.input, JpegCodec(256), "crop")]
        else:
            made = {
                f"{w}x{h} JPEG": _make(folder, w, h, arguments.count) for w, h in ((640, 480), (1280, 960))
            }
            cases = [Case(name, [path], JpegCodec(256), "crop") for name, path in made.items()]
        if arguments.idx:
            cases.append(Case("idx array", [arguments.idx], JpegCodec(32, remove_head=True), "pad"))
        heads = ("bare loop", "one worker", "one/bare", "one of 5x", "two of 5x", "two/one")
        print(f"{'':16}" + "".join(f"{head:>12}" for head in heads))
        ratios = {}
        for case in cases:
            bare, one = measure_bare_and_one(case, arguments.rounds)
            single, double = measure_one_and_two(case, max(1, arguments.rounds // 4))
            ratio = statistics.median(b / o for b, o in zip(bare, one, strict=True))
            scaling = min(single) / min(double)
            count = len(open_pictures(case.inputs))
            rates = [count / min(bare), count / min(one), 5 * count / min(single), 5 * count / min(double)]
            print(
                f"{case.name:16}{rates[0]:12.0f}{rates[1]:12.0f}{ratio:12.2f}"
                f"{rates[2]:12.0f}{rates[3]:12.0f}{scaling:12.2f}"
            )
            ratios[f"{case.name}: one worker / bare loop"] = round(ratio, 3)
            ratios[f"{case.name}: two workers / one"] = round(scaling, 3)
    print(json.dumps(ratios))


def measure_bare_and_one(case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the bare loop and of one worker, round by round."""
    return in_turn(case.name, rounds, partial(bare_loop, case), partial(build, case, trained(case), 1, 1))


def measure_one_and_two(case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of one worker and of two over five times the pictures, round by round."""
    tokenizer = trained(case)
    return in_turn(case.name, rounds, *(partial(build, case, tokenizer, workers, 5) for workers in (1, 2)))


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
    sample = iterate_streams(case.inputs, case.codec, case.geometry, limit=200, progress=False)
    return Tokenizer.train(list(sample), vocab_size=320, codec=case.codec.to_dict())


def build(case: Case, tokenizer: Tokenizer, workers: int, repeat: int) -> None:
    """Ours: the whole dataset."""
    with tempfile.TemporaryDirectory() as folder:
        build_dataset(
            Path(folder, "dataset"),
            [*case.inputs] * repeat,
            case.codec,
            tokenizer,
            geometry=case.geometry,
            workers=workers,
            progress=False,
        )


def bare_loop(case: Case) -> None:
    """What one would write first, without tokens and without a file."""
    size = (case.codec.image_size, case.codec.image_size)
    pictures = open_pictures(case.inputs)
    for i in range(len(pictures)):
        if case.geometry == "crop":
            image = ImageOps.fit(Image.open(pictures.label(i)).convert("RGB"), size, Image.Resampling.BICUBIC)
        else:
            image = Image.new("RGB", size)
            image.paste(Image.fromarray(pictures.load(i)), (2, 2))
        image.save(
            io.BytesIO(), "JPEG", quality=25, subsampling="4:2:0", streamtype=2, restart_marker_blocks=1
        )


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
