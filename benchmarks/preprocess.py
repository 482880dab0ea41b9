"""Preprocessing against the least that any program must do: read, decode, resize and encode with Pillow.

    python benchmarks/preprocess.py                    # photographs cut from those in requirements/dev.txt
    python benchmarks/preprocess.py --input PHOTOS     # your own folder
    python benchmarks/preprocess.py --idx FILE         # small grey pictures too, such as Fashion-MNIST's

Both sides run in turn over the same files, in this process. Ours writes a whole dataset: tokens, index,
checksums, manifest. Prints a table, and as the last line one JSON object of ratios: speed of ours / speed of
the bare loop, and of two workers / one worker (starting the processes included).
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
    count: int = 300
    """Photographs to make of each size."""
    rounds: int = 5
    """How often each side runs; medians are compared."""


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
        ratios = {}
        heads = ("bare loop", "one worker", "two workers", "one/bare", "two/one")
        print(f"{'pictures/s':16}" + "".join(f"{head:>12}" for head in heads))
        for case in cases:
            bare, one, two = measure(case, folder, arguments.rounds)
            ratios[f"{case.name}: one worker / bare loop"] = round(one / bare, 3)
            ratios[f"{case.name}: two workers / one"] = round(two / one, 3)
            print(f"{case.name:16}{bare:12.0f}{one:12.0f}{two:12.0f}{one / bare:12.2f}{two / one:12.2f}")
    print(json.dumps(ratios))


def measure(case: Case, folder: Path, rounds: int) -> list[float]:
    """Pictures a second of the bare loop, of one worker and of two, medians of interleaved rounds."""
    sample = iterate_streams(case.inputs, case.codec, case.geometry, limit=200, progress=False)
    tokenizer = Tokenizer.train(list(sample), vocab_size=320, codec=case.codec.to_dict())
    pictures = open_pictures(case.inputs)
    count, times = len(pictures), ([], [], [])
    for i in tqdm(range(rounds), case.name, leave=False):
        bare = partial(bare_loop, case, count)
        ours = partial(
            build_dataset, inputs=case.inputs, codec=case.codec, tokenizer=tokenizer, geometry=case.geometry
        )
        runs = (
            bare,
            partial(ours, folder / f"{case.name} {i} one", progress=False),
            partial(ours, folder / f"{case.name} {i} two", progress=False, workers=2),
        )
        for run, spent in zip(runs, times, strict=True):
            spent.append(seconds(run))
    return [count / statistics.median(spent) for spent in times]


def bare_loop(case: Case, count: int) -> None:
    """What one would write first, without tokens and without a file."""
    size = (case.codec.image_size, case.codec.image_size)
    pictures = open_pictures(case.inputs)
    for i in range(count):
        if case.geometry == "crop":
            image = ImageOps.fit(Image.open(pictures.label(i)).convert("RGB"), size, Image.Resampling.BICUBIC)
        else:
            image = Image.new("RGB", size)
            image.paste(Image.fromarray(pictures.load(i)), (2, 2))
        image.save(
            io.BytesIO(), "JPEG", quality=25, subsampling="4:2:0", streamtype=2, restart_marker_blocks=1
        )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
