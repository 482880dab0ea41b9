"""tools/verify_dataset.py: whatever is altered in a dataset is refused, and the place is named."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.data import CodecDataset, Manifest, write_dataset
from megatron_codec.data.indexed import indexed_writer
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import PictureEncoder, build_dataset, verify
from megatron_codec.preprocessing.verify import verify_dataset
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import grey_faces

ROOT = Path(__file__).parents[2]
CODEC = JpegCodec(32, remove_head=True)
ENCODER = PictureEncoder(CODEC, Geometry("pad"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    streams = [CODEC.encode(face) for face in np.pad(grey_faces(), ((0, 0), (3, 4), (3, 4)))]
    return Tokenizer.train(streams, 320, codec=CODEC.to_dict())


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer) -> Path:
    """800 real pictures (the faces, turned and mirrored) in two shards, each of them two blocks long."""
    folder = tmp_path_factory.mktemp("original")
    faces = grey_faces()
    turned = [np.rot90(faces, turns, (1, 2)) for turns in range(4)]
    np.save(folder / "faces.npy", np.concatenate([*turned, *(faces[:, :, ::-1] for faces in turned)]))
    build_dataset(folder / "p", [folder / "faces.npy"], ENCODER, tokenizer, workers=2, progress=False)
    (folder / "faces.npy").unlink()
    return folder / "p"


@pytest.fixture
def prefix(original, tmp_path) -> Path:
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "p"


def verified(prefix, decode=False) -> Manifest:
    return verify_dataset(prefix, decode, progress=False)


def fault_of(prefix, decode=False) -> str:
    """The message about a dataset that is refused, on one line."""
    with pytest.raises(UserError) as caught:
        verified(prefix, decode)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tool(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "verify_dataset.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def documents(prefix) -> list[np.ndarray]:
    dataset = CodecDataset.open(prefix)
    return [dataset.document(i) for i in range(dataset.num_documents)]


@contextlib.contextmanager
def flipped(path: Path, place: int, value: int):
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes([content[place] ^ value]) + content[place + 1 :])
    yield
    path.write_bytes(content)


def flips(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Random places and values, the first and the last byte among them."""
    rng = np.random.default_rng(seed)
    places = np.concatenate([[0, size - 1], rng.choice(size, count - 2, replace=False)])
    return list(zip(places.tolist(), rng.integers(1, 256, count).tolist(), strict=True))


def place_in(message: str, path: Path) -> tuple[int, int, int, int | None]:
    """First and last document, first and last byte that a message names; no last byte: from there on."""
    assert message.startswith(f"{path}: ")
    one = re.search(r": document (\d+), byte (\d+): ", message)
    if one:
        return int(one[1]), int(one[1]), int(one[2]), None
    several = re.search(r": documents (\d+) to (\d+), bytes (\d+) to (\d+): ", message)
    assert several, message
    first, last, begin, end = map(int, several.groups())
    return first, last, begin, end


def test_sound_datasets_pass(prefix):
    for decode in (False, True):
        manifest = verified(prefix, decode)
        assert (manifest.documents, len(manifest.shards)) == (800, 2)
        assert [len(shard.blocks) for shard in manifest.shards] == [32, 32]
    shutil.move(prefix.parent, prefix.parent.with_name("elsewhere"))
    verified(prefix.parent.with_name("elsewhere") / "p", True)


@pytest.mark.parametrize("shard", [0, 1])
def test_any_flipped_byte_of_the_tokens_is_found_in_its_document(prefix, shard):
    path = prefix.with_name(f"p-{shard:05d}-of-00002.bin")
    ends = np.cumsum([2 * len(document) for document in documents(prefix)[400 * shard : 400 * shard + 400]])
    assert path.stat().st_size == ends[-1]
    exact = 0
    for place, value in flips(int(ends[-1]), 80, shard):
        with flipped(path, place, value):
            message = fault_of(prefix)
        altered = int(np.searchsorted(ends, place, side="right"))
        first, last, begin, end = place_in(message, path)
        assert first <= 400 * shard + altered <= last
        if end is None:
            exact += 1
            assert begin == (ends[altered - 1] if altered else 0)
            token = re.search(r"token (\d+), at byte (\d+), ", message)
            # BPE may split the bytes around a new id in another way from a few tokens before it on.
            assert token is None or begin <= int(token[2]) == begin + 2 * int(token[1]) <= place
        else:
            block = altered // 256
            bounds = [0, *ends[255::256].tolist(), ends[-1]]
            assert (first, last) == (400 * shard + 256 * block, 400 * shard + min(256 * block + 255, 399))
            assert (begin, end) == (bounds[block], bounds[block + 1] - 1)
    assert 32 < exact < 80  # some changes within a patch leave a valid stream
    verified(prefix)


