"""The automaton of JPEG scans against an oracle that decodes bit by bit, byte offset for byte offset."""

import dataclasses
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_codec._csrc import JpegFault, JpegScan
from megatron_codec.codecs.jpeg_format import Format, check_file, parse
from megatron_codec.errors import UserError
from tests.data_sources import photo_crops
from tests.jpeg_layouts import random_layout
from tests.jpeg_oracle import decode, encode, first_fault, ranges

GREY = "grey"
SAMPLINGS = ["4:2:0", "4:2:2", "4:4:4", GREY]


def save(picture: Image.Image, sampling: str = "4:2:0", quality: int = 25, **options) -> bytes:
    buffer = io.BytesIO()
    if sampling == GREY:
        picture.convert("L").save(buffer, "JPEG", quality=quality, **options)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=sampling, **options)
    return buffer.getvalue()


def split(file: bytes) -> tuple[Format, bytes]:
    layout = parse(file)
    return layout, file[layout.scan_offset :]


def extremes(size: int) -> list[Image.Image]:
    """Pictures whose coefficients are the largest: black, white, noise of black and white, stripes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (3, size, size, 3)) * 255
    stripes = np.broadcast_to(np.arange(size)[:, None, None] % 2 * 255, (size, size, 3))
    blocks = np.kron(rng.integers(0, 2, (size // 8, size // 8)), np.ones((8, 8), int))[..., None] * [
        255,
        255,
        255,
    ]
    arrays = [np.zeros((size, size, 3)), np.full((size, size, 3), 255), *noise, stripes, blocks]
    arrays.append(rng.integers(0, 256, (size, size, 3)))
    return [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def agree(layout: Format, scan: bytes, **flags: bool) -> int | None:
    """Where automaton and oracle both see the first fault."""
    found = layout.scan(**flags).check(scan)
    offset = None if found is None else found[1]
    assert offset == first_fault(layout, scan, **flags), (found, scan.hex(), flags)
    if found and found[0] == JpegFault.NONE:
        assert offset == len(scan)
    return offset


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("quality", [1, 25, 95])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"optimize": True}])
def test_real_pictures_are_whole_scans_of_the_same_bytes(sampling, quality, options):
    pictures = [*photo_crops(2, 32), *extremes(16)[:4]]
    for picture in pictures:
        layout, scan = split(save(picture, sampling, quality, **options))
        for flags in ({}, {"canonical": True, "in_range": True}):
            assert agree(layout, scan, **flags) is None
        assert encode(layout, decode(layout, scan)) == scan


@pytest.mark.parametrize("quality", [1, 5, 50, 95, 100])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_picture_is_out_of_range(sampling, quality):
    for picture in [*extremes(64), *photo_crops(20, 64)]:
        report = check_file(save(picture, sampling, quality), canonical=True, in_range=True)
        assert report.valid, report


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_damaged_scans_fail_at_the_byte_of_the_oracle(sampling):
    rng = random.Random(sampling)
    seen = set()
    for number, picture in enumerate(photo_crops(8, 32)):
        options = [{}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 2}, {"optimize": True}]
        layout, scan = split(save(picture, sampling, 20, **options[number % 4]))
        for _ in range(8):
            damaged = bytearray(scan)
            for _ in range(rng.randint(1, 2)):
                place = rng.randrange(len(damaged))
                patch = rng.choice([b"", bytes([rng.randrange(256)]), b"\xff", b"\xff\x00", b"\xff\xd9"])
                damaged[place : place + rng.randint(0, 2)] = patch
            flags = {"canonical": rng.random() < 0.5, "in_range": rng.random() < 0.5}
            seen.add(agree(layout, bytes(damaged), **flags) is None)
    assert seen == {True, False}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SAMPLINGS), st.binary(max_size=60), st.booleans(), st.booleans())
def test_any_bytes_fail_at_the_byte_of_the_oracle(sampling, scan, canonical, in_range):
    layout, _ = split(save(Image.new("RGB", (48, 16)), sampling, 3, restart_marker_blocks=2))
    agree(layout, scan, canonical=canonical, in_range=in_range)


def test_random_tables_and_bytes_fail_at_the_byte_of_the_oracle():
    """Bytes from a walk along the oracle's verdict, so that scans get long."""
    rng = random.Random(1)
    offsets, layouts = [], 0
    while layouts < 60:
        layout = random_layout(rng)
        if layout is None:
            continue
        layouts += 1
        for flags in ({}, {"canonical": True}):
            try:
                automaton = layout.scan(**flags)
            except UserError:
                continue
            scan = bytearray()
            while len(scan) < 24:
                byte = rng.choice([rng.randrange(256), 0xFF, 0x00, 0xD0, 0xD9])
                found = automaton.check(bytes((*scan, byte)))
                if found is None or found[1] > len(scan):
                    scan.append(byte)
                if found is None or rng.random() < 0.02:
                    break
            scan += rng.randbytes(2)
            offsets.append(agree(layout, bytes(scan), **flags))
    assert max(offset or 0 for offset in offsets) > 10


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_run_of_zeros_before_the_end_of_a_block_is_not_canonical(sampling):
    for picture in photo_crops(3, 32):
        layout, scan = split(save(picture, sampling, 50, restart_marker_blocks=1))
        mcus = decode(layout, scan)
        for runs in (1, 2, 3):
            dressed = encode(layout, mcus, runs)
            assert agree(layout, dressed) is None
            assert decode(layout, dressed) == mcus
            assert encode(layout, mcus) == scan != dressed
            offset = agree(layout, dressed, canonical=True)
            differs = next(i for i, pair in enumerate(zip(scan, dressed, strict=False)) if len(set(pair)) > 1)
            # Codes of a run have 11 bits at most, and it is the end of the block behind them that is refused.
            assert offset is not None and differs <= offset <= differs + 2 * runs + 2


