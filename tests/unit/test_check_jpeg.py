"""tools/check_jpeg.py, as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.jpeg_format import parse
from tests.data_sources import photo_crops
from tests.jpeg_oracle import decode, encode, ranges

ROOT = Path(__file__).parents[2]
CODEC = JpegCodec(32)


def check(*arguments: str | Path) -> tuple[int, list[str], str]:
    command = [sys.executable, "tools/check_jpeg.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture
def file() -> bytes:
    return CODEC.to_file(CODEC.encode(photo_crops(1, 32)[0]))


def test_files_and_folders_are_checked(tmp_path, file):
    inner = tmp_path / "folder" / "inner"
    inner.mkdir(parents=True)
    (inner / "b.JPG").write_bytes(file)
    (tmp_path / "folder" / "a.jpeg").write_bytes(file)
    (tmp_path / "folder" / "notes.txt").write_bytes(b"not looked at")
    (tmp_path / "other.bin").write_bytes(file)
    status, lines, _ = check(tmp_path / "folder", tmp_path / "other.bin")
    names = ["folder/a.jpeg", "folder/inner/b.JPG", "other.bin"]
    assert lines == [*(f"{tmp_path / name}: valid" for name in names), "3 files, 0 not valid"]
    assert status == 0


def test_a_fault_is_named_with_byte_mcu_and_rule(tmp_path, file):
    good, marker, cut, text = (tmp_path / f"{name}.jpg" for name in ("good", "marker", "cut", "text"))
    second = file.index(b"\xff\xd1")
    good.write_bytes(file)
    marker.write_bytes(file[: second + 1] + b"\xd2" + file[second + 2 :])
    cut.write_bytes(file[: second + 4])
    text.write_bytes(b"hello")
    status, lines, _ = check("--quiet", good, marker, cut, text)
    assert status == 1
    assert lines[0] == f"{marker}: byte {second + 1}: D2 is not part of RST1, which is due after MCU 1 of 4"
    assert lines[1].startswith(f"{cut}: byte {second + 4}: ends in MCU 2 of 4, block 0 (component 0)")
    assert lines[2:] == [f"{text}: byte 0: does not begin with SOI (FFD8)", "4 files, 3 not valid"]


def test_a_stream_without_its_tables_is_told_so(tmp_path):
    (tmp_path / "stream.jpg").write_bytes(CODEC.encode(photo_crops(1, 32)[0]))
    status, lines, _ = check(tmp_path / "stream.jpg")
    assert status == 1 and "no quantization table 0" in lines[0]


def test_flags_refuse_more(tmp_path, file):
    layout = parse(file)
    head, scan = file[: layout.scan_offset], file[layout.scan_offset :]
    mcus = decode(layout, scan)
    dressed, beyond = tmp_path / "dressed.jpg", tmp_path / "beyond.jpg"
    dressed.write_bytes(head + encode(layout, mcus, runs=1))
    mcus[3][2][0] = ranges(layout.components[0])[0][1] + 1
    beyond.write_bytes(head + encode(layout, mcus))
    assert check(dressed, beyond)[0] == 0
    status, lines, _ = check("--canonical", dressed, beyond)
    assert status == 1 and "holds a code that is none" in lines[0] and lines[1].endswith(": valid")
    status, lines, _ = check("--in-range", dressed, beyond)
    assert status == 1 and lines[0].endswith(": valid")
    assert "makes a coefficient that no picture of 8 bits has; MCU 3 of 4, block 2" in lines[1]


def test_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    status, lines, error = check(tmp_path / "missing.jpg", tmp_path / "empty")
    assert status == 2 and not lines
    assert f"{tmp_path / 'missing.jpg'}: does not exist" in error
    assert f"{tmp_path / 'empty'}: holds no file named" in error
    assert check()[0] == 2
