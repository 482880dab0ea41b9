"""Datasets on disk: against a stock Megatron-Core, and against files that are missing or altered."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_codec.data import CodecDataset, Manifest, write_dataset
from megatron_codec.data.indexed import indexed_writer
from megatron_codec.data.manifest import Fingerprint, with_checksum
from megatron_codec.errors import UserError

CODEC = {"name": "jpeg", "settings": {"image_size": 32, "quality": 25, "remove_head": False}}
TOKENIZER = {"format": "test", "vocab_size": 320, "merges": [[1, 2]], "hash": "0" * 64}


def random_documents(count: int, seed: int = 0, longest: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 65536, rng.integers(2, longest)).astype(np.uint16) for _ in range(count)]


def write_shards(prefix, documents, cuts) -> Manifest:
    """The same documents in several shards."""
    bounds = [0, *cuts, len(documents)]
    shards = []
    for i in range(len(bounds) - 1):
        with indexed_writer(f"{prefix}-{i:05d}-of-{len(bounds) - 1:05d}") as writer:
            for document in documents[bounds[i] : bounds[i + 1]]:
                writer.add(document)
        shards.append(writer.shard())
    manifest = Manifest(codec=CODEC, tokenizer=TOKENIZER, shards=shards)
    manifest.save(f"{prefix}.json")
    return manifest


@pytest.mark.parametrize("cuts", [[], [40], [0, 1, 99]])
def test_documents_come_back(tmp_path, cuts):
    documents = random_documents(100)
    write_shards(tmp_path / "p", documents, cuts)
    dataset = CodecDataset.open(tmp_path / "p")
    assert dataset.num_documents == 100
    assert dataset.num_tokens == sum(map(len, documents))
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    for i, document in enumerate(documents):
        read = dataset.document(i)
        assert read.dtype == np.uint16
        np.testing.assert_array_equal(read, document)
    for index in (-1, 100):
        with pytest.raises(IndexError):
            dataset.document(index)


STOCK = """
import sys
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

builder = IndexedDatasetBuilder("stock.bin", dtype=np.uint16)
for shard in sys.argv[1:]:
    for mmap in (True, False):
        dataset = IndexedDataset(shard, mmap=mmap)
        assert dataset.index.dtype == np.uint16
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
        documents = [dataset[i].astype(np.int32) for i in range(len(dataset))]
        np.testing.assert_array_equal(dataset.get(3, offset=1), documents[3][1:])
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
builder.finalize("stock.idx")
"""


def test_a_stock_megatron_core_reads_each_shard_and_writes_the_same_bytes(tmp_path):
    documents = random_documents(50)
    shards = [shard.name for shard in write_shards(tmp_path / "p", documents, [20]).shards]
    # In a process of its own, so that nothing of ours, least of all platform.py, has touched it.
    subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, *shards], cwd=tmp_path, check=True)
    write_dataset(tmp_path / "whole", documents, CODEC, TOKENIZER)
    for suffix in ("bin", "idx"):
        stock, ours = (tmp_path / f"{name}.{suffix}" for name in ("stock", "whole"))
        assert ours.read_bytes() == stock.read_bytes()


BLEND = """
import sys
import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

class Tokenizer:
    unique_identifiers = {"class": "none"}
    eod, vocab_size = 0, 65536

torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
shards = sys.argv[1:]
config = GPTDatasetConfig(
    random_seed=1, sequence_length=64, blend=(shards, [3.0, 1.0]), split="1,0,0", tokenizer=Tokenizer(),
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    path_to_cache="cache",
)
train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [200, 0, 0], lambda: True, config).build()
found = [0, 0]
for i in range(200):
    sample = np.append(train[i]["tokens"].numpy(), train[i]["labels"].numpy()[-1])
    of = int(sample[0]) // 10000
    dataset = IndexedDataset(shards[of])
    ends = {int(dataset[j][-1]) for j in range(len(dataset))}
    starts = {int(dataset[j][0]) for j in range(len(dataset))}
    for token, following in zip(sample, sample[1:]):
        assert following in starts if int(token) in ends else following == token + 1
    found[of] += 1
