"""Preprocessing from pictures to a dataset, mostly through the command that users run."""

import gzip
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_codec.codecs import JpegCodec
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import PictureEncoder, PillowDecoder, build_dataset
from megatron_codec.preprocessing.workers import run_in_processes
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops, real_photos, write_photo_folder

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_jpeg.py")]
CODEC = JpegCodec(64)


def tool(*arguments, cwd, **options) -> subprocess.CompletedProcess:
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def documents(prefix) -> list[np.ndarray]:
    dataset = CodecDataset.open(prefix)
    return [dataset.document(i) for i in range(dataset.num_documents)]


def streams(prefix) -> list[bytes]:
    tokenizer = Tokenizer.from_dict(CodecDataset.open(prefix).manifest.tokenizer)
    return [tokenizer.decode(document) for document in documents(prefix)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    streams = [CODEC.encode(crop) for crop in photo_crops(30, 64)]
    Tokenizer.train(streams, vocab_size=320, codec=CODEC.to_dict()).save(path)
    return path


@pytest.mark.parametrize(("size", "geometry"), [(256, "crop"), (64, "pad")])
def test_documents_are_the_pictures_that_pillow_writes(tmp_path, size, geometry):
    codec = JpegCodec(size)
    trained = Tokenizer.train([codec.encode(crop) for crop in photo_crops(8, size)], codec=codec.to_dict())
    trained.save(tmp_path / "tokenizer.json")
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in real_photos():
        (folder / path.name).write_bytes(path.read_bytes())
    done = tool(
        *("--input", folder, "--tokenizer", "tokenizer.json", "--output-prefix", "out/photos"),
        *("--image-size", size, "--geometry", geometry, "--no-scaled-decode"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = documents(tmp_path / "out" / "photos")
    assert len(found) == len(real_photos())
    for path, document in zip(sorted(folder.iterdir()), found, strict=True):
        photo = Image.open(path).convert("RGB")
        if geometry == "crop":
            picture = ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC)
        else:
            picture = ImageOps.pad(photo, (size, size), Image.Resampling.BICUBIC)
        written = io.BytesIO()
        arguments = {"quality": 25, "subsampling": "4:2:0", "restart_marker_blocks": 1}
        Image.fromarray(np.asarray(picture)).save(written, "JPEG", **arguments)
        assert document[0] == trained.bos and document[-1] == trained.eos
        decoded = codec.decode(trained.decode(document))
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Image.open(written)))


