"""Every kind of input, with real files: which pictures it gives, in which order, and cut into which parts."""

import gzip
import io
import os
import subprocess
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import (
    PictureEncoder,
    PillowDecoder,
    Selection,
    build_dataset,
    iterate_streams,
    open_inputs,
)
from megatron_codec.preprocessing.decoders import picture_suffixes
from megatron_codec.preprocessing.sources import Item, held_out
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import grey_faces, photo_crops, write_photo_folder

CODEC = JpegCodec(64)
WHOLE = PictureEncoder(CODEC, decoder=PillowDecoder(scaled_decode=False))
PADDED = PictureEncoder(JpegCodec(32, remove_head=True), Geometry("pad"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def paths(photos) -> list[Path]:
    return [path for path in sorted(photos.rglob("*.*")) if path.suffix != ".csv" and path.name[0] != "."]


@pytest.fixture
def expected(paths) -> list[bytes]:
    return [CODEC.encode(Image.open(path)) for path in paths]


def streams(*inputs, encoder=WHOLE, **selection) -> list[bytes]:
    return list(iterate_streams(inputs, encoder, progress=False, **selection))


def items(tmp_path, *inputs, **selection) -> list[Item]:
    return list(open_inputs(Selection(inputs, **selection), picture_suffixes(), tmp_path / "spool"))


def assert_cuts_into_parts(tmp_path, *inputs, **selection):
    """Any parts in a row give the items of the whole, at positions of their own."""
    source = open_inputs(Selection(inputs, **selection), picture_suffixes(), tmp_path / "spool")
    whole = [(item.label, item.position) for item in source]
    for count in (1, 2, 3, 7):
        bounds = [i * source.size // count for i in range(count + 1)]
        found = []
        for start, stop in pairwise(bounds):
            part = source.part(start, stop)
            assert part.size == stop - start
            found += [(item.label, item.position + start) for item in part]
            halves = [*part.part(0, part.size // 2), *part.part(part.size // 2, part.size)]
            assert [item.label for item in halves] == [item.label for item in part]
        assert found == whole
    assert all(0 <= position < source.size for _, position in whole)
    assert [position for _, position in whole] == sorted(position for _, position in whole)


def test_folders_files_and_lists(tmp_path, photos, paths, expected):
    assert len(expected) == 20
    assert streams(photos) == expected
    assert streams(*paths[3:6]) == expected[3:6]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths[::-1])) + "\n\n")
    assert streams(tmp_path / "list.txt") == expected[::-1]
    mixed = [paths[7], photos / "class 2", tmp_path / "list.txt"]
    assert streams(*mixed) == [expected[7], *expected[14:], *expected[::-1]]
    assert_cuts_into_parts(tmp_path, photos)
    assert_cuts_into_parts(tmp_path, *mixed)
    assert_cuts_into_parts(tmp_path, *mixed, limit=11)
    assert_cuts_into_parts(tmp_path, *mixed, subset="train", hold_out=0.4)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_tar_files_written_by_tar(tmp_path, photos, expected, form):
    """In the order of the tar file; hidden files and other endings are passed over."""
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*") if path.is_file())
    (tmp_path / "names").write_text("\n".join(names))
    for name, option in (("plain.tar", "-c"), ("small.tar.gz", "-cz"), ("small.tar.xz", "-cJ")):
        command = ["tar", f"--format={form}", option, "-f", tmp_path / name, "-T", tmp_path / "names"]
        subprocess.run(command, cwd=photos, check=True)
        assert streams(tmp_path / name) == expected
        assert_cuts_into_parts(tmp_path, tmp_path / name)
    assert items(tmp_path, tmp_path / "plain.tar")[0].name == "plain.tar/class 0/00.jpg"
    assert_cuts_into_parts(tmp_path, tmp_path / "plain.tar", limit=7)
    assert_cuts_into_parts(tmp_path, tmp_path / "plain.tar", photos, tmp_path / "small.tar.gz")


def test_shards_of_webdataset_in_a_folder_and_in_a_list(tmp_path, paths, expected):
    """Samples are picture and label side by side; each shard is read after the other."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        with tarfile.open(shards / f"{shard:06d}.tar", "w") as tar:
            for key, path in enumerate(paths[shard * 7 : shard * 7 + 7]):
                for suffix, content in (("cls", b"3"), (path.suffix[1:], path.read_bytes())):
                    member = tarfile.TarInfo(f"{key:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    assert streams(shards) == expected
    (tmp_path / "list.txt").write_text(f"shards/000001.tar\n{paths[2]}\nshards/000000.tar\n")
    assert streams(tmp_path / "list.txt") == [*expected[7:14], expected[2], *expected[:7]]
    assert_cuts_into_parts(tmp_path, shards)
    assert_cuts_into_parts(tmp_path, tmp_path / "list.txt", limit=9)
    (tmp_path / "list.txt").write_text("shards/000003.tar\n")
    with pytest.raises(UserError, match=r"000003\.tar: is named in .*list\.txt and does not exist"):
        items(tmp_path, tmp_path / "list.txt")


def test_damaged_tar_files_are_counted(tmp_path, photos, expected):
    """Pictures before the fault are taken, the fault is one skipped item, whoever meets it."""
    subprocess.run(["tar", "-cf", tmp_path / "whole.tar", "."], cwd=photos, check=True)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        pictures = [m for m in tar if m.isfile() and Path(m.name).suffix != ".csv" and "._" not in m.name]
    cuts = {
        "within a header": (pictures[9].offset + 100, 9, 1),
        "within a picture": (pictures[9].offset_data + 50, 9, 2),
        "between pictures": (pictures[9].offset, 9, 1),
        "at the start": (0, 0, 1),
    }
    trained = Tokenizer.train(expected, codec=CODEC.to_dict())
    for name, (size, documents, skipped) in cuts.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:size])
        hashes = set()
        for workers in (1, 2, 3):
            prefix = tmp_path / f"{name} {workers}"
            inputs = [tmp_path / f"{name}.tar", photos / "class 1"]
            manifest = build_dataset(prefix, inputs, WHOLE, trained, workers=workers, progress=False)
            assert manifest is not None and manifest.documents == documents + 7
            reasons = manifest.skipped["reasons"]
            assert manifest.skipped["count"] == skipped
            assert reasons["tar file cut short or damaged"] == 1
            assert f"{name}.tar" in manifest.skipped["first"][-1]["name"]
            hashes.add((manifest.hash, str(manifest.skipped)))
        assert len(hashes) == 1
    broken = bytearray(whole)
    broken[pictures[5].offset + 5] ^= 255  # the header's checksum notices
    (tmp_path / "header.tar").write_bytes(broken)
    assert len(streams(tmp_path / "header.tar")) == 5
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-9000])
    assert 0 < len(streams(tmp_path / "cut.tar.gz")) < 20


def test_names_that_come_twice(tmp_path, paths, expected, capsys):
    (tmp_path / "list.txt").write_text("\n".join(map(str, [paths[0], paths[1], paths[0], paths[0]])))
    assert streams(tmp_path / "list.txt") == expected[:2]
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for path in (paths[0], paths[1], paths[0]):
            tar.add(path, "./same.jpg" if path == paths[0] else "b.png")
    assert streams(tmp_path / "twice.tar") == expected[:2]
    found = []
    for source in ("list.txt", "twice.tar"):
        for item in open_inputs(Selection((tmp_path / source,)), picture_suffixes(), tmp_path / "spool"):
            try:
                item.read()
            except Exception as error:
                found.append(str(error))
    assert found == ["is named before in the same list"] * 2 + ["is named before in the same tar file"]
    # A folder within a folder that is given as well is wanted twice.
    assert len(streams(paths[0].parents[1], paths[0].parent)) == 27


def test_idx_npy_and_npz_arrays(tmp_path):
    faces = grey_faces()
    colour = np.stack([np.asarray(crop) for crop in photo_crops(5, 32)])
    for name, array in (("faces", faces), ("colour", colour)):
        header = bytes([0, 0, 8, array.ndim if array.ndim == 3 else 4])
        header += np.array(array.shape, ">u4").tobytes()
        (tmp_path / f"{name}-idx").write_bytes(header + array.tobytes())
        (tmp_path / f"{name}-idx.gz").write_bytes(gzip.compress(header + array.tobytes()))
        np.save(tmp_path / f"{name}.npy", array)
    everything = {"x_train": faces, "y_train": np.arange(100), "x_test": colour, "scores": np.ones((2, 3, 4))}
    np.savez(tmp_path / "both.npz", **everything)
    np.savez_compressed(tmp_path / "small.npz", **everything)
    padded = np.pad(faces, ((0, 0), (3, 4), (3, 4)))
    grey = [PADDED.codec.encode(face) for face in padded]
    rgb = [PADDED.codec.encode(picture) for picture in colour]
    for name in ("faces-idx", "faces-idx.gz", "faces.npy"):
        assert streams(tmp_path / name, encoder=PADDED) == grey
        assert_cuts_into_parts(tmp_path, tmp_path / name)
    for name in ("colour-idx", "colour-idx.gz", "colour.npy"):
        assert streams(tmp_path / name, encoder=PADDED) == rgb
    for name in ("both.npz", "small.npz"):
        assert streams(tmp_path / name, encoder=PADDED) == grey + rgb
        assert_cuts_into_parts(tmp_path, tmp_path / name)
    assert items(tmp_path, tmp_path / "both.npz")[100].name == "both.npz/x_test[0]"
    trained = Tokenizer.train(grey, codec=PADDED.codec.to_dict())
    arrays = [tmp_path / "faces-idx.gz", tmp_path / "small.npz"]
    for workers in (1, 2):
        prefix = tmp_path / f"p{workers}"
        build_dataset(prefix, arrays, PADDED, trained, workers=workers, progress=False)
        dataset = CodecDataset.open(prefix)
        found = [trained.decode(dataset.document(i)) for i in range(dataset.num_documents)]
        assert found == grey + grey + rgb
    names = [item.name for item in items(tmp_path, tmp_path / "faces-idx.gz", limit=10)]
    assert names == [f"faces-idx[{10 * i}]" for i in range(10)]


def test_names_in_any_encoding(tmp_path, photos):
    source = next(photos.rglob("*.png"))
    for name in (b"gr\xc3\xbcn.png", b"gr\xfcn.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(source.read_bytes())
    (tmp_path / "list.txt").write_bytes(b"gr\xc3\xbcn.png\ngr\xfcn.png\nnone\xfc.png")
    encoder = PictureEncoder(JpegCodec(32))
    trained = Tokenizer.train(iterate_streams([tmp_path], encoder), codec=encoder.codec.to_dict())
    manifest = build_dataset(tmp_path / "p", [tmp_path / "list.txt"], encoder, trained)
    assert manifest is not None and manifest.documents == 2
    (skipped,) = CodecDataset.open(tmp_path / "p").manifest.skipped["first"]
    assert os.fsencode(skipped["name"]).endswith(b"none\xfc.png")
    assert isinstance(held_out(skipped["name"], 0.5), bool)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path, photos):
    (tmp_path / "some").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "some" / name).write_bytes(next(photos.rglob("*.png")).read_bytes())
    (tmp_path / "some" / "a.png").chmod(0)
    trained = Tokenizer.train(streams(photos), codec=CODEC.to_dict())
    manifest = build_dataset(tmp_path / "p", [tmp_path / "some"], WHOLE, trained)
    assert manifest is not None and manifest.skipped["reasons"] == {"no permission": 1}
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="locked: cannot be searched"):
        items(tmp_path, tmp_path)


def test_limit_spreads_over_all_inputs(tmp_path, photos):
    whole = items(tmp_path, photos, photos / "class 1")
    assert len(whole) == 27
    some = items(tmp_path, photos, photos / "class 1", limit=9)
    assert [item.label for item in some] == [whole[3 * i].label for i in range(9)]
    assert len(items(tmp_path, photos, limit=1000)) == 20


def test_held_out_pictures_are_the_same_everywhere(tmp_path, photos):
    def names(subset, folder=photos):
        return {item.name for item in items(tmp_path, folder, subset=subset, hold_out=0.3)}

    everything = {item.name for item in items(tmp_path, photos)}
    assert names("train") | names("test") == everything and not names("train") & names("test")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in everything:
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_bytes((photos / name).read_bytes())
    assert names("test", moved) == names("test")
    share = sum(held_out(f"train-images-idx3-ubyte[{i}]", 0.1) for i in range(20000)) / 20000
    assert abs(share - 0.1) < 0.0085  # four standard deviations
    # Datasets that exist rely on these.
    found = "".join("ny"[held_out(f"{i}.jpg", 0.5)] for i in range(8))
    assert found == "yynnnyyn"