print(found)
"""


def test_a_stock_megatron_core_blends_the_shards(tmp_path):
    """Weights 3 to 1 over two shards of a dataset, through GPTDataset and its blending."""
    rng = np.random.default_rng(0)
    documents = []
    for corpus in (0, 10000):  # the tokens count up, so that a sample shows where each of them comes from
        ends = corpus + np.cumsum(rng.integers(2, 60, 40))
        documents += np.split(np.arange(corpus, ends[-1], dtype=np.uint16), ends[:-1] - corpus)
    shards = [shard.name for shard in write_shards(tmp_path / "p", documents, [40]).shards]
    command = [sys.executable, "-W", "ignore", "-c", BLEND, *shards]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[150, 50]"


def test_split_and_views(tmp_path):
    documents = random_documents(1000)
    write_shards(tmp_path / "p", documents, [333, 700])
    dataset = CodecDataset.open(tmp_path / "p")
    parts = dataset.split([969, 30, 1])
    assert [part.num_documents for part in parts] == [969, 30, 1]
    assert [part.num_documents for part in dataset.split([1, 1, 1])] == [333, 334, 333]
    assert [part.num_documents for part in dataset.split([0.5, 0, 0.5])] == [500, 0, 500]
    together = [part.document(i) for part in parts for i in range(part.num_documents)]
    for expected, read in zip(documents, together, strict=True):
        np.testing.assert_array_equal(expected, read)
    inner = parts[0].view(300, 800).view(10, 420)
    assert inner.lengths.tolist() == [len(document) for document in documents[310:720]]
    assert inner.num_tokens == sum(inner.lengths)
    assert inner.manifest.hash == dataset.manifest.hash
    with pytest.raises(IndexError):
        parts[1].document(30)
    for weights in ([], [0, 0], [1, -1]):
        with pytest.raises(UserError, match="split"):
            dataset.split(weights)


def test_pickling_reopens_instead_of_copying(tmp_path):
    write_dataset(tmp_path / "p", random_documents(500, longest=400), CODEC, TOKENIZER)
    view = CodecDataset.open(tmp_path / "p").view(100, 400)
    content = pickle.dumps(view)
    assert len(content) < 1000
    np.testing.assert_array_equal(pickle.loads(content).document(7), view.document(7))


def test_manifest_hash_is_that_of_the_documents(tmp_path):
    documents = random_documents(60)
    one = write_dataset(
        tmp_path / "one", documents, CODEC, TOKENIZER, command=["a"], versions={"pillow": "1"}
    )
    assert write_shards(tmp_path / "many", documents, [5, 5, 31]).hash == one.hash
    assert Manifest.load(tmp_path / "many.json").hash == one.hash
    others = {
        "order": (documents[::-1], CODEC, TOKENIZER),
        "fewer": (documents[:-1], CODEC, TOKENIZER),
        "token": ([documents[0] ^ 1, *documents[1:]], CODEC, TOKENIZER),
        "borders": ([np.concatenate(documents[:2]), *documents[2:]], CODEC, TOKENIZER),
        "codec": (documents, {**CODEC, "settings": {}}, TOKENIZER),
        "tokenizer": (documents, CODEC, {**TOKENIZER, "hash": "1" * 64}),
    }
    hashes = [write_dataset(tmp_path / name, *parts).hash for name, parts in others.items()]
    assert len({one.hash, *hashes}) == len(others) + 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=8), max_size=12), st.integers(0, 12))
def test_fingerprint_does_not_depend_on_the_cut(documents, cut):
    whole, left, right = Fingerprint(), Fingerprint(), Fingerprint()
    for i, document in enumerate(documents):
        whole.add(document)
        (left if i < cut else right).add(document)
    assert left + right == whole


def test_manifest_keeps_everything(tmp_path):
    manifest = write_dataset(
        tmp_path / "p",
        random_documents(3),
        CODEC,
        TOKENIZER,
        skipped={"count": 1, "reasons": {"cut short": 1}, "first": []},
        source={"inputs": ["photos"], "geometry": "crop"},
        versions={"pillow": "13.0.0"},
        command=["tools/preprocess_jpeg.py", "--input", "photos"],
    )
    assert Manifest.load(tmp_path / "p.json") == manifest
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["documents"] == 3 and content["hash"] == manifest.hash
    for shard in content["shards"]:
        for suffix in ("bin", "idx"):
            file = tmp_path / f"{shard['name']}.{suffix}"
            printed = subprocess.check_output(["sha256sum", file], text=True)
            assert printed.split()[0] == shard[f"{suffix}_sha256"]


def test_nothing_appears_when_writing_fails(tmp_path):
    def documents():
        yield from random_documents(2000)
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / "p", documents(), CODEC, TOKENIZER)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="uint16"):
        write_dataset(tmp_path / "p", [np.arange(5)], CODEC, TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def damage(path, position, value):
    content = bytearray(path.read_bytes())
    content[position] ^= value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "p.json").unlink(), "p.json: there is no such dataset"),
        (lambda folder: (folder / "p.bin").unlink(), "p.bin: is named in the manifest and missing"),
        (lambda folder: (folder / "p.idx").unlink(), "p.idx: is named in the manifest and missing"),
        (lambda folder: (folder / "p.bin").write_bytes(b"abc"), "p.bin: 3 bytes: must be .* bytes"),
        (lambda folder: (folder / "p.idx").write_bytes(b""), "p.idx: 0 bytes: must be .* bytes"),
        (lambda folder: damage(folder / "p.idx", 3, 1), "p.idx: bytes 0 to 33 are not the header"),
        (lambda folder: damage(folder / "p.idx", 17, 4), "p.idx: bytes 0 to 33 are not the header"),
        (lambda folder: (folder / "p.json").write_text("{"), "p.json: is not the whole manifest"),
        (lambda folder: (folder / "p.json").write_text("[1]"), "p.json: is not the whole manifest"),
        (
            lambda folder: (folder / "p.json").write_bytes(b"\xff\xfe\x00"),
            "p.json: is not the whole manifest",
        ),
        (lambda folder: rewrite(folder, "version", 1), "must be megatron_codec dataset 2"),
        (lambda folder: damage(folder / "p.json", -9, 1), "p.json: its checksum does not fit"),
        (lambda folder: swap(folder, "\n", " "), "p.json: its checksum does not fit"),
        (lambda folder: (folder / "p.json").write_text("{}"), "p.json: is not the whole manifest"),
        (lambda folder: rewrite(folder, "documents", 6), "do not fit its shards"),
        (lambda folder: rewrite(folder, "codec", {}), "do not fit its shards"),
        (lambda folder: rewrite(folder, "shards", [{"name": "p"}]), "is damaged"),
        (lambda folder: rewrite(folder, "tokenizer", {}), "is damaged"),
        (lambda folder: rewrite(folder, "shards", None), "is damaged"),
    ],
)
def test_altered_files_are_refused(tmp_path, spoil, message):
    write_dataset(tmp_path / "p", random_documents(5), CODEC, TOKENIZER)
    CodecDataset.open(tmp_path / "p")
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        CodecDataset.open(tmp_path / "p")


def rewrite(folder, key, value):
    """As a program would that computes the checksum but not what the manifest says."""
    content = json.loads((folder / "p.json").read_text())
    del content["checksum"]
    (folder / "p.json").write_bytes(with_checksum(content | {key: value}))


def swap(folder, old, new):
    text = (folder / "p.json").read_text()
    (folder / "p.json").write_text(text.replace(old, new, 1))


def test_shards_move_together(tmp_path):
    documents = random_documents(20)
    write_shards(tmp_path / "old" / "p", documents, [7])
    shutil.move(tmp_path / "old", tmp_path / "new")
    np.testing.assert_array_equal(CodecDataset.open(tmp_path / "new" / "p").document(19), documents[19])


def test_data_needs_no_torch():
    code = "import sys, megatron_codec.data; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
