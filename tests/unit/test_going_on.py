"""A run that is stopped, split over tasks, or out of room ends with the bytes of one that was not."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.data import CodecDataset, Manifest
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import PictureEncoder, SkipLimit, build_dataset
from megatron_codec.preprocessing.journal import ShardFiles, ShardJournal
from megatron_codec.preprocessing.skipping import Skipped
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_jpeg.py")]
CODEC = JpegCodec(64)
ENCODER = PictureEncoder(CODEC)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """600 real pictures in tar files, files and arrays, broken and repeated ones among them."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "photos").mkdir()
    for i, crop in enumerate(photo_crops(200, 400)):
        crop.save(folder / "photos" / f"{i:03d}.jpg")
    (folder / "photos" / "050.jpg").write_text("no picture")
    (folder / "photos" / "150.jpg").write_bytes((folder / "photos" / "149.jpg").read_bytes())
    subprocess.run(["tar", "-cf", "photos.tar", "photos"], cwd=folder, check=True)
    crops = np.stack([np.asarray(crop.convert("L")) for crop in photo_crops(200, 64)])
    np.savez_compressed(folder / "crops.npz", crops)
    return folder


@pytest.fixture(scope="module")
def tokenizer(inputs) -> Path:
    path = inputs / "tokenizer.json"
    Tokenizer.train([CODEC.encode(c) for c in photo_crops(30, 64)], 320, CODEC.to_dict()).save(path)
    return path


@pytest.fixture(scope="module")
def whole(inputs, tokenizer, tmp_path_factory) -> bytes:
    """The tokens of a run in one process that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(inputs, tokenizer, folder / "p")
    return (folder / "p.bin").read_bytes()


def command(inputs, tokenizer, prefix, *more) -> list[str]:
    names = [str(inputs / name) for name in ("photos.tar", "photos", "crops.npz")]
    fixed = ["--input", *names, "--tokenizer", tokenizer, "--output-prefix", prefix, "--image-size", 64]
    fixed += ["--no-scaled-decode"]  # slower
    return [*TOOL, *map(str, [*fixed, *more])]


def run(inputs, tokenizer, prefix, *more, code=0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(inputs, tokenizer, prefix, *more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """All files; the prefix's own path, which the manifest's command holds, written as P."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "p.json" in found:
        manifest = found["p.json"].replace(str(folder).encode(), b"P")
        found["p.json"] = re.sub(rb'"checksum": "\w+"', b"", manifest)
    return found