def test_any_number_of_workers_gives_the_same_documents(tmp_path, photos, tokenizer):
    (tmp_path / "broken.jpg").write_text("no picture")
    hashes, contents, skipped = set(), set(), set()
    for workers in (1, 2, 3):
        done = tool(
            *("--input", photos, "broken.jpg", photos / "class 1", "--tokenizer", tokenizer),
            *("--output-prefix", f"p{workers}", "--image-size", 64, "--workers", workers),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert "27 documents" in done.stdout and "skipped 1 pictures (not a picture: 1): see p" in done.stdout
        manifest = CodecDataset.open(tmp_path / f"p{workers}").manifest
        names = [shard.name for shard in manifest.shards]
        expected = [f"p{workers}-{i:05d}-of-{workers:05d}" for i in range(workers)]
        assert names == (["p1"] if workers == 1 else expected)
        hashes.add(manifest.hash)
        contents.add(b"".join((tmp_path / f"{name}.bin").read_bytes() for name in names))
        skipped.add(json.dumps([manifest.skipped, manifest.statistics]))
    assert len(hashes) == len(contents) == len(skipped) == 1


def test_manifest_says_how_it_was_made(tmp_path, photos, tokenizer):
    arguments = ["--input", photos, "--tokenizer", tokenizer, "--output-prefix", "p", "--image-size", 64]
    assert tool(*arguments, "--limit", 5, cwd=tmp_path).returncode == 0
    manifest = CodecDataset.open(tmp_path / "p").manifest
    assert manifest.documents == 5
    assert manifest.codec == CODEC.to_dict()
    assert manifest.tokenizer == Tokenizer.load(tokenizer).to_dict()
    assert manifest.command[1:] == [*map(str, arguments), "--limit", "5"]
    assert manifest.source["inputs"] == [str(photos)] and manifest.source["limit"] == 5
    assert manifest.source["geometry"]["method"] == "crop" and manifest.statistics["items"] == 5
    lengths = [len(document) for document in documents(tmp_path / "p")]
    tokens = manifest.statistics["tokens_per_document"]
    assert tokens["mean"] == round(np.mean(lengths), 3) and tokens["p50"] == sorted(lengths)[2]
    assert (tokens["min"], tokens["max"]) == (min(lengths), max(lengths))
    assert manifest.statistics["duplicates"] == {"count": 0, "first": []}
    assert manifest.versions["pillow"] == Image.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx", "p.json"]


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_pictures_are_named_and_skipped(tmp_path, photos, tokenizer, workers):
    folder = tmp_path / "some"
    folder.mkdir()
    good = next(path.read_bytes() for path in sorted(photos.rglob("*.jpg")) if not path.name.startswith("."))
    (folder / "a good.jpg").write_bytes(good)
    (folder / "b cut short.jpg").write_bytes(good[: len(good) // 2])
    (folder / "c empty.png").write_bytes(b"")
    (folder / "d text.jpg").write_text("a letter")
    (folder / "e no file.jpg").symlink_to("nowhere")
    (folder / "f good.jpg").write_bytes(good)
    Image.new("F", (9, 9)).save(folder / "g float.tif")
    manifest = build_dataset(
        tmp_path / "p",
        [folder],
        PictureEncoder(CODEC, decoder=PillowDecoder(scaled_decode=False)),
        Tokenizer.load(tokenizer),
        workers=workers,
        progress=False,
    )
    assert manifest.documents == 2
    assert streams(tmp_path / "p") == [CODEC.encode(Image.open(io.BytesIO(good)))] * 2
    skipped = manifest.skipped
    assert skipped["count"] == 5 and skipped["reasons"] == {
        "empty file": 1, "missing": 1, "not a picture": 1, "truncated or damaged": 1, "unfit": 1,
    }  # fmt: skip
    assert manifest.statistics["duplicates"] == {"count": 1, "first": [[1, 0]]}
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in skipped["first"]}
    assert list(reasons) == ["b cut short.jpg", "c empty.png", "d text.jpg", "e no file.jpg", "g float.tif"]
    assert "truncated" in reasons["b cut short.jpg"]
    assert "no bytes" in reasons["c empty.png"] and "cannot identify" in reasons["d text.jpg"]
    assert "No such file" in reasons["e no file.jpg"] and "floating-point" in reasons["g float.tif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "empty"], "empty: holds no pictures (1 other files); check the path"),
        (["--input", "nowhere"], "nowhere: there is no such file or folder"),
        (
            ["--input", "broken.jpg"],
            "1 pictures: none of them can be read, first broken.jpg (Pillow cannot identify",
        ),
        (["--input", "broken.jpg", "broken.jpg", "--workers", "2"], "2 pictures: none of them can be read"),
        (["--input", "empty/list.txt"], "list.txt: must name one picture a line"),
        (["--input", "short-ubyte"], "short-ubyte: 6 bytes of pixels: must hold 2 x 2 x 2 bytes"),
        (["--input", "head-ubyte"], "head-ubyte: 0 bytes of pixels: must hold"),
        (["--input", "none-ubyte"], "--input none-ubyte: holds no pictures"),
        (["--input", "short.gz"], "short.gz: cannot be read"),
        (["--input", "PHOTOS", "--image-size", "250"], "image size 250: must be a multiple of 16"),
        (["--input", "PHOTOS", "--quality", "25", "--image-size", "128"], "does not fit streams of jpeg"),
        (["--input", "PHOTOS", "--quality", "30"], "quality=25, remove_head=False): does not fit"),
        (["--input", "PHOTOS", "--remove-head"], "remove_head=True); train one with tools/train_tokenizer"),
        (["--input", "PHOTOS", "--tokenizer", "empty/list.txt"], "list.txt: is not a whole JSON file"),
        (["--input", "PHOTOS", "--subset", "test"], "above 0 for the subset 'test'"),
        (["--input", "PHOTOS", "--hold-out", "1.5"], "--hold-out 1.5: must be"),
        (["--input", "PHOTOS", "--subset", "test", "--hold-out", "1e-9"], "none of the pictures falls into"),
        (["--input", "PHOTOS", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--input", "PHOTOS", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--input", "PHOTOS", "--shard", "2/2"], "--shard 2/2: must be I/N with I from 0 to N - 1"),
        (["--input", "PHOTOS", "--shard", "two"], "--shard two: must be I/N"),
        (["--input", "PHOTOS", "--max-skipped", "few"], "--max-skipped few: must be a number"),
        (["--input", "PHOTOS", "--max-skipped", "101%"], "--max-skipped 101%: must be a number"),
        (["--input", "PHOTOS", "--min-crop", "0"], "min crop 0.0: must be above 0"),
        (["--input", "PHOTOS", "--min-crop", "0.5"], "has no meaning for the geometry 'crop'"),
        (["--input", "PHOTOS", "--max-pixels", "0"], "--max-pixels 0: must be at least 1"),
        (["--input", "float.npy"], "float.npy: holds no pictures: an array of uint8"),
        (["--input", "short.npy"], "bytes of pixels in short.npy: must hold 2 x 8 x 8"),
        (["--input", "short.npz"], "short.npz: cannot be read"),
        (["--input", "empty.tar"], "--input: 1 pictures: none of them can be read, first empty.tar"),
        (["--input", "PHOTOS", "--output-prefix", "empty"], "is a folder; add a name, such as empty/train"),
        (["--input", "PHOTOS", "--output-prefix", "there"], "there.json: exists already; remove that"),
        (["--input", "PHOTOS", "--output-prefix", "broken.jpg/p"], "its folder cannot be made"),
        (["--input"], "--input: must name at least one"),
    ],
)
def test_bad_input_is_refused(tmp_path, photos, tokenizer, arguments, message, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "list.txt").touch()
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "short-ubyte").write_bytes(bytes([0, 0, 8, 3] + [0, 0, 0, 2] * 3 + [7] * 6))
    (tmp_path / "head-ubyte").write_bytes(bytes([0, 0, 8, 4, 0, 0, 0, 1, 0, 0]))
    (tmp_path / "none-ubyte").write_bytes(bytes([0, 0, 8, 3] + [0] * 12))
    (tmp_path / "short.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 3] + [0, 0, 0, 1] * 3 + [7]))[:-4])
    (tmp_path / "there.json").write_text("{}")
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8)))
    np.save(tmp_path / "short.npy", np.zeros((2, 8, 8), np.uint8))
    os.truncate(tmp_path / "short.npy", 200)
    np.savez(tmp_path / "short.npz", np.zeros((2, 8, 8), np.uint8))
    os.truncate(tmp_path / "short.npz", 200)
    (tmp_path / "empty.tar").touch()
    before = sorted(tmp_path.rglob("*"))
    given = [str(photos) if argument == "PHOTOS" else argument for argument in arguments]
    for name, value in (("--tokenizer", tokenizer), ("--output-prefix", "p"), ("--image-size", 64)):
        given += [] if name in given else [name, value]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [TOOL[1], *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(TOOL[1], run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def fail_in_one(job, tell):
    tell(job)
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "refuses":
        raise UserError("value", "rule", "remedy")
    if job == "waits":
        time.sleep(600)
    return job * 2


def test_workers_report_and_end_together():
    told = []
    assert run_in_processes(fail_in_one, ["a", "b"], told.append) == ["aa", "bb"]
    assert sorted(told) == ["a", "b"]
    started = time.monotonic()
    with pytest.raises(UserError, match="worker 1: died with exit code -9"):
        run_in_processes(fail_in_one, ["waits", "dies"], told.append)
    with pytest.raises(UserError, match="value: rule; remedy"):
        run_in_processes(fail_in_one, ["refuses", "waits"], told.append)
    assert time.monotonic() - started < 60


def test_preprocessing_needs_no_torch():
    code = "import sys, megatron_codec.preprocessing; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
