"""--check of the tools that preprocess: every stream is checked, and a wrong one is named with its source."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import PictureEncoder, build_dataset
from megatron_codec.preprocessing.checked import CheckedEncoder
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import write_photo_folder

ROOT = Path(__file__).parents[2]
CODEC = JpegCodec(32)
TOKENIZER = Tokenizer([], codec=CODEC.to_dict())


@dataclass(frozen=True)
class OneInSeven(JpegCodec):
    """Leaves bytes out of the third MCU of some pictures, which the marker structure does not show."""

    def encode(self, media) -> bytes:
        stream = super().encode(media)
        if sum(stream) % 7:
            return stream
        third = stream.index(b"\xff\xd2")
        return stream[: third - 2] + stream[third:]


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    return write_photo_folder(tmp_path / "photos")


def test_the_dataset_is_the_same(tmp_path, photos):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for prefix, check in (("plain", []), ("checked", ["--check"])):
        command = [sys.executable, str(ROOT / "tools" / "preprocess_jpeg.py"), "--input", str(photos)]
        command += ["--tokenizer", "tokenizer.json", "--output-prefix", prefix, "--image-size", "32", *check]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"plain.{suffix}").read_bytes() == (tmp_path / f"checked.{suffix}").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_stream_is_named_with_its_source(tmp_path, photos, workers):
    encoder = PictureEncoder(OneInSeven(32))
    build_dataset(tmp_path / "unseen", [photos], encoder, TOKENIZER, workers=workers)
    with pytest.raises(UserError, match="was encoded to a stream that is not valid") as caught:
        build_dataset(tmp_path / "seen", [photos], CheckedEncoder(encoder), TOKENIZER, workers=workers)
    assert "MCU" in str(caught.value)
    assert any(str(path.relative_to(photos)) in str(caught.value) for path in photos.rglob("*.*"))
    assert not (tmp_path / "seen.json").exists()
