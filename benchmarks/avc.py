"""The AVC codec and preprocessing against ffmpeg's command line with the paper's flags.

    python benchmarks/avc.py                       # videos of requirements/dev.txt, and of opencv-doc if here
    python benchmarks/avc.py --tokens              # bytes and tokens a clip instead, head kept and removed
    python benchmarks/avc.py --memory 200          # memory of a worker over so many 4K videos instead

Sides run in turn on the same clips, ten of a kind at a time for decoding, and what is compared is processor
time, user and system, which other programs on the machine disturb little. The start of ffmpeg's process is
measured by `ffmpeg -version` and taken off; both sides read with one thread. Prints a table of milliseconds a
clip (medians over rounds), and as the last line one JSON object of the ratios (medians over rounds, each with
both sides). Two workers and one are compared by the clock, the start of their processes included.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from megatron_codec.codecs import AvcCodec
from megatron_codec.errors import UserError, run_tool
from megatron_codec.preprocessing import VideoEncoder, build_dataset
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.data_sources import DEBIAN_VIDEOS, VIDEOS, debian_video, real_video
from tests.videos import PAPER, moving, write_video

CODEC = AvcCodec()
REPEAT = 10  # clips that are decoded in a row
HELD_OUT = ("bikes", "cup", "box")  # for tokens; the other videos train


@dataclass(frozen=True)
class Arguments:
    """Measures the AVC codec beside ffmpeg's command line."""

    rounds: int = 9
    """How often each side runs."""
    copies: int = 60
    """Copies of the videos for two workers and one."""
    tokens: bool = False
    """Measure bytes and tokens a clip, and nothing else."""
    memory: int = 0
    """Measure the memory of a process over so many 4K videos, and nothing else."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tokens:
            measure_tokens(folder)
        elif arguments.memory:
            measure_memory(folder, arguments.memory)
        else:
            measure_speed(arguments, folder)


def videos(folder: Path) -> list[Path]:
    """Real videos that hold a clip, and two that are a second short."""
    found = []
    for name in (*VIDEOS, *DEBIAN_VIDEOS):
        content = real_video(name).read_bytes() if name in VIDEOS else debian_video(name)
        if content is not None and name != "Megamind_bugy.avi":
            (folder / name).write_bytes(content)
            found.append(folder / name)
    return found


def measure_speed(arguments: Arguments, folder: Path) -> None:
    if shutil.which("ffmpeg") is None:
        raise UserError("ffmpeg", "is not installed", "apt-get install ffmpeg")
    clips = [path for path in videos(folder) if "carphone" not in path.name]
    streams = [CODEC.encode(path) for path in clips]
    tokenizer = Tokenizer.train(streams, 1024, CODEC.to_dict())
    ratios = {}
    print(f"{'':24}{'ffmpeg, ms':>12}{'ours, ms':>12}{'ours/ffmpeg':>12}")
    for path in clips:
        command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(path), *PAPER.split()]
        ours = partial(encode, path, tokenizer)
        row(f"encode+tokenize {path.stem}", command, ours, 1, arguments.rounds, ratios)
    for path, stream in zip(clips, streams, strict=True):
        file = path.with_suffix(".h264")
        file.write_bytes(REPEAT * stream)
        command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-f", "h264", "-i", str(file)]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        ours = partial(decode, stream)
        row(f"decode {path.stem}", command, ours, REPEAT, arguments.rounds, ratios)
    for part in ("encode+tokenize", "decode"):
        found = [ratio for name, ratio in ratios.items() if name.startswith(part)]
        ratios[f"{part}, median over clips"] = round(statistics.median(found), 3)
    ratios["two workers / one"] = measure_workers(arguments, folder, clips, tokenizer)
    print(json.dumps(ratios))


def encode(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """What a worker does with a video."""
    return tokenizer.encode(CODEC.encode(path))


def decode(stream: bytes) -> None:
    """All copies of a clip, to RGB."""
    for _ in range(REPEAT):
        CODEC.decode(stream)


def row(name: str, command: list[str], ours: Callable, clips: int, rounds: int, ratios: dict) -> None:
    """Measures so many clips at a time, prints milliseconds of one, and notes the ratio."""
    times: list[tuple[float, float]] = []
    ours()
    for _ in range(rounds):
        start = processor_seconds(partial(run, ["ffmpeg", "-version"]))
        theirs = processor_seconds(partial(run, command)) - start
        times.append((theirs, processor_seconds(ours)))
    theirs, mine = (statistics.median(side) / clips * 1000 for side in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{name:24}{theirs:12.1f}{mine:12.1f}{ratio:12.2f}", flush=True)
    ratios[name] = round(ratio, 3)


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def processor_seconds(call: Callable) -> float:
    """Of this process and of those that it has started and waited for."""

    def used() -> float:
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(sum(resource.getrusage(who)[:2]) for who in whose)

    before = used()
    call()
    return used() - before


def seconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_workers(arguments: Arguments, folder: Path, clips: list[Path], tokenizer: Tokenizer) -> float:
    """Speed of two workers over that of one, the start of the processes included."""
    names = folder / "names.txt"
    many = folder / "many"
    many.mkdir()
    for i in range(arguments.copies):
        for path in clips:
            (many / f"{i}-{path.name}").symlink_to(path)
    names.write_text("\n".join(f"many/{path.name}" for path in sorted(many.iterdir())))
    ratios = []
    for i in range(max(1, arguments.rounds // 3)):
        taken = []
        for workers in (1, 2):
            call = partial(
                build_dataset, folder / f"{i}-{workers}", [names], VideoEncoder(CODEC), tokenizer,
                workers=workers, progress=False,
            )  # fmt: skip
            taken.append(seconds(call))
        count = arguments.copies * len(clips)
        print(
            f"{count} videos: one worker {count / taken[0]:.1f}/s, two {count / taken[1]:.1f}/s", flush=True
        )
        ratios.append(taken[0] / taken[1])
    return round(statistics.median(ratios), 3)


def measure_tokens(folder: Path) -> None:
    """Clips that begin a third of a second apart; tokenizers of 1024 entries from the videos not held out."""
    paths = videos(folder)
    ratios = {}
    print(f"{'':16}{'clips':>8}{'bytes':>10}{'tokens':>10}{'least':>8}{'most':>8}")
    for name, codec in (
        ("head kept", CODEC),
        ("head removed", AvcCodec(remove_head=True)),
        ("paper's bytes", AvcCodec(paper_bytes=True)),
    ):
        clips = {path.stem: list(codec.encode_clips(path, None, 1 / 3, pad_short=True)) for path in paths}
        train = [clip for stem, found in clips.items() if stem not in HELD_OUT for clip in found]
        test = [clip for stem, found in clips.items() if stem in HELD_OUT for clip in found]
        tokenizer = Tokenizer.train(train, 1024, codec.to_dict())
        lengths = [len(tokenizer.encode(clip)) for clip in test]
        size, mean = statistics.mean(map(len, test)), statistics.mean(lengths)
        print(f"{name:16}{len(test):8}{size:10.0f}{mean:10.0f}{min(lengths):8}{max(lengths):8}", flush=True)
        ratios[f"{name}: bytes"], ratios[f"{name}: tokens"] = round(size), round(mean)
    print(json.dumps(ratios))


def measure_memory(folder: Path, count: int) -> None:
    """Peak memory of this process while it is the only worker."""
    write_video(folder / "000.mp4", list(moving(11, 3840, 2160)), rate=2)
    for i in range(1, count):
        (folder / f"{i:03d}.mp4").symlink_to(folder / "000.mp4")
    tokenizer = Tokenizer.train([CODEC.encode(folder / "000.mp4")], 256, CODEC.to_dict())
    (folder / "names.txt").write_text("\n".join(f"{i:03d}.mp4" for i in range(count)))
    code = (
        "import sys; from pathlib import Path; from megatron_codec.codecs import AvcCodec\n"
        "from megatron_codec.preprocessing import VideoEncoder, build_dataset\n"
        "from megatron_codec.tokenizer import Tokenizer\n"
        "folder = Path(sys.argv[1])\n"
        "build_dataset(folder / 'p', [folder / 'names.txt'], VideoEncoder(AvcCodec()),\n"
        "    Tokenizer.load(folder / 't.json'), progress=False)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)"
    )
    tokenizer.save(folder / "t.json")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    peak = float(done.stdout)
    print(f"{count} videos of 3840x2160: {peak:.0f} MiB at most")
    print(json.dumps({"memory of a worker, MiB": round(peak)}))


if __name__ == "__main__":
    run_tool(main)
