"""The strict check of a clip's NAL units. It demands what x264 writes with the codec's settings, which is
less than H.264 allows."""

import re
from dataclasses import dataclass

from megatron_codec.codecs.base import Report
from megatron_codec.codecs.nal import (
    IDR_SLICE,
    PPS,
    SEI,
    SLICE,
    SPS,
    I,
    NalUnit,
    P,
    nal_units,
    sequence_parameters,
    slice_header,
)

# 000000 and 000002 may not occur in a unit, 000003 only before 00 to 03 (H.264, 7.4.1).
_FORBIDDEN = re.compile(rb"\x00\x00(?:[\x00\x02]|\x03[^\x00-\x03]|\x03$)")
_NAMES = {SPS: "SPS", PPS: "PPS", SEI: "SEI", SLICE: "slice", IDR_SLICE: "IDR slice"}


@dataclass(frozen=True)
class Layout:
    """What streams of a codec consist of.

    Args:
        frames: of a clip.
        size: of a frame, (width, height) in macroblocks.
        head: SPS and PPS with their start codes; empty if each stream has its own, with an SEI.
        head_removed: whether streams are without it.
    """

    frames: int
    size: tuple[int, int]
    head: bytes
    head_removed: bool


class _Fault(Exception):
    def __init__(self, reason: str, offset: int):
        self.report = Report(False, reason, offset)


def check_stream(stream: bytes, layout: Layout) -> Report:
    """Whether a stream is a complete clip of this layout, and if not, where it first is not."""
    try:
        _Checker(stream, layout).run()
    except _Fault as fault:
        return fault.report
    return Report(True)


class _Checker:
    def __init__(self, stream: bytes, layout: Layout):
        self.stream, self.layout = stream, layout
        self.units = nal_units(stream)
        self.place = 0
        self.idr_pic_id: int | None = None
        if layout.head:
            units = nal_units(layout.head)
            self.sets = [layout.head[unit.begin : unit.end] for unit in units]
            self.frame_num_bits = sequence_parameters(self.sets[0]).frame_num_bits

    def run(self) -> None:
        """Raises the first fault."""
        stream, units = self.stream, self.units
        if not units or units[0].start:
            raise _Fault("does not begin with a start code", 0)
        frame_num = 0
        for frame in range(self.layout.frames):
            first = self._unit(f"frame {frame}")
            is_idr = first.type in (SPS, IDR_SLICE)
            if frame == 0 and not is_idr:
                raise _Fault(f"frame 0 begins with {_name(first)}", first.start)
            has_sets = is_idr and not self.layout.head_removed
            if has_sets:
                self._parameter_sets(frame)
            frame_num = 0 if is_idr else (frame_num + 1) % (1 << self.frame_num_bits)
            self._slices(frame, is_idr, frame_num, 3 if is_idr else 4)
        if self.place < len(units):
            unit = units[self.place]
            raise _Fault(f"{len(stream) - unit.start} bytes follow the last frame", unit.start)

    def _unit(self, what: str) -> NalUnit:
        if self.place == len(self.units):
            raise _Fault(f"ends before {what} of {self.layout.frames} frames", len(self.stream))
        return self.units[self.place]

    def _take(self, what: str, kinds: tuple[int, ...], code_length: int) -> NalUnit:
        """The next unit, whose own bytes are sound."""
        unit = self._unit(what)
        if unit.header < 0:
            raise _Fault(f"{what}: a NAL unit without a byte", unit.start)
        if unit.header & 0x80 or unit.type not in kinds:
            expected = " or ".join(_NAMES[kind] for kind in kinds)
            raise _Fault(f"{what}: found {_name(unit)}, expected {expected}", unit.start)
        if unit.begin - unit.start != code_length:
            found = f"a start code of {unit.begin - unit.start} bytes"
            raise _Fault(f"{what}: found {found}, expected {code_length}", unit.start)
        if self.stream[unit.end - 1] == 0:
            raise _Fault(f"{what}: the NAL unit ends with a zero byte", unit.end - 1)
        forbidden = _FORBIDDEN.search(self.stream[unit.begin : unit.end])
        if forbidden:
            rule = f"{forbidden.group().hex()} without emulation prevention"
            raise _Fault(f"{what}: {rule}", unit.begin + forbidden.start())
        self.place += 1
        return unit

    def _parameter_sets(self, frame: int) -> None:
        own = []
        for kind in (SPS, PPS):
            unit = self._take(f"frame {frame}", (kind,), 4)
            own.append(self.stream[unit.begin : unit.end])
            if self.layout.head and own[-1] != self.sets[len(own) - 1]:
                raise _Fault(f"frame {frame}: the {_NAMES[kind]} differs from the codec's", unit.start)
        if self.layout.head:
            return
        if frame == 0:
            try:
                parameters = sequence_parameters(own[0])
            except ValueError as error:
                raise _Fault(f"frame 0: the SPS cannot be read: {error}", 0) from None
            if parameters[1:] != self.layout.size:
                found = f"{parameters.width}x{parameters.height}"
                width, height = self.layout.size
                raise _Fault(f"frame 0: the SPS is for {found} macroblocks, not {width}x{height}", 0)
            self.frame_num_bits = parameters.frame_num_bits
            self._take("frame 0", (SEI,), 3)

    def _slices(self, frame: int, is_idr: bool, frame_num: int, first_code_length: int) -> None:
        kinds = (I,) if is_idr else (P, I)
        width, height = self.layout.size
        kind_of_frame = None
        for macroblock in range(width * height):
            what = f"frame {frame}, macroblock {macroblock}"
            code_length = 3 if macroblock else first_code_length
            unit = self._take(what, (IDR_SLICE if is_idr else SLICE,), code_length)
            try:
                header = slice_header(self.stream, unit, self.frame_num_bits)
            except ValueError:
                raise _Fault(f"{what}: the slice ends within its header", unit.start) from None
            kind = header.type % 5
            if kind not in kinds or header.type > 9 or kind_of_frame not in (None, kind):
                raise _Fault(f"{what}: a slice of type {header.type}", unit.start)
            kind_of_frame = kind
            expected = {"first_mb_in_slice": macroblock, "pic_parameter_set_id": 0, "frame_num": frame_num}
            found = (header.first_mb, header.pps, header.frame_num)
            for (name, wanted), value in zip(expected.items(), found, strict=True):
                if value != wanted:
                    raise _Fault(f"{what}: {name} is {value}, expected {wanted}", unit.start)
            if is_idr:
                # Two IDR pictures in a row must differ in it (7.4.3); x264 does so for all.
                if macroblock == 0 and header.idr_pic_id == self.idr_pic_id:
                    raise _Fault(f"{what}: idr_pic_id is that of the IDR picture before", unit.start)
                if macroblock and header.idr_pic_id != self.idr_pic_id:
                    raise _Fault(f"{what}: idr_pic_id changes within the frame", unit.start)
                self.idr_pic_id = header.idr_pic_id


def _name(unit: NalUnit) -> str:
    if unit.header < 0:
        return "a NAL unit without a byte"
    return _NAMES.get(unit.type, f"a NAL unit of type {unit.type}")