def test_a_coefficient_beyond_its_range_is_named():
    layout, scan = split(save(photo_crops(1, 16)[0], "4:4:4", 50))
    mcus = decode(layout, scan)
    limits = [ranges(c) for c in layout.components]
    for block, k in [(0, 0), (1, 0), (2, 5), (0, 63)]:
        for side, direction in ((0, -1), (1, 1)):
            changed = [[list(b) for b in mcu] for mcu in mcus]
            changed[2][block][k] = limits[block][k][side]
            assert agree(layout, encode(layout, changed), in_range=True) is None
            changed[2][block][k] += direction
            assert agree(layout, encode(layout, changed), in_range=False) is None
            fault, _, place = layout.scan(in_range=True).check(encode(layout, changed))  # type: ignore
            # Where no size of a coefficient is within its range, its code is none to begin with.
            assert fault in (JpegFault.RANGE, JpegFault.CODE) and place[:2] == (2, block)
            if fault == JpegFault.RANGE:
                assert place[2] == k


def test_every_fault_has_its_name():
    layout, scan = split(save(photo_crops(1, 32)[0], "4:2:0", 25, restart_marker_blocks=1))
    automaton = layout.scan()
    first = scan.index(b"\xff\xd0")
    assert scan[first - 1] & 1  # at least one bit of padding
    inner = scan.index(b"\xff\x00") if b"\xff\x00" in scan else None
    cases = {
        (JpegFault.NONE, len(scan) - 1): scan[:-1],
        (JpegFault.NONE, 0): b"",
        (JpegFault.MARKER, first + 1): scan[: first + 1] + b"\xd1" + scan[first + 2 :],
        (JpegFault.MARKER, first): scan[:first] + b"\x00" + scan[first:],
        (JpegFault.AFTER_END, len(scan)): scan + b"\x00",
        (JpegFault.PADDING, first - 1): scan[: first - 1] + bytes([scan[first - 1] - 1]) + scan[first:],
        (JpegFault.STUFFING, 1): b"\xff\xff",
        (JpegFault.CODE, 2): b"\xff\x00\xff",
    }
    if inner is not None:
        cases[JpegFault.STUFFING, inner + 1] = scan[: inner + 1] + b"\x01" + scan[inner + 2 :]
    for (fault, offset), broken in cases.items():
        assert automaton.check(broken)[:2] == (fault, offset), broken.hex()  # type: ignore
        assert first_fault(layout, broken) == offset


def test_a_layout_without_a_whole_mcu_is_refused():
    layout, _ = split(save(Image.new("RGB", (16, 16))))
    no_dc = dataclasses.replace(layout.components[0], dc=((1, *[0] * 15), b"\x0c"))
    no_end = dataclasses.replace(layout.components[0], ac=((1, *[0] * 15), b"\xf0"))
    for wrong in (no_dc, no_end):
        with pytest.raises(UserError, match="no codes for a whole MCU"):
            dataclasses.replace(layout, components=(wrong, *layout.components[1:])).scan()
    table = ((1, *[0] * 15), b"\x00")
    scan = {"blocks": [0], "dc": [table], "ac": [table], "mcus": 1, "interval": 0, "canonical": False}
    for changes, message in [
        ({"blocks": [1]}, "block of component 1"),
        ({"blocks": []}, "0 blocks"),
        ({"mcus": 0}, "0 MCUs"),
        ({"interval": -1}, "restart interval -1"),
        ({"dc": []}, "0 components"),
        ({"ac": [((3, *[0] * 15), b"\x00\x01\x02")]}, "more codes"),
        ({"ac": [((1, 1, *[0] * 14), b"\x00")]}, "than symbols"),
    ]:
        with pytest.raises(UserError, match=message):
            JpegScan(**{**scan, "ranges": [], **changes})