def tokens(prefix: Path) -> bytes:
    shards = CodecDataset.open(prefix).manifest.shards
    return b"".join((prefix.parent / f"{shard.name}.bin").read_bytes() for shard in shards)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_moments(inputs, tokenizer, whole, tmp_path, workers):
    """SIGKILL to the tool alone, or to all its processes: the same command goes on, to the same bytes."""
    (tmp_path / "straight").mkdir()
    run(inputs, tokenizer, tmp_path / "straight" / "p", "--workers", workers)
    random.seed(workers)
    kills = resumed = 0
    while not (tmp_path / "killed" / "p.json").exists() or (tmp_path / "killed" / "p.partial").exists():
        process = subprocess.Popen(
            command(inputs, tokenizer, tmp_path / "killed" / "p", "--workers", workers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        watched = ShardProgress(tmp_path / "killed")
        deadline = time.monotonic() + 60
        target = watched.items() + random.randint(30, 200)
        while process.poll() is None and watched.items() < target and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if process.poll() is None:
            if kills % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            resumed += watched.items() > 0
        process.wait()
    assert kills >= 2 and resumed >= 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert tokens(tmp_path / "killed" / "p") == whole


class ShardProgress:
    """How many items the journals of a dataset on its way hold."""

    def __init__(self, folder: Path):
        self._folder = folder

    def items(self) -> int:
        """Of all shards together."""
        found = 0
        for journal in self._folder.glob("p.partial/*.journal"):
            try:
                *_, last = journal.read_bytes().splitlines()
                found += json.loads(last)["items"]
            except (OSError, ValueError):  # none yet, or being written
                pass
        return found


def test_split_over_tasks(inputs, tokenizer, whole, tmp_path):
    """Any order of tasks; the last one joins, and a task that was killed is run again."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for task in (2, 0, 1):
        done = run(inputs, tokenizer, tmp_path / "a" / "p", "--shard", f"{task}/3", "--workers", 2)
        assert (f"shard {task}/3 is done" in done.stdout) == (task != 1)
        assert (tmp_path / "a" / "p.json").exists() == (task == 1)
    assert tokens(tmp_path / "a" / "p") == whole
    shards = [shard.name for shard in CodecDataset.open(tmp_path / "a" / "p").manifest.shards]
    assert shards == [f"p-{i:05d}-of-00006" for i in range(6)]
    assert len(list((tmp_path / "a").iterdir())) == 13
    together = [
        subprocess.Popen(
            command(inputs, tokenizer, tmp_path / "b" / "p", "--shard", f"{task}/3", "--workers", 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1, 2)
    ]
    for process in together:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    run(inputs, tokenizer, tmp_path / "c" / "p", "--workers", 6)
    one, other = (Manifest.load(tmp_path / name / "p.json") for name in ("a", "c"))
    assert (one.hash, one.shards, one.statistics, one.skipped) == (
        other.hash,
        other.shards,
        other.statistics,
        other.skipped,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_no_process_and_can_go_on(inputs, tokenizer, whole, tmp_path, workers):
    for _ in range(10):  # on a busy machine it may end before we are there
        process = subprocess.Popen(
            command(inputs, tokenizer, tmp_path / "p", "--workers", workers),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while ShardProgress(tmp_path).items() == 0 and process.poll() is None:
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, errors = process.communicate(timeout=30)
        if process.returncode:
            break
        for path in tmp_path.iterdir():
            path.unlink()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert f"stopped; {tmp_path / 'p.partial'} is where the same command goes on" in errors
    assert (tmp_path / "p.partial").exists() and not (tmp_path / "p.json").exists()
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # Python's resource tracker ends after its parent
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    done = run(inputs, tokenizer, tmp_path / "p", "--workers", workers)
    assert "600 pictures" in done.stderr
    assert tokens(tmp_path / "p") == whole


def test_another_command_does_not_go_on(inputs, tokenizer, tmp_path):
    run(inputs, tokenizer, tmp_path / "p", "--shard", "0/2")
    for more, message in (
        (["--workers", 3], "shards was 2 and is 3;"),
        (["--shard", "1/2", "--resample", "box"], "source.geometry.resample was 'bicubic' and is 'box'"),
        (["--shard", "1/2", "--quality", 25, "--limit", 10], "source.limit was None and is 10"),
    ):
        errors = run(inputs, tokenizer, tmp_path / "p", *more, code=2).stderr
        assert message in errors and "or remove" in errors
    photo = inputs / "photos" / "zzz.jpg"
    photo.write_text("a new one")
    errors = run(inputs, tokenizer, tmp_path / "p", "--shard", "1/2", code=2).stderr
    photo.unlink()
    assert "input_names was" in errors
    run(inputs, tokenizer, tmp_path / "p", "--shard", "1/2")
    assert "p.json: exists already" in run(inputs, tokenizer, tmp_path / "p", code=2).stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(inputs, tokenizer, whole, tmp_path, workers):
    """A limit on the size of files stands for it: writing fails in the middle of a shard."""
    limit = len(whole) // 3 // workers
    done = subprocess.run(
        command(inputs, tokenizer, tmp_path / "p", "--workers", workers),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"p\S*: cannot be written: .*; make room; the same command goes on", done.stderr)
    assert (tmp_path / "p.partial").exists() and not (tmp_path / "p.json").exists()
    assert ShardProgress(tmp_path).items() > 0
    run(inputs, tokenizer, tmp_path / "p", "--workers", workers)
    assert tokens(tmp_path / "p") == whole


def test_too_many_skipped(inputs, tokenizer, tmp_path):
    for text, name in (("1", "a"), ("0.1%", "b")):
        errors = run(inputs, tokenizer, tmp_path / name, "--max-skipped", text, code=2).stderr
        assert f"more than --max-skipped {text}" in errors and not (tmp_path / f"{name}.json").exists()
        done = run(inputs, tokenizer, tmp_path / name, "--max-skipped", "1%")
        assert "skipped 2 pictures (not a picture: 2)" in done.stdout
    limit = SkipLimit("1%")
    limit.check(999, 500)
    limit.check(1000, 10)
    with pytest.raises(UserError, match="11 of 1,000 pictures were skipped"):
        limit.check(1000, 11)


def test_all_that_was_skipped_is_listed(tokenizer, tmp_path):
    (tmp_path / "some").mkdir()
    for i in range(150):
        (tmp_path / "some" / f"{i:03d}.jpg").write_bytes(b"")
    photo_crops(1, 64)[0].save(tmp_path / "some" / "good.png")
    manifest = build_dataset(
        tmp_path / "p", [tmp_path / "some"], ENCODER, Tokenizer.load(tokenizer), progress=False
    )
    assert manifest is not None and manifest.skipped["count"] == 150
    assert len(manifest.skipped["first"]) == 100 and manifest.skipped["file"] == "p.skipped.jsonl"
    listed = [json.loads(line) for line in (tmp_path / "p.skipped.jsonl").open()]
    assert listed[:100] == manifest.skipped["first"] and len(listed) == 150


def journal_steps(rng: np.random.Generator) -> Iterator[tuple[int, list[np.ndarray], list[Skipped]]]:
    for _ in range(12):
        documents = [rng.integers(0, 320, rng.integers(2, 50), np.uint16) for _ in range(rng.integers(0, 60))]
        yield len(documents) + 1, documents, [Skipped("a", "b", "c")]


def write_journal(folder: Path, files: ShardFiles, steps) -> None:
    with ShardJournal(files) as journal:
        done = 0
        for items, documents, skipped in steps:
            done += items
            if done > journal.items:
                journal.append(items, done, documents, skipped)
        journal.finish()


def test_a_journal_recovers_from_every_kind_of_loss(tmp_path):
    """Power may fail with any part of any file on disk: cut each at random, or blank its end."""
    steps = list(journal_steps(np.random.default_rng(0)))
    whole = ShardFiles(tmp_path / "w.partial", tmp_path / "w")
    write_journal(tmp_path, whole, steps)
    expected = whole.finished()
    random.seed(0)
    for trial in range(60):
        files = ShardFiles(tmp_path / f"{trial}.partial", tmp_path / f"{trial}")
        count = random.randint(0, len(steps))
        with ShardJournal(files) as journal:
            for items, documents, skipped in steps[:count]:
                journal.append(items, journal.items + items, documents, skipped)
        for path in random.sample([files.bin, files.documents, files.journal], random.randint(0, 3)):
            content = path.read_bytes()
            cut = random.randint(0, len(content))
            path.write_bytes(content[:cut] + bytes(len(content) - cut) * random.randint(0, 1))
        write_journal(tmp_path, files, steps)
        assert Path(f"{files.target}.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()
        assert Path(f"{files.target}.idx").read_bytes() == (tmp_path / "w.idx").read_bytes()
        finished = files.finished()
        assert finished is not None and expected is not None
        assert finished.items == expected.items and finished.skipped == expected.skipped
        assert finished.shard.blocks == expected.shard.blocks


def test_killed_between_the_last_renames(tmp_path):
    steps = list(journal_steps(np.random.default_rng(1)))
    files = ShardFiles(tmp_path / "p.partial", tmp_path / "p")
    write_journal(tmp_path, files, steps)
    expected, content = files.finished(), (tmp_path / "p.bin").read_bytes()
    files.done.unlink()
    write_journal(tmp_path, files, steps)
    assert files.finished() == expected and (tmp_path / "p.bin").read_bytes() == content


def test_killed_when_only_its_folder_is_left(inputs, tokenizer, tmp_path, monkeypatch):
    """Then the same settings end well, and others are told that there is a dataset."""
    prefix, photos, kept = tmp_path / "p", [inputs / "photos"], Tokenizer.load(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_codec.preprocessing.plan.Plan.remove", lambda _: None)
        manifest = build_dataset(prefix, photos, ENCODER, kept, limit=20, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.glob("p.*") if path.is_file()}
    with pytest.raises(UserError, match="exists already"):
        build_dataset(prefix, photos, ENCODER, kept, limit=21, progress=False)
    assert (tmp_path / "p.partial").is_dir()
    assert build_dataset(prefix, photos, ENCODER, kept, limit=20, progress=False) == manifest
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match="exists already"):
        build_dataset(prefix, photos, ENCODER, kept, limit=20, progress=False)


def test_killed_while_it_names_its_files(tmp_path, monkeypatch):
    """What SIGKILL leaves lies in the folder that goes away in the end, not beside the dataset."""

    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    steps = list(journal_steps(np.random.default_rng(1)))
    files = ShardFiles(tmp_path / "p.partial", tmp_path / "p")
    monkeypatch.setattr("megatron_codec.data.indexed.IndexedWriter.write_index", killed)
    process = multiprocessing.get_context("fork").Process(target=write_journal, args=(tmp_path, files, steps))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["p.partial"]
    assert len(list((tmp_path / "p.partial").glob(".p.idx.*.tmp"))) == 1
    monkeypatch.undo()
    write_journal(tmp_path, files, steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx", "p.partial"]


def test_two_runs_do_not_write_the_same_shard(tmp_path, monkeypatch):
    files = ShardFiles(tmp_path / "p.partial", tmp_path / "p")
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with ShardJournal(files):
            entered.set()
            leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(30)
    monkeypatch.setattr("megatron_codec.preprocessing.journal._PATIENCE", 0.3)
    with pytest.raises(UserError, match="p: is being written by another run; wait for it"):
        ShardJournal(files).__enter__()
    leave.set()
    holder.join()
    with ShardJournal(files) as journal:
        assert journal.items == 0


def slurm_task(arguments, **variables) -> subprocess.CompletedProcess:
    """The script as SLURM starts it, with the variables that SLURM sets."""
    python = str(Path(sys.executable).parent)
    environment = {"PATH": f"{python}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), **variables}
    script = ROOT / "examples" / "preprocess_slurm_array.sh"
    command = ["bash", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_for_a_slurm_array(inputs, tokenizer, whole, tmp_path):
    arguments = command(inputs, tokenizer, tmp_path / "p")[2:]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    some = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    cpus = {"SLURM_CPUS_PER_TASK": "2"}
    done = slurm_task(arguments, **array, **cpus, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 0 and "shard 0/2 is done" in done.stdout, done.stderr
    done = slurm_task(arguments, **some, **cpus, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 2 and "SHARDS=64 sbatch" in done.stderr
    done = slurm_task(arguments, **some, **cpus, SLURM_ARRAY_TASK_ID="1", SHARDS="2")
    assert done.returncode == 0 and "exact duplicates" in done.stdout, done.stderr
    assert tokens(tmp_path / "p") == whole
    assert slurm_task(arguments).returncode == 2
