"""tools/show_dataset.py as a user runs it: the figures are right, and the picture shows something."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.data import CodecDataset, write_dataset
from megatron_codec.data.manifest import length_statistics
from megatron_codec.preprocessing import PictureEncoder, build_dataset
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "show_dataset.py"
CODEC = JpegCodec(64)
MISSING = (200, 60, 60)  # the cross of the contact sheet


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool in this process, which has torch already; gives exit status, stdout and stderr."""
    tool = runpy.run_path(str(SCRIPT))

    def run(*arguments) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["show_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            tool["run_tool"](tool["main"])
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """30 real photographs, one of them three times, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    crops = photo_crops(30, 64)
    for i, crop in enumerate([*crops, crops[3], crops[3]]):
        crop.save(folder / f"{i:02d}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    tokenizer = Tokenizer.train(map(CODEC.encode, crops), 320, codec=CODEC.to_dict())
    build_dataset(folder / "p", [folder], PictureEncoder(CODEC), tokenizer, workers=2, progress=False)
    return folder / "p"


def colours(picture: Image.Image) -> set:
    return set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))


def test_figures_and_picture_of_a_dataset(prefix):
    command = [sys.executable, str(SCRIPT), "p"]
    done = subprocess.run(command, cwd=prefix.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dataset = CodecDataset.open(prefix)
    documents = [dataset.document(i) for i in range(dataset.num_documents)]
    tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
    lengths = [len(document) for document in documents]
    assert f"- documents: 32 in 2 shards\n- tokens: {sum(lengths):,}\n" in done.stdout
    mean, median = f"{round(np.mean(lengths), 3):,}", f"{sorted(lengths)[16]:,}"
    assert re.search(f"- tokens a document: mean {mean}, .*p50 {median}.*max {max(lengths):,}\n", done.stdout)
    [kind] = dataset.manifest.skipped["reasons"]
    assert f"- exact duplicates: 2\n- skipped: 1 ({kind}: 1)\n" in done.stdout
    assert "- documents without a picture: 0 of 32 drawn\n" in done.stdout

    counts = np.bincount(np.concatenate(documents), minlength=322)
    assert f"Commonest of {sum(lengths):,} tokens in 32 documents:" in done.stdout
    rows = re.findall(r"^\| (\d+) \| (.*) \| ([\d,]+) \| (.*)% \|$", done.stdout, re.MULTILINE)
    assert len(rows) == 24
    assert [int(row[2].replace(",", "")) for row in rows] == sorted(counts.tolist())[:-25:-1]
    for id, name, count, share in rows:
        assert counts[int(id)] == int(count.replace(",", ""))
        assert float(share) == pytest.approx(100 * counts[int(id)] / sum(lengths), abs=0.006)
        hexadecimal, _, cut = name.partition("...")
        text = tokenizer.token_bytes(int(id))
        assert text.hex().startswith(hexadecimal) and (not cut or cut == f" ({len(text)} bytes)")
        assert cut or text.hex() == hexadecimal

    # The contact sheet of all 32, in their order, pixel by pixel, and charts below it.
    picture = Image.open(prefix.parent / "p.png").convert("RGB")
    decoded = [CODEC.decode(tokenizer.decode(document)) for document in documents]
    sheet = contact_sheet([decoded[i : i + 8] for i in range(0, 32, 8)])
    left = (picture.width - sheet.width) // 2
    assert picture.crop((left, 0, left + sheet.width, sheet.height)).tobytes() == sheet.tobytes()
    below = picture.crop((0, sheet.height, *picture.size))
    assert below.height > 300
    assert colours(below) >= {(31, 119, 180), (255, 127, 14), (255, 255, 255)}  # matplotlib's blue and orange
    assert {path.name for path in prefix.parent.glob("*p*")} >= {"p.json", "p.png"}
    assert not list(prefix.parent.glob(".*.tmp"))


def test_documents_that_do_not_decode_are_crossed_out(prefix, tmp_path, run):
    dataset = CodecDataset.open(prefix)
    tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
    headless = np.array([320, *tokenizer.encode(b"no picture"), 321], np.uint16)
    unknown = np.array([320, 7, 40000, 321], np.uint16)
    documents = [dataset.document(0), headless, dataset.document(1), unknown]
    # A manifest without statistics.
    write_dataset(tmp_path / "p", documents, CODEC.to_dict(), tokenizer.to_dict())
    output = tmp_path / "new" / "shown.png"
    code, shown, _ = run(tmp_path / "p", "--output", output, "--count", 3, "--seed", 5, "--sample", 2)
    assert code == 0
    rng = np.random.default_rng(5)
    drawn, counted = (rng.choice(4, count, replace=False).tolist() for count in (3, 2))
    missing = sum(i in (1, 3) for i in drawn)
    assert missing and f"- documents without a picture: {missing} of 3 drawn" in shown
    assert MISSING in colours(Image.open(output))
    tokens = sum(len(documents[i]) for i in counted)
    assert f"Commonest of {tokens:,} tokens in 2 documents" in shown
    lengths = sorted(map(len, documents))
    assert f"mean {round(sum(lengths) / 4, 3):,}, min 4, p1 4, " in shown
    assert f"max {lengths[-1]:,}\n- skipped: 0" in shown and "duplicates" not in shown

    write_dataset(tmp_path / "q", [headless, unknown], CODEC.to_dict(), tokenizer.to_dict())
    code, shown, _ = run(tmp_path / "q")
    assert code == 0 and "- documents without a picture: 2 of 2 drawn" in shown
    assert "| 320 | BOS | 2 |" in shown and "| 321 | EOS | 2 |" in shown
    assert "| 40000 | no token | 1 |" in shown
    assert MISSING in colours(Image.open(tmp_path / "q.png"))


def test_what_cannot_be_shown_is_told(prefix, tmp_path, run):
    write_dataset(tmp_path / "empty", [], CODEC.to_dict(), CodecDataset.open(prefix).manifest.tokenizer)
    for arguments, message in (
        ([tmp_path / "missing"], "there is no such dataset"),
        ([prefix, "--output", tmp_path], f"--output {tmp_path}: is a folder"),
        ([prefix, "--count", 0], "--count 0: must be at least 1"),
        ([prefix, "--sample", 0], "--sample 0: must be at least 1"),
        ([tmp_path / "empty"], "empty: is a dataset without documents"),
    ):
        code, shown, fault = run(*arguments)
        assert code == 2 and not shown and message in fault
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".idx", ".json"}


def test_a_clip_shows_its_first_frame(prefix):
    tool = runpy.run_path(str(SCRIPT))
    tokenizer = Tokenizer.from_dict(CodecDataset.open(prefix).manifest.tokenizer)
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3)).astype(np.uint8)

    class ClipCodec:
        def decode(self, stream):
            assert stream == b"abc"
            return frames

    document = np.array([320, *tokenizer.encode(b"abc"), 321], np.uint16)
    np.testing.assert_array_equal(tool["picture_of"](document, tokenizer, ClipCodec()), frames[0])


def test_statistics_are_those_of_the_manifest(prefix):
    """Where the manifest has none, they are counted in the same way."""
    dataset = CodecDataset.open(prefix)
    counted = length_statistics(dataset.lengths)
    assert counted == dataset.manifest.statistics["tokens_per_document"]
