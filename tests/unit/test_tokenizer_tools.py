"""tools/train_tokenizer.py and tools/show_tokenizer.py as a user runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, crop in enumerate(photo_crops(24)):
        crop.save(folder / f"{i}.png")
    Image.fromarray(np.full((256, 256, 3), 99, np.uint8)).save(folder / "flat.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


def run(tool: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_of_photos_becomes_a_tokenizer(photos, tmp_path):
    output = tmp_path / "new" / "tokenizer.json"
    settings = ["--image-size", 128, "--quality", 30, "--remove-head", "--drop-flat"]
    done = run("train_tokenizer.py", "--input", photos, "--vocab-size", 300, "--output", output, *settings)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(output)
    codec = JpegCodec(128, 30, remove_head=True)
    tokenizer.require_codec(codec.to_dict())
    assert tokenizer.vocab_size == 300

    # The same merges as from Python, in the order of nothing but their counts.
    streams = [codec.encode(crop) for crop in photo_crops(24)]
    assert tokenizer.merges == Tokenizer.train(streams, 300).merges
    tokens = sum(len(tokenizer.encode(stream)) for stream in streams)
    corpus = tokenizer.trained_on or {}
    assert (corpus["documents"], corpus["flat_dropped"], corpus["tokens"]) == (24, 1, tokens)
    assert f"{corpus['bytes']:,} bytes in {tokens:,} tokens" in done.stdout
    assert tokenizer.token_bytes(256).hex() in done.stdout
    assert "skipped 1 of 26 pictures" in done.stderr

    shown = run("show_tokenizer.py", output)
    assert shown.returncode == 0, shown.stderr
    assert "| restart marker |" in shown.stdout
    assert "- documents: 24" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing", "--output", "t.json"], "missing: there is no such file or folder"),
        (["--input", "{photos}", "--output", "."], "--output .: is a folder"),
        (["--input", "{photos}", "--output", "t.json", "--vocab-size", "255"], "--vocab-size 255"),
        (["--input", "{photos}", "--output", "t.json", "--image-size", "250"], "image size 250"),
        (
            ["--input", "{photos}/flat.png", "--output", "t.json", "--vocab-size", "60000"],
            "--vocab-size 60000: cannot be reached",
        ),
        (["--input", "{photos}/flat.png", "--output", "t.json", "--drop-flat"], "0 documents"),
    ],
)
def test_bad_input_ends_with_a_message_and_no_file(photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run("train_tokenizer.py", *(argument.format(photos=photos) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
