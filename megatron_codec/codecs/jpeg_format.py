"""What the marker segments of a baseline JPEG file say of its scan, and whether the file is strictly valid.

    check_file(Path("cat.jpg").read_bytes())

A file is valid here when a decoder needs no tolerance to read it: every segment well-formed, every bit of the
scan part of a code that the tables have, markers in their places, as many MCUs as the picture has, nothing
behind the end. Stricter than ITU-T T.81 in three points that no encoder of ours needs: fill bytes before a
marker of the scan, several scans, and sampling factors that do not divide the largest, which libjpeg has not.

Source: ITU-T T.81, annex B; ITU-T T.871 (JFIF); Adobe's Technical Note 5116 for APP14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_codec._csrc import JpegFault, JpegScan
from megatron_codec.codecs.base import Report

_SOI, _EOI, _SOS, _DQT, _DHT, _DRI, _COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
_APP0, _APP14 = 0xE0, 0xEE
_BASELINE = 0xC0
_OTHER_FRAMES = {
    0xC1: "extended sequential", 0xC2: "progressive", 0xC3: "lossless", 0xC5: "hierarchical",
    0xC6: "hierarchical", 0xC7: "hierarchical", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded",
    0xCB: "arithmetic-coded", 0xCD: "arithmetic-coded", 0xCE: "arithmetic-coded", 0xCF: "arithmetic-coded",
}  # fmt: skip
_MOST_BLOCKS = 10  # of an MCU, T.81 B.2.3
_MOST_SYMBOLS = 256  # of a Huffman table: each is a byte
_MOST_DC_SIZE = 15  # that is a size at all; beyond 11 no baseline scan can use one
_ADOBE_TRANSFORMS = {3: (0, 1), 4: (0, 2)}  # by the number of components: none, or YCbCr, or YCCK

Table = tuple[tuple[int, ...], bytes]  # how many Huffman codes of each length 1 to 16, and their symbols


class FormatError(ValueError):
    """A segment that is not as T.81 has it.

    Attributes:
        offset: of the byte where it is wrong.
    """

    def __init__(self, reason: str, offset: int):
        super().__init__(f"{reason}, at byte {offset}")
        self.reason, self.offset = reason, offset


@dataclass(frozen=True)
class Component:
    """One colour component of the scan.

    Attributes:
        horizontal, vertical: sampling factors.
        quantization: of each coefficient in zigzag order.
        dc, ac: its Huffman tables.
    """

    horizontal: int
    vertical: int
    quantization: tuple[int, ...]
    dc: Table
    ac: Table


@dataclass(frozen=True)
class Format:
    """What a decoder has to know to read the scan.

    Attributes:
        width, height: of the picture in pixels.
        components: in the order of the scan.
        interval: MCUs between restart markers, 0 for none.
        scan_offset: of the first byte of entropy-coded data.
    """

    width: int
    height: int
    components: tuple[Component, ...]
    interval: int
    scan_offset: int

    @property
    def mcus(self) -> int:
        """Of the scan (T.81 A.2)."""
        across, down = 8, 8
        if len(self.components) > 1:
            across *= max(c.horizontal for c in self.components)
            down *= max(c.vertical for c in self.components)
        return -(-self.width // across) * -(-self.height // down)

    @property
    def blocks(self) -> list[int]:
        """The component of each 8 x 8 block of an MCU, in order."""
        if len(self.components) == 1:
            return [0]
        return [i for i, c in enumerate(self.components) for _ in range(c.horizontal * c.vertical)]

    def scan(self, canonical: bool = False, in_range: bool = False) -> JpegScan:
        """The automaton of the scan.

        Args:
            canonical: refuse a run of sixteen zeros that no coefficient follows in its block; it decodes,
                but re-encoding gives other bytes.
            in_range: refuse coefficients that no block of 8-bit samples has.

        Raises:
            UserError: the Huffman tables have no codes for a whole MCU.
        """
        return JpegScan(
            blocks=self.blocks,
            dc=[c.dc for c in self.components],
            ac=[c.ac for c in self.components],
            mcus=self.mcus,
            interval=self.interval,
            canonical=canonical,
            ranges=[_ranges(c.quantization) for c in self.components] if in_range else [],
        )

    def place(self, mcu: int, block: int, coefficient: int) -> str:
        """Where that is, in words."""
        component = self.blocks[block]
        return f"MCU {mcu} of {self.mcus}, block {block} (component {component}), coefficient {coefficient}"


def parse(data: bytes) -> Format:
    """Reads the segments from SOI to the scan header.

    Raises:
        FormatError: something is not as in T.81, or is not baseline with a single scan.
    """
    return _Parser(data).parse()


def check_file(data: bytes, canonical: bool = False, in_range: bool = False) -> Report:
    """Whether a file is a strictly valid baseline JPEG of one scan, and if not where it first fails.

    Args:
        canonical, in_range: also refuse what `Format.scan` says.
    """
    try:
        layout = parse(data)
        # Files of one origin have one layout, and an automaton takes longer to build than to run.
        scan = _automaton(replace(layout, scan_offset=0), canonical, in_range)
    except FormatError as error:
        return Report(False, error.reason, error.offset)
    except ValueError as error:
        return Report(False, str(error), 0)
    return check_scan(layout, scan, data[layout.scan_offset :], layout.scan_offset)


@lru_cache(maxsize=16)
def _automaton(layout: Format, canonical: bool, in_range: bool) -> JpegScan:
    return layout.scan(canonical, in_range)


def check_scan(layout: Format, scan: JpegScan, stream: bytes, offset: int = 0) -> Report:
    """Whether entropy-coded data with its EOI is a whole scan; `offset` is where it lies in the file."""
    found = scan.check(stream)
    if found is None:
        return Report(True)
    fault, at, place = found
    return Report(False, explain(layout, fault, place, stream[at:]), offset + at)


def explain(layout: Format, fault: JpegFault, place: tuple[int, int, int], rest: bytes) -> str:
    """A fault in words, with its place; `rest` begins with the byte that was refused."""
    mcu, _, _ = place
    where, found = layout.place(*place), rest[:1].hex().upper()
    due = "EOI" if mcu == layout.mcus else f"RST{(mcu // max(layout.interval, 1) - 1) % 8}"
    return {
        JpegFault.NONE: f"ends in {where}" if mcu < layout.mcus else "ends before EOI",
        JpegFault.CODE: f"{found} holds a code that is none, or leads beyond the last coefficient; {where}",
        JpegFault.RANGE: f"{found} makes a coefficient that no picture of 8 bits has; {where}",
        JpegFault.STUFFING: f"FF in the data is followed by {found} and not by 00; {where}",
        JpegFault.PADDING: f"the bits of {found} behind MCU {mcu - 1} are not ones up to the marker",
        JpegFault.MARKER: f"{found} is not part of {due}, which is due after MCU {mcu - 1} of {layout.mcus}",
        JpegFault.AFTER_END: f"{len(rest)} bytes follow the end of the image",
        JpegFault.HEAD: f"{found} is not what the constant head has there",
    }[fault]


class _Parser:
    """Reads one file's segments."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.quantization: dict[int, tuple[int, ...]] = {}
        self.huffman: dict[tuple[int, int], Table] = {}  # (0 DC or 1 AC, number)
        self.interval = 0
        self.frame: tuple[int, int, list[tuple[int, int, int, int]]] | None = None
        self.adobe: tuple[int, int] | None = None  # the colour transform of APP14, and where it stands

    def parse(self) -> Format:
        """From SOI to SOS."""
        if self.data[:2] != bytes((0xFF, _SOI)):
            raise FormatError("does not begin with SOI (FFD8)", 0)
        self.at = 2
        while True:
            start = self.at
            marker, body = self._segment()
            if marker == _SOS:
                return self._scan(body, start)
            if marker == _DQT:
                self._quantization(body, start)
            elif marker == _DHT:
                self._huffman(body, start)
            elif marker == _DRI:
                if len(body) != 2:
                    raise FormatError(f"DRI of {len(body) + 2} bytes, not 4", start)
                self.interval = int.from_bytes(body, "big")
            elif marker == _BASELINE:
                self._frame(body, start)
            elif marker in _OTHER_FRAMES:
                raise FormatError(f"is {_OTHER_FRAMES[marker]}, not baseline", start)
            elif marker == _APP0 and body[:5] == b"JFIF\0":
                if len(body) < 14 or body[5] != 1:
                    raise FormatError(f"JFIF segment {body[:14].hex().upper()}, not whole or not 1.x", start)
            elif marker == _APP14 and body[:5] == b"Adobe":
                if len(body) < 12:
                    raise FormatError(f"Adobe segment of {len(body) + 2} bytes, less than 14", start)
                self.adobe = body[11], start
            elif not (0xE0 <= marker <= 0xEF or marker == _COM):
                raise FormatError(f"marker FF{marker:02X} before the scan", start)

    def _segment(self) -> tuple[int, bytes]:
        """The next marker and what its segment holds behind the length."""
        data, start = self.data, self.at
        if start + 4 > len(data):
            raise FormatError("ends before the scan", len(data))
        if data[start] != 0xFF:
            raise FormatError(f"{data[start]:02X} where a marker is due", start)
        while start + 1 < len(data) and data[start + 1] == 0xFF:  # fill bytes, T.81 B.1.1.2
            start += 1
        if start + 4 > len(data):
            raise FormatError("ends before the scan", len(data))
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        end = start + 2 + length
        if marker in (0x00, 0x01, _SOI, _EOI) or 0xD0 <= marker <= 0xD7:
            raise FormatError(f"marker FF{marker:02X} before the scan", start)
        if length < 2 or end > len(data):
            raise FormatError(f"segment FF{marker:02X} of {length} bytes, of which there are fewer", start)
        self.at = end
        return marker, data[start + 4 : end]

    def _quantization(self, body: bytes, start: int) -> None:
        at = 0
        while at < len(body):
            precision, number = body[at] >> 4, body[at] & 15
            values = body[at + 1 : at + 65]
            if precision != 0:
                raise FormatError("a quantization table of 16 bits, which baseline does not have", start)
            if number > 3 or len(values) != 64 or 0 in values:
                raise FormatError(f"quantization table {number} has not 64 values from 1 to 255", start)
            self.quantization[number] = tuple(values)
            at += 65
        if not body:
            raise FormatError("an empty DQT", start)

    def _huffman(self, body: bytes, start: int) -> None:
        at = 0
        while at < len(body):
            kind, number = body[at] >> 4, body[at] & 15
            counts = tuple(body[at + 1 : at + 17])
            symbols = body[at + 17 : at + 17 + sum(counts)]
            if kind > 1 or number > 1 or len(counts) != 16 or len(symbols) != sum(counts) or not symbols:
                raise FormatError(f"Huffman table {kind}/{number} is cut, empty or numbered wrongly", start)
            if len(symbols) > _MOST_SYMBOLS or (kind == 0 and max(symbols) > _MOST_DC_SIZE):
                raise FormatError(f"Huffman table {kind}/{number} has symbols that are none", start)
            # The code of ones alone stays free (T.81 C.2), so the sum is below one.
            if sum(count << (15 - i) for i, count in enumerate(counts)) >= 1 << 16:
                raise FormatError(f"Huffman table {kind}/{number} has more codes than there can be", start)
            self.huffman[kind, number] = counts, symbols
            at += 17 + len(symbols)
        if not body:
            raise FormatError("an empty DHT", start)

    def _frame(self, body: bytes, start: int) -> None:
        if self.frame is not None:
            raise FormatError("a second SOF", start)
        if len(body) < 6 or len(body) != 6 + 3 * body[5]:
            raise FormatError("SOF0 whose length does not fit its number of components", start)
        precision, height, width = body[0], int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        if precision != 8 or not width or not height:
            raise FormatError(f"{width} x {height} pixels of {precision} bits; baseline has 8", start)
        components = []
        for at in range(6, len(body), 3):
            number, factors, table = body[at : at + 3]
            if not (1 <= factors >> 4 <= 4 and 1 <= factors & 15 <= 4):
                raise FormatError(f"sampling factors {factors >> 4} x {factors & 15}, not 1 to 4", start)
            components.append((number, factors >> 4, factors & 15, table))
        if not 1 <= len(components) <= 4 or len({c[0] for c in components}) < len(components):
            raise FormatError(f"{len(components)} components, or two of one number", start)
        for factors in zip(*((c[1], c[2]) for c in components), strict=True):
            if any(max(factors) % factor for factor in factors):
                raise FormatError(f"sampling factors {factors}, which do not divide the largest", start)
        self.frame = width, height, components

    def _scan(self, body: bytes, start: int) -> Format:
        if self.frame is None:
            raise FormatError("SOS before SOF0", start)
        width, height, frame = self.frame
        if not body or len(body) != 4 + 2 * body[0]:
            raise FormatError("SOS whose length does not fit its number of components", start)
        if body[0] != len(frame):
            raise FormatError(f"a scan of {body[0]} of {len(frame)} components: several scans", start)
        if body[-3:] != b"\x00\x3f\x00":
            raise FormatError(f"SOS ends in {body[-3:].hex().upper()}, not in baseline's 003F00", start)
        transforms = _ADOBE_TRANSFORMS.get(len(frame))
        if self.adobe and transforms and self.adobe[0] not in transforms:
            raise FormatError(
                f"Adobe colour transform {self.adobe[0]}, not one of {transforms}", self.adobe[1]
            )
        components = []
        for place, (number, horizontal, vertical, table) in enumerate(frame):
            selector, tables = body[1 + 2 * place : 3 + 2 * place]
            if selector != number:
                raise FormatError(f"component {selector} in the scan where the frame has {number}", start)
            if table not in self.quantization:
                raise FormatError(f"no quantization table {table}", start)
            for kind, wanted in ((0, tables >> 4), (1, tables & 15)):
                if (kind, wanted) not in self.huffman:
                    raise FormatError(f"no Huffman table {kind}/{wanted}", start)
            components.append(
                Component(
                    horizontal,
                    vertical,
                    self.quantization[table],
                    self.huffman[0, tables >> 4],
                    self.huffman[1, tables & 15],
                )
            )
        found = Format(width, height, tuple(components), self.interval, self.at)
        if len(found.blocks) > _MOST_BLOCKS:
            raise FormatError(f"{len(found.blocks)} blocks in an MCU, more than {_MOST_BLOCKS}", start)
        return found


def _ranges(quantization: Sequence[int]) -> tuple[list[int], list[int]]:
    """The least and the largest quantized value of each coefficient, in zigzag order, of a block of samples
    from -128 to 127."""
    steps = np.array(quantization)
    basis = _basis()
    positive, negative = basis.clip(min=0).sum((1, 2)), (-basis).clip(min=0).sum((1, 2))
    high, low = 127 * positive + 128 * negative, 128 * positive + 127 * negative
    # A little more than the nearest: an encoder's cosine transform is not exact.
    return (-np.floor(low / steps + 0.52)).astype(int).tolist(), np.floor(high / steps + 0.52).astype(
        int
    ).tolist()


def _basis() -> np.ndarray:
    """The functions of the cosine transform of T.81 A.3.3, [64, 8, 8], in zigzag order."""
    x = np.arange(8)
    scale = np.where(x == 0, np.sqrt(0.5), 1) / 2
    one = scale[:, None] * np.cos((2 * x[None] + 1) * x[:, None] * np.pi / 16)  # [frequency, sample]
    order = sorted(
        ((v, u) for v in range(8) for u in range(8)),
        key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
    )
    return np.stack([one[v][:, None] * one[u][None] for v, u in order])