def part_of_index(place: int) -> tuple[str, int]:
    """What a byte of an index of 400 documents belongs to, and of which document."""
    for name, offset, size, count in (("length", 34, 4, 400), ("pointer", 34 + 1600, 8, 400)):
        if offset <= place < offset + size * count:
            return name, (place - offset) // size
    return "entry", min((place - 34 - 12 * 400) // 8, 399)


@pytest.mark.parametrize("shard", [0, 1])
def test_any_flipped_byte_of_an_index_is_found_in_its_document(prefix, shard):
    path = prefix.with_name(f"p-{shard:05d}-of-00002.idx")
    seen = {"length": 0, "pointer": 0, "entry": 0}
    borders = [(34 + place, 1) for place in (-1, 0, 1599, 1600, 1607, 1608, 4799, 4800, 4807, 4808)]
    for place, value in flips(path.stat().st_size, 80, shard) + borders:
        with flipped(path, place, value):
            message = fault_of(prefix)
        if place < 34:
            assert f"{path}: bytes 0 to 33 are not the header" in message
            continue
        name, document = part_of_index(place)
        seen[name] += 1
        first, last, begin, _ = place_in(message, path)
        assert first == last == 400 * shard + document
        assert begin <= place < begin + (4 if name == "length" else 8)
        assert f"its {name} is" in message or (name == "entry" and "of the document index is" in message)
    assert min(seen.values()) > 10
    verified(prefix)


def test_any_flipped_byte_of_the_manifest_is_found(prefix):
    path = Path(f"{prefix}.json")
    for place, value in flips(path.stat().st_size, 200, 5):
        with flipped(path, place, value):
            assert str(path) in fault_of(prefix)
    verified(prefix)


def test_a_large_shard_is_read_in_parts(prefix, monkeypatch):
    """Faults on both sides of a border between parts of the index, and in it."""
    monkeypatch.setattr(verify, "_DOCUMENTS", 256)
    verified(prefix, True)
    path = prefix.with_name("p-00001-of-00002.idx")
    for document in (255, 256, 257):
        for name, place in (("length", 34 + 4 * document), ("pointer", 34 + 1600 + 8 * document)):
            with flipped(path, place, 3):
                assert f"{path}: document {400 + document}, byte {place}: its {name} is" in fault_of(prefix)
        place = 34 + 4800 + 8 * document
        with flipped(path, place, 3):
            message = (
                f"{path}: document {400 + document}, byte {place}: entry {document} of the document index"
            )
            assert message in fault_of(prefix)


def test_an_index_of_other_documents_is_found(prefix):
    """Lengths and pointers that fit each other: only the SHA-256 can tell."""
    path = prefix.with_name("p-00000-of-00002.idx")
    content = bytearray(path.read_bytes())
    np.frombuffer(content, "<i4", 400, 34)[10:12] += np.array([1, -1], np.int32)
    np.frombuffer(content, "<i8", 400, 34 + 1600)[11] += 2
    path.write_bytes(content)
    assert f"{path}: documents 0 to 399: lengths and pointers agree, but" in fault_of(prefix)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is named in the manifest and missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes: must be"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes: must be"),
        (lambda path: path.write_bytes(b""), "0 bytes: must be"),
    ],
)
@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_and_truncated_files(prefix, suffix, spoil, message):
    path = prefix.with_name(f"p-00001-of-00002.{suffix}")
    spoil(path)
    found = fault_of(prefix)
    assert found.startswith(f"{path}: ") and message in found


def test_a_missing_manifest_and_an_unfinished_dataset(prefix):
    path = Path(f"{prefix}.json")
    path.unlink()
    assert f"{path}: there is no such dataset" in fault_of(prefix)
    folder = prefix.with_name("p.partial")
    folder.mkdir()
    found = fault_of(prefix)
    assert f"{folder}: is a dataset whose preprocessing was stopped half-way" in found
    assert "run the same preprocessing command again" in found


