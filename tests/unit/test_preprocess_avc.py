"""Preprocessing from videos to a dataset, through the commands that users run."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import AvcCodec
from megatron_codec.data import CodecDataset
from megatron_codec.preprocessing import VideoEncoder, build_dataset
from megatron_codec.preprocessing.sources.place import Place
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import real_video
from tests.videos import moving, write_video

ROOT = Path(__file__).parents[2]
CODEC = AvcCodec(frames=4, width=64, height=48)
SIZE = ("--size", "64x48", "--frames", 4)


def tool(name: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def streams(prefix: Path) -> list[bytes]:
    dataset = CodecDataset.open(prefix)
    tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
    return [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def tokens(prefix: Path) -> bytes:
    shards = CodecDataset.open(prefix).manifest.shards
    return b"".join((prefix.parent / f"{shard.name}.bin").read_bytes() for shard in shards)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """12 videos of 2 to 7 seconds and a text, in folders."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(12):
        path = folder / f"class {i % 3}" / f"{i:02d}.{['mp4', 'mkv', 'MOV', 'avi'][i % 4]}"
        path.parent.mkdir(exist_ok=True)
        write_video(path, np.roll(moving(20 + 5 * i), 17 * i, axis=2))
    (folder / "class 0" / "labels.csv").write_text("0,cat\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(videos, tmp_path_factory) -> Path:
    """Trained by the command."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    done = tool(
        *("train_tokenizer", "--codec", "avc", "--input", videos, "--vocab-size", 400, "--output", path),
        *(*SIZE, "--clips-per-video", 0),
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout and "bytes a token" in done.stdout
    return path


def all_clips(videos: Path) -> list[bytes]:
    files = sorted(path for path in videos.rglob("*") if path.is_file() and path.suffix != ".csv")
    return [clip for path in files for clip in CODEC.encode_clips(path, None)]


def test_the_tokenizer_is_that_of_the_clips(videos, tokenizer):
    trained = Tokenizer.load(tokenizer)
    assert trained.vocab_size == 400
    assert trained.to_dict() == Tokenizer.train(all_clips(videos), 400, CODEC.to_dict()).to_dict()


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_the_clips(videos, tokenizer, tmp_path, workers):
    done = tool(
        *("preprocess_avc", "--input", videos, "--tokenizer", tokenizer, "--output-prefix", "p", *SIZE),
        *("--clips-per-video", 0, "--workers", workers),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = all_clips(videos)
    assert streams(tmp_path / "p") == expected and len(expected) > 24
    assert f"{len(expected)} documents" in done.stdout
    manifest = CodecDataset.open(tmp_path / "p").manifest
    assert manifest.statistics["items"] == 12 and len(manifest.shards) == workers
    assert manifest.source["clips_per_video"] is None and manifest.source["stride"] is None
    assert {"av", "x264", "libavcodec", "libswscale"} <= manifest.versions.keys()
    assert manifest.versions["x264"].startswith("16")
    for more in ([], ["--decode"]):
        done = tool("verify_dataset", "p", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = tool("show_dataset", "p", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "documents without a picture: 0" in done.stdout
    assert Image.open(tmp_path / "p.png").width > 200


def test_clips_and_their_stride(videos, tokenizer, tmp_path):
    path = sorted(videos.rglob("11.*"))[0]
    done = tool(
        *("preprocess_avc", "--input", path, "--tokenizer", tokenizer, "--output-prefix", "p", *SIZE),
        *("--clips-per-video", 3, "--stride", 1),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert streams(tmp_path / "p") == list(CODEC.encode_clips(path, 3, 1.0))
    assert len(streams(tmp_path / "p")) == 3


def test_tar_files_hold_the_same_videos(videos, tokenizer, tmp_path):
    found = {}
    for name in ("plain.tar", "compressed.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
            tar.add(videos, "videos")
        encoder = VideoEncoder(CODEC, clips=None)
        prefix = tmp_path / name.partition(".")[0]
        build_dataset(prefix, [tmp_path / name], encoder, Tokenizer.load(tokenizer), progress=False)
        found[name] = sorted(streams(prefix))
    assert found["plain.tar"] == found["compressed.tar.gz"] == sorted(all_clips(videos))


def test_a_part_of_a_file_reads_like_a_file(tmp_path):
    content = random.Random(0).randbytes(1000)
    (tmp_path / "file").write_bytes(content)
    with Place(str(tmp_path / "file"), 100, 300).open() as part, io.BytesIO(content[100:400]) as expected:
        for offset, whence, size in ((0, 0, 10), (5, 1, 7), (-20, 2, 50), (400, 0, 3), (250, 0, -1)):
            assert part.seek(offset, whence) == expected.seek(offset, whence)
            assert part.read(size) == expected.read(size)
            assert part.tell() == expected.tell()


def test_what_cannot_be_used_is_counted_by_kind(tokenizer, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    good = write_video(folder / "a.mp4", moving(40))
    (folder / "b.mp4").write_text("a letter")
    (folder / "c.mp4").write_bytes(good.read_bytes()[:900])
    write_video(folder / "d.mp4", [], sound=2.0)
    write_video(folder / "e.mp4", moving(7))
    write_video(folder / "f.mp4", moving(1))
    (folder / "g.mp4").symlink_to("nowhere")
    write_video(folder / "h.mp4", moving(40, 256, 200))
    (folder / "i.avi").write_bytes(b"")
    np.save(tmp_path / "pictures.npy", moving(2))
    done = tool(
        *("preprocess_avc", "--input", folder, tmp_path / "pictures.npy", "--tokenizer", tokenizer),
        *("--output-prefix", "p", *SIZE, "--max-pixels", 50_000),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped 10 videos" in done.stdout
    skipped = CodecDataset.open(tmp_path / "p").manifest.skipped
    assert skipped["reasons"] == {
        "missing": 1, "no video": 1, "not a video": 3, "still picture": 3, "too many pixels": 1,
        "too short": 1,
    }  # fmt: skip
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in skipped["first"]}
    assert reasons["e.mp4"] == "has 2 frames at 3 a second, and a clip has 4"
    assert reasons["h.mp4"] == "has 51,200 pixels a frame, above the limit of 50,000"
    assert reasons["d.mp4"] == "has no video stream, only sound"
    padded = build_dataset(
        tmp_path / "padded",
        [folder],
        VideoEncoder(CODEC, pad_short=True),
        Tokenizer.load(tokenizer),
        progress=False,
    )
    assert padded.documents == 3 and "too short" not in padded.skipped["reasons"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "empty"], "empty: holds no videos (1 other files); check the path; videos are known by"),
        (["--input", "a.mp4"], "--input: 1 videos: none of them can be read, first a.mp4 (cannot be opened"),
        (["--size", "64"], "--size 64: must be WIDTHxHEIGHT in pixels; for instance 256x144"),
        (["--size", "60x48"], "width 60: must be a multiple of 16, at most 4096; use 64"),
        (["--qp", "0"], "QP 0: must lie between 1 and 51"),
        (["--frames", "5"], "does not fit streams of avc"),
        (["--clips-per-video", "-1"], "--clips-per-video -1: must be at least 1, or 0 for all"),
        (["--stride", "0.1", "--clips-per-video", "2"], "--stride 0.1: must be at least a frame"),
        (["--stride", "2"], "--stride 2.0: has no meaning for a single clip of each video"),
        (["--max-pixels", "0"], "--max-pixels 0: must be at least 1"),
        (["--remove-head", "--paper-bytes"], "the head: cannot be removed from the paper's own bytes"),
        (["--max-skipped", "0"], "1 of 1 videos were skipped: more than --max-skipped 0"),
    ],
)
def test_mistakes_are_explained(tokenizer, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "photo.jpg").write_text("")
    (tmp_path / "a.mp4").write_text("a letter")
    given = {"--input": ["a.mp4"], "--size": ["64x48"], "--frames": ["4"]}
    fixed = [part for flag, values in given.items() if flag not in arguments for part in (flag, *values)]
    done = tool(
        *("preprocess_avc", *fixed, *arguments, "--tokenizer", tokenizer, "--output-prefix", "p"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    # A run that has begun leaves behind what the same command goes on from.
    assert [path.name for path in tmp_path.glob("p*")] == ["p.partial"] * ("--max-skipped" in arguments)


def test_killed_runs_go_on(tokenizer, tmp_path):
    """SIGKILL to all processes, each time when the journals have grown: the same bytes in the end."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(200):
        if i < 8:
            write_video(folder / f"{i:03d}.mp4", np.roll(moving(20), 9 * i, axis=2))
        else:
            os.link(folder / f"{i % 8:03d}.mp4", folder / f"{i:03d}.mp4")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_avc.py"), "--input", str(folder)]
    command += ["--tokenizer", str(tokenizer), *map(str, SIZE), "--output-prefix"]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True)
    kills, size = 0, 0
    while not (tmp_path / "killed.json").exists():
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed"), "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None:
            journals = list(tmp_path.glob("killed.partial/*.journal"))
            now = sum(path.stat().st_size for path in journals if path.exists())
            if now > size and kills < 3:
                size = now
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                process.wait()
            time.sleep(0.002)
    assert kills >= 1
    assert tokens(tmp_path / "killed") == tokens(tmp_path / "straight")
    assert not (tmp_path / "killed.partial").exists()


def test_the_papers_clip_of_a_real_video(tmp_path):
    codec = AvcCodec()
    path = real_video("bikes.mp4")
    clips = list(codec.encode_clips(path, None, 1.0))
    Tokenizer.train(clips, 1024, codec.to_dict()).save(tmp_path / "tokenizer.json")
    done = tool(
        *("preprocess_avc", "--input", path, "--tokenizer", "tokenizer.json", "--output-prefix", "p"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert streams(tmp_path / "p") == [codec.encode(path)] == clips[:1]
    manifest = json.loads((tmp_path / "p.json").read_text())
    assert manifest["codec"] == codec.to_dict()
