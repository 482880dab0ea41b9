"""examples/photo_crops.py: what its squares are, and what the report of the reproduction says of them."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.reproduction_results import dataset
from tests.data_sources import real_photos

ROOT = Path(__file__).parents[2]
OPENCV = Path("/usr/share/doc/opencv-doc")
TOOL = runpy.run_path(str(ROOT / "examples" / "photo_crops.py"))


def test_squares_are_those_of_the_photo_and_nothing_is_enlarged():
    photo = Image.open(real_photos()[0]).convert("RGB").resize((200, 130))
    found = list(TOOL["squares"](photo))
    # Sides 130, 91 and 65; the next would be 46. Steps of a third.
    assert len(found) == 1 * 2 + 2 * 4 + 4 * 7
    assert all(square.shape == (64, 64, 3) and square.dtype == np.uint8 for square in found)
    whole = np.asarray(photo.crop((0, 0, 130, 130)).resize((64, 64), Image.Resampling.BICUBIC))
    # At its right border the square sees what lies beyond.
    assert np.array_equal(found[0][:, :60], whole[:, :60])


def test_a_missing_photo_is_named(tmp_path):
    with pytest.raises(UserError, match=r"examples/reg/home\.png.* are missing; look where --opencv"):
        TOOL["photos"](tmp_path)


@pytest.mark.skipif(not (OPENCV / "examples").exists(), reason="no photos: apt-get install opencv-doc")
def test_the_report_says_how_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["photo_crops.py", "--opencv", str(OPENCV), "--output", str(tmp_path)])
    TOOL["main"]()
    train, test = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    assert train.shape[1:] == test.shape[1:] == (64, 64, 3) and len(test) >= 400
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings").write_text("DATASET=photos")
    words = dataset(run).words
    assert f"({len(train):,} to train on)" in words
    photos = TOOL["photos"](OPENCV)
    held_out = len(photos[2::5])
    assert f"from {len(photos) - held_out} real" in words and f"from {held_out} other photos" in words