def test_a_stopped_run_is_an_unfinished_dataset(tmp_path, tokenizer):
    np.save(tmp_path / "faces.npy", grey_faces())
    arguments = (tmp_path / "p", [tmp_path / "faces.npy"], ENCODER, tokenizer)
    assert build_dataset(*arguments, task=(0, 2), progress=False) is None
    assert f"{tmp_path / 'p.partial'}: is a dataset whose preprocessing" in fault_of(tmp_path / "p")
    assert build_dataset(*arguments, task=(1, 2), progress=False) is not None
    assert verified(tmp_path / "p", True).documents == 100


def altered(change):
    """Changes document 300 of a list."""

    def change_one(documents, tokenizer):
        return [*documents[:300], change(documents[300], tokenizer), *documents[301:]]

    return change_one


def recoded(change):
    """Changes the bytes of document 300, whose tokens stay as the tokenizer gives them."""

    def change_one(document, tokenizer):
        ids = tokenizer.encode(change(tokenizer.decode(document)))
        return np.array([tokenizer.bos, *ids, tokenizer.eos], np.uint16)

    return altered(change_one)


def uncoded(document, tokenizer):
    """The same bytes, a token a byte."""
    return np.array([tokenizer.bos, *tokenizer.decode(document), tokenizer.eos], np.uint16)


def with_id(document, at, value):
    changed = document.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (altered(lambda ids, _: with_id(ids, 7, 322)), "token 7, at byte {7}, is 322, and there are 322 ids"),
        (
            altered(lambda ids, _: with_id(ids, 7, 65535)),
            "token 7, at byte {7}, is 65535, and there are 322 ids",
        ),
        (altered(lambda ids, _: ids[1:]), "token 0, at byte {0}, is .*, must be BOS, 320"),
        (altered(lambda ids, _: ids[:-1]), "token .*, must be EOS, 321"),
        (altered(lambda ids, _: ids[:1]), "token 0, at byte {0}, is 320, must be EOS, 321"),
        (altered(lambda ids, _: with_id(ids, 9, 321)), "token 9, at byte {9}, is EOS inside the document"),
        (altered(lambda ids, _: with_id(ids, 1, 320)), "token 1, at byte {1}, is BOS inside the document"),
        (altered(lambda ids, _: with_id(ids, -2, 321)), "is EOS inside the document"),
    ],
)
def test_documents_written_wrong_with_right_checksums(original, tmp_path, tokenizer, change, message):
    changed = change(documents(original), tokenizer)
    write_dataset(tmp_path / "p", changed, CODEC.to_dict(), tokenizer.to_dict())
    begin = 2 * sum(map(len, changed[:300]))
    expected = message.format(*(begin + 2 * i for i in range(10)))
    for decode in (False, True):
        found = fault_of(tmp_path / "p", decode)
        assert found.startswith(f"{tmp_path / 'p.bin'}: document 300, byte {begin}: ")
        assert re.search(expected, found), found
        assert "its checksum fits, so it was written like this" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (altered(uncoded), r"token \d+, at byte \d+, is \d+, and the tokenizer gives \d+ for the same bytes"),
        (recoded(lambda stream: stream[:-2]), "the codec finds a fault: ends before EOI, at byte"),
        (recoded(lambda stream: stream + b"\x01"), "the codec finds a fault: 1 bytes follow the end"),
        (recoded(lambda stream: b""), "the codec finds a fault: ends in MCU 0 of 4, block 0"),
    ],
)
def test_documents_that_do_not_decode_are_found_with_decode(original, tmp_path, tokenizer, change, message):
    changed = change(documents(original), tokenizer)
    write_dataset(tmp_path / "p", changed, CODEC.to_dict(), tokenizer.to_dict())
    verified(tmp_path / "p")
    found = fault_of(tmp_path / "p", decode=True)
    begin = 2 * sum(map(len, changed[:300]))
    assert found.startswith(f"{tmp_path / 'p.bin'}: document 300, byte {begin}: ")
    assert re.search(message, found), found


