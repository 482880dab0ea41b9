"""NAL units against their definition: a writer that escapes, and the order of a known stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_codec.codecs.nal import (
    Bits,
    begins_picture,
    nal_units,
    picture_starts,
    sequence_parameters,
    slice_header,
    without_units,
)


def escaped(payload: bytes) -> bytes:
    """The definition of emulation prevention (H.264, 7.4.1), byte by byte."""
    out, zeros = bytearray(), 0
    for byte in payload:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def bits_of(text: str) -> bytes:
    """The bytes of bits written as 0 and 1, filled up with zeros."""
    text = text.replace(" ", "")
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


# A unit that ends with 00 cannot be told from one that is followed by a longer start code.
UNITS = st.tuples(st.booleans(), st.sampled_from(list(range(1, 128))), st.binary(max_size=12))


@given(st.lists(UNITS, max_size=8))
def test_units_are_found_where_they_were_written(written):
    stream, expected = b"", []
    for is_long, header, payload in written:
        unit = bytes([header]) + escaped(payload + b"\x80")
        start = len(stream)
        stream += (b"\x00" if is_long else b"") + b"\x00\x00\x01" + unit
        expected.append((start, len(stream) - len(unit), len(stream), header))
    assert [tuple(unit) for unit in nal_units(stream)] == expected
    assert without_units(stream, ()) == stream
    kept = [unit for unit in nal_units(stream) if unit.type != 7]
    assert without_units(stream, (7,)) == b"".join(stream[unit.start : unit.end] for unit in kept)


@given(st.lists(st.sampled_from([6, 7, 8, 0x41, 0x65]), max_size=12), st.integers(0, 5))
def test_a_picture_begins_with_the_units_before_its_first_slice(types, seed):
    units, expected, begun = [], [], False
    position = 0
    for i, kind in enumerate(types):
        is_first = (i * 7 + seed) % 3 == 0
        body = b"\x88\x84" if is_first or kind < 32 else b"\x46\x8e"
        unit = b"\x00\x00\x01" + bytes([kind]) + body
        if kind < 32 and not begun:
            begun, start = True, position
        if kind >= 32:
            if is_first:
                expected.append(start if begun else position)
            begun = False
        units.append(unit)
        position += len(unit)
    stream = b"".join(units)
    assert picture_starts(stream) == expected
    assert sum(begins_picture(stream, unit) for unit in nal_units(stream)) == len(expected)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=20))
def test_exp_golomb_codes_are_read(values):
    text = "".join("0" * (len(bin(value + 1)) - 3) + bin(value + 1)[2:] for value in values)
    bits = Bits(escaped(bits_of(text)))
    assert [bits.ue() for _ in values] == values


def test_headers_are_read():
    # Slices of the streams in the H.264 standard's notation: first_mb 144, P of all, PPS 0, frame_num 5.
    body = bits_of("000000010010001 00110 1 0101 1")
    stream = b"\x00\x00\x01\x41" + body
    assert slice_header(stream, nal_units(stream)[0], 4) == (144, 5, 0, 5, None)
    stream = b"\x00\x00\x01\x65" + bits_of("1 0001000 1 0000 010 1")
    assert slice_header(stream, nal_units(stream)[0], 4) == (0, 7, 0, 0, 1)
    stream = b"\x00\x00\x01\x65\x88"
    with pytest.raises(ValueError, match="ends within its header"):
        slice_header(stream, nal_units(stream)[0], 4)
    # x264's own SPS of 256x144: frame_num of 4 bits, 16 x 9 macroblocks.
    sps = bytes.fromhex("6742c00bd901013a1000000300100000030060f142a480")
    assert sequence_parameters(sps) == (4, 16, 9)
    with pytest.raises(ValueError, match="profile 100, must be 66"):
        sequence_parameters(b"\x67\x64" + sps[2:])
    with pytest.raises(ValueError, match="ends within"):
        sequence_parameters(sps[:5])
