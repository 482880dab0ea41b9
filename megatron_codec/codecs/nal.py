"""The NAL units of an H.264 byte stream (ITU-T H.264, clause 7.3.1 and annex B), as far as a codec that does
not decode has to know them: where they lie, what they are, and the first fields of parameter sets and slices.
"""

import re
from functools import cache
from typing import NamedTuple

SLICE, IDR_SLICE, SEI, SPS, PPS = 1, 5, 6, 7, 8  # nal_unit_type, table 7-1
P, I = 0, 2  # slice_type modulo 5, table 7-6

_START_CODE = re.compile(b"\x00?\x00\x00\x01")
_START_OF_PICTURE = re.compile(b"\x00?\x00\x00\x01[\x01\x05\x21\x25\x41\x45\x61\x65][\x80-\xff]")
_START_OF_IDR = re.compile(b"\x00?\x00\x00\x01[\x05\x25\x45\x65][\x80-\xff]")
_NO_SLICE = re.compile(b"\x00\x00\x01(?:[^\x01\x05\x21\x25\x41\x45\x61\x65]|\\Z)", re.DOTALL)
_HEADER_BYTES = 16  # hold the fields that are read of a slice header, emulation prevention included


class NalUnit(NamedTuple):
    """One NAL unit of a stream; offsets in bytes.

    Args:
        start: of its start code, which has 3 or 4 bytes.
        begin: of the unit itself, its header byte.
        end: behind its last byte.
        header: the first byte: forbidden_zero_bit, nal_ref_idc (2 bits), nal_unit_type (5 bits); -1 for a
            unit without a byte.
    """

    start: int
    begin: int
    end: int
    header: int

    @property
    def type(self) -> int:
        """nal_unit_type."""
        return self.header & 31

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice of a picture."""
        return self.header >= 0 and self.type in (SLICE, IDR_SLICE)


def nal_units(stream: bytes) -> list[NalUnit]:
    """All NAL units, in order. What lies before the first start code is in none of them."""
    codes = [match.span() for match in _START_CODE.finditer(stream)]
    ends = [start for start, _ in codes[1:]] + [len(stream)] * bool(codes)
    return [
        NalUnit(start, begin, end, stream[begin] if begin < end else -1)
        for (start, begin), end in zip(codes, ends, strict=True)
    ]


def begins_picture(stream: bytes, unit: NalUnit) -> bool:
    """Whether it is a slice with first_mb_in_slice 0, which is coded as a single 1 bit."""
    return unit.is_slice and unit.begin + 1 < unit.end and stream[unit.begin + 1] >= 0x80


def picture_starts(stream: bytes) -> list[int]:
    """Offset of each picture: of the start code of its first slice, or of the parameter sets and other units
    that lie between the picture before it and that slice."""
    starts = []
    for match in _START_OF_PICTURE.finditer(stream):
        start = match.start()
        while (before := _last_unit(stream, start)) is not None and not before.is_slice:
            start = before.start
        starts.append(start)
    return starts


def _last_unit(stream: bytes, end: int) -> NalUnit | None:
    """The unit that ends there."""
    code = stream.rfind(b"\x00\x00\x01", 0, end)
    if code < 0:
        return None
    start = code - 1 if code and stream[code - 1] == 0 else code
    return NalUnit(start, code + 3, end, stream[code + 3] if code + 3 < end else -1)


def without_units(stream: bytes, types: tuple[int, ...]) -> bytes:
    """The stream without its units of these types."""
    parts, position = [], 0
    for match in _starts_of(types).finditer(stream):
        parts.append(stream[position : match.start()])
        following = _START_CODE.search(stream, match.end())
        position = following.start() if following else len(stream)
    return b"".join([*parts, stream[position:]])


@cache
def _starts_of(types: tuple[int, ...]) -> re.Pattern[bytes]:
    headers = b"|".join(re.escape(bytes([header])) for header in range(256) if header & 31 in types)
    return re.compile(b"\x00?\x00\x00\x01(?:" + (headers or b"(?!)") + b")")


def with_parameter_sets(stream: bytes, head: bytes) -> bytes:
    """The slices of a stream, with these parameter sets (and their start codes) before the first and before
    every IDR picture, and nothing else."""
    slices = stream.replace(head, b"")
    if _NO_SLICE.search(slices) or not _START_CODE.match(slices):
        units = nal_units(stream)
        slices = b"".join(stream[unit.start : unit.end] for unit in units if unit.is_slice)
    if not slices:
        return b""
    first = _START_OF_IDR.match(slices)
    return (b"" if first else head) + _START_OF_IDR.sub(lambda match: head + match.group(), slices)


class Bits:
    """Reads the fields of a NAL unit, behind its header byte.

    Args:
        content: of the unit, with its emulation prevention bytes (7.3.1).

    Reading past the end raises ValueError.
    """

    def __init__(self, content: bytes):
        payload = content.replace(b"\x00\x00\x03", b"\x00\x00")
        self._value, self._left = int.from_bytes(payload, "big"), 8 * len(payload)

    def u(self, count: int) -> int:
        """An unsigned integer of so many bits."""
        self._left -= count
        if self._left < 0:
            raise ValueError("the NAL unit ends within its header")
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        """An unsigned Exp-Golomb code (9.1)."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)


class SliceHeader(NamedTuple):
    """The first fields of a slice (7.3.3).

    Args:
        first_mb: first_mb_in_slice.
        type: slice_type; 5 to 9 say that all slices of the picture are of that type modulo 5.
        pps: pic_parameter_set_id.
        frame_num: modulo 2 ** frame_num_bits of the SPS.
        idr_pic_id: of an IDR picture, else None.
    """

    first_mb: int
    type: int
    pps: int
    frame_num: int
    idr_pic_id: int | None


def slice_header(stream: bytes, unit: NalUnit, frame_num_bits: int) -> SliceHeader:
    """Reads the header of a slice. Raises ValueError where the unit ends before."""
    bits = Bits(stream[unit.begin + 1 : min(unit.end, unit.begin + _HEADER_BYTES)])
    first_mb, kind, pps, frame_num = bits.ue(), bits.ue(), bits.ue(), bits.u(frame_num_bits)
    return SliceHeader(first_mb, kind, pps, frame_num, bits.ue() if unit.type == IDR_SLICE else None)


class SequenceParameters(NamedTuple):
    """What a sequence parameter set says (7.3.2.1.1), for the baseline profile.

    Args:
        frame_num_bits: of the field frame_num in slice headers.
        width, height: of the coded picture in macroblocks.
    """

    frame_num_bits: int
    width: int
    height: int


def sequence_parameters(content: bytes) -> SequenceParameters:
    """Reads an SPS of the baseline profile, header byte included.

    Raises ValueError for another profile and where the unit ends before.
    """
    bits = Bits(content[1:])
    profile = bits.u(8)
    if profile != 66:
        raise ValueError(f"profile {profile}, must be 66, baseline")
    bits.u(16)  # constraint flags, level
    bits.ue()  # seq_parameter_set_id
    frame_num_bits = bits.ue() + 4
    order_type = bits.ue()  # pic_order_cnt_type
    if order_type == 0:
        bits.ue()
    elif order_type == 1:
        raise ValueError("pic_order_cnt_type 1 is not read")
    bits.ue()  # max_num_ref_frames
    bits.u(1)
    return SequenceParameters(frame_num_bits, bits.ue() + 1, bits.ue() + 1)