def test_a_decoder_that_refuses_is_told(prefix, monkeypatch):
    """What `check` lets pass and `decode` does not."""
    decode, calls = JpegCodec.decode, []

    def refuse(self, stream):
        calls.append(stream)
        if len(calls) == 402:
            raise UserError("stream", "is refused")
        return decode(self, stream)

    monkeypatch.setattr(JpegCodec, "decode", refuse)
    path = prefix.with_name("p-00001-of-00002.bin")
    assert re.search(
        f"{path}: document 401, byte .*: does not decode: stream: is refused", fault_of(prefix, True)
    )


def test_a_manifest_that_does_not_fit_itself(prefix):
    """With a checksum of its own that is right."""
    manifest = Manifest.load(f"{prefix}.json")
    first, second = manifest.shards

    def message(decode=False, **change):
        replace(manifest, **change).save(f"{prefix}.json")
        return fault_of(prefix, decode)

    path, tokens = f"{prefix}.json", prefix.with_name("p-00001-of-00002.bin")
    shards = [first, replace(second, blocks=second.blocks[16:])]
    assert f"{path}: must have a checksum for each of the 2 blocks" in message(shards=shards)
    shards = [first, replace(second, bin_sha256="0" * 64)]
    assert f"{tokens}: every block has its checksum, but" in message(shards=shards)
    shards = [first, replace(second, fingerprint="0" * 64)]
    assert f"{path}: the fingerprint is not that of {tokens}" in message(True, shards=shards)
    shards = [first, replace(second, blocks=second.blocks[:16] + "0" * 16)]
    assert f"{tokens}: documents 656 to 799, bytes " in message(shards=shards)
    changed = {**manifest.tokenizer, "vocab_size": 321}
    assert f"{path}: vocab_size 321: must be" in message(tokenizer=changed)
    codec = {"name": "none", "settings": {}}
    assert f"{path}: codec 'none': must be one of" in message(True, codec=codec)
    verified(prefix)  # tokens can be checked without the codec
    with flipped(tokens, 2, 1):
        assert f"{tokens}: document" in fault_of(prefix)


def test_a_file_that_cannot_be_read(prefix, tmp_path):
    with verify._opened(f"{prefix}.json") as file, pytest.raises(UserError, match="the file ends here"):
        file.read(10, 1 << 20)
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UserError, match=r"folder: cannot be read: Is a directory"),
        verify._opened(f"{tmp_path / 'folder'}"),
    ):
        pass


def test_an_empty_dataset_passes(tmp_path, tokenizer):
    write_dataset(tmp_path / "p", [], CODEC.to_dict(), tokenizer.to_dict())
    assert verified(tmp_path / "p", True).documents == 0


def test_documents_without_tokens_are_refused(tmp_path, original, tokenizer):
    found = documents(original)[:5]
    with indexed_writer(tmp_path / "p") as writer:
        for document in [*found[:3], found[3][:0], found[4]]:
            writer.add(document)
    Manifest(CODEC.to_dict(), tokenizer.to_dict(), [writer.shard()]).save(tmp_path / "p.json")
    message = f"{tmp_path / 'p.idx'}: document 3, byte {34 + 4 * 3}: its length is 0 tokens"
    assert message in fault_of(tmp_path / "p")


def test_the_tool(prefix):
    done = tool(prefix.name, cwd=prefix.parent)
    assert done.returncode == 0, done.stderr
    tokens = sum(map(len, documents(prefix)))
    size = sum(path.stat().st_size for path in prefix.parent.glob("p*"))
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"p: 800 documents, {tokens:,} tokens, {size:,} bytes checked, ")
    assert line.endswith(" MB/s")

    # Every dataset is looked at, whatever is wrong with another.
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    (prefix.parent / "cut.json").write_text(json.dumps(manifest))
    with flipped(prefix.with_name("p-00001-of-00002.bin"), 0, 1):
        done = tool("missing", "p", "cut", "--decode", cwd=prefix.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    faults = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert faults[0].startswith("error: missing.json: there is no such dataset")
    assert faults[1].startswith("error: p-00001-of-00002.bin: document 400, byte 0: token 0, at byte 0, is ")
    assert faults[2].startswith("error: cut.json: its checksum does not fit")
    done = tool("p", "--decode", cwd=prefix.parent)
    assert done.returncode == 0 and done.stdout.endswith(" MB/s, every document decodes\n")
    assert "800/800" in done.stderr
    assert tool(cwd=prefix.parent).returncode == 2
