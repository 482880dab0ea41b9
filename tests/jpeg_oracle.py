"""Baseline JPEG scans decoded and encoded bit by bit, as ITU-T T.81 puts it: the oracle for jpeg_scan.cpp.

Slow and obvious: codes are strings of 0 and 1, and whether something can still become a whole scan is asked
of every symbol and every value. Beside it what others say of a file: djpeg of libjpeg-turbo, and Pillow.
"""

import io
import shutil
import subprocess
from functools import cache, partial
from itertools import pairwise

import numpy as np
from PIL import Image

from megatron_codec.codecs.jpeg_format import Component, Format, Table

DJPEG = shutil.which("djpeg")

Mcu = list[list[int]]  # of each block the 64 coefficients in zigzag order, the first one not a difference


class Refused(Exception):
    """No whole scan has this byte here; `offset` says which."""

    def __init__(self, offset: int):
        self.offset = offset


class Ended(Exception):
    """Bytes are missing."""


def codes(table: Table) -> dict[str, int]:
    """Symbols by their codes, T.81 C.2."""
    counts, symbols = table
    found, code, at = {}, 0, 0
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            found[f"{code:0{length}b}"] = symbols[at]
            code, at = code + 1, at + 1
        code <<= 1
    return found


def magnitude(bits: str) -> int:
    """T.81 F.2.2.1, EXTEND."""
    return int(bits, 2) if bits[0] == "1" else int(bits, 2) - (1 << len(bits)) + 1


def bits_of(value: int) -> str:
    """What follows the code of a value, T.81 F.1.2.1.1: as many bits as its size."""
    if value == 0:
        return ""
    return f"{value:b}" if value > 0 else "".join("10"[int(bit)] for bit in f"{-value:b}")


def ranges(component: Component) -> list[tuple[int, int]]:
    """Least and largest quantized coefficient of any block of samples -128 to 127, in zigzag order."""
    found = []
    x = np.arange(8)
    wave = [np.cos((2 * x + 1) * u * np.pi / 16) * (np.sqrt(1 / 8) if u == 0 else 0.5) for u in range(8)]
    for step, (v, u) in zip(component.quantization, zigzag(), strict=True):
        basis = np.outer(wave[v], wave[u])
        most = (basis * np.where(basis > 0, 127, -128)).sum()
        least = (basis * np.where(basis > 0, -128, 127)).sum()
        found.append((-int(-least / step + 0.52), int(most / step + 0.52)))
    return found


def zigzag() -> list[tuple[int, int]]:
    """(v, u) in the order of T.81 figure A.6."""
    order, v, u = [(0, 0)], 0, 0
    while len(order) < 64:
        up = (v + u) % 2 == 0
        if up:
            v, u = (v, u + 1) if v == 0 else (v + 1, u) if u == 7 else (v - 1, u + 1)
        else:
            v, u = (v + 1, u) if u == 0 and v < 7 else (v, u + 1) if v == 7 else (v + 1, u - 1)
        order.append((v, u))
    return order


class Decoder:
    """Reads one scan."""

    def __init__(self, layout: Format, data: bytes, canonical: bool, in_range: bool):
        self.layout, self.data, self.canonical = layout, data, canonical
        self.ranges = [ranges(c) if in_range else [(-(1 << 20), 1 << 20)] * 64 for c in layout.components]
        self.dc = [codes(c.dc) for c in layout.components]
        self.ac = [codes(c.ac) for c in layout.components]
        self.at, self.bits = 0, ""  # the byte to come, and what is left of the one before
        self.ends, self.legal, self.has_value = map(cache, (self.ends, self.legal, self.has_value))

    def decode(self) -> list[Mcu]:
        """Up to EOI, and nothing behind it."""
        layout, mcus = self.layout, []
        predicted = [0] * len(layout.components)
        while len(mcus) < layout.mcus:
            if layout.interval and mcus and len(mcus) % layout.interval == 0:
                self.marker(0xD0 + (len(mcus) // layout.interval - 1) % 8)
                predicted = [0] * len(layout.components)
            mcu = []
            for c in layout.blocks:
                mcu.append(self.block(c, predicted[c]))
                predicted[c] = mcu[-1][0]
            mcus.append(mcu)
        self.marker(0xD9)
        if self.at < len(self.data):
            raise Refused(self.at)
        return mcus

    def byte(self, wanted: int | None = None) -> int:
        if self.at == len(self.data):
            raise Ended
        if wanted is not None and self.data[self.at] != wanted:
            raise Refused(self.at)
        self.at += 1
        return self.data[self.at - 1]

    def unstuff(self) -> None:
        if self.at and self.data[self.at - 1] == 0xFF:
            self.byte(0)

    def bit(self) -> str:
        if not self.bits:
            self.unstuff()
            self.bits = f"{self.byte():08b}"
        bit, self.bits = self.bits[0], self.bits[1:]
        return bit

    def marker(self, code: int) -> None:
        if "0" in self.bits:
            raise Refused(self.at - 1)
        self.bits = ""
        self.unstuff()
        self.byte(0xFF)
        self.byte(code)

    def symbol(self, table: dict[str, int], legal) -> int:
        code = ""
        while True:
            code += self.bit()
            if not any(known.startswith(code) and legal(symbol) for known, symbol in table.items()):
                raise Refused(self.at - 1)
            if code in table:
                return table[code]

    def value(self, size: int, c: int, k: int, predicted: int) -> int:
        bits = ""
        while len(bits) < size:
            bits += self.bit()
            left = size - len(bits)
            rest = [f"{i:0{left}b}" if left else "" for i in range(1 << left)]
            if not any(self.fits(c, k, predicted + magnitude(bits + more)) for more in rest):
                raise Refused(self.at - 1)
        return predicted + (magnitude(bits) if bits else 0)

    def fits(self, c: int, k: int, value: int) -> bool:
        low, high = self.ranges[c][k]
        return low <= value <= high

    def has_value(self, size: int, c: int, k: int, predicted: int) -> bool:
        least, most = (1 << size) >> 1, (1 << size) - 1
        values = [s * m for m in range(least, most + 1) for s in (1, -1)]
        return any(self.fits(c, k, predicted + value) for value in values)

    def ends(self, c: int, k: int, zeros: bool) -> bool:
        """Whether a block can end from coefficient k, where `zeros` says that a run of sixteen precedes."""
        return k == 64 or any(self.legal(c, k, zeros, symbol) for symbol in self.ac[c].values())

    def legal(self, c: int, k: int, zeros: bool, symbol: int) -> bool:
        run, size = symbol >> 4, symbol & 15
        if symbol == 0x00:
            return not (self.canonical and zeros)
        if symbol == 0xF0:
            return k + 16 < 64 and self.ends(c, k + 16, True)
        return (
            1 <= size <= 10
            and k + run < 64
            and self.has_value(size, c, k + run, 0)
            and self.ends(c, k + run + 1, False)
        )

    def block(self, c: int, predicted: int) -> list[int]:
        size = self.symbol(self.dc[c], lambda size: size <= 11 and self.has_value(size, c, 0, predicted))
        block = [self.value(size, c, 0, predicted)] + [0] * 63
        k, zeros = 1, False
        while k < 64:
            symbol = self.symbol(self.ac[c], partial(self.legal, c, k, zeros))
            if symbol == 0x00:
                break
            if symbol == 0xF0:
                k, zeros = k + 16, True
                continue
            k += symbol >> 4
            block[k] = self.value(symbol & 15, c, k, 0)
            k, zeros = k + 1, False
        return block


def decode(layout: Format, data: bytes, canonical: bool = False, in_range: bool = False) -> list[Mcu]:
    """The coefficients of a scan. Raises Refused or Ended."""
    return Decoder(layout, data, canonical, in_range).decode()


def first_fault(layout: Format, data: bytes, canonical: bool = False, in_range: bool = False) -> int | None:
    """The first byte with which no whole scan goes on; how many there are, if some are missing; None for a
    whole scan."""
    try:
        decode(layout, data, canonical, in_range)
    except Refused as fault:
        return fault.offset
    except Ended:
        return len(data)
    return None


def encode(layout: Format, mcus: list[Mcu], runs: int = 0) -> bytes:
    """The scan of these coefficients with its EOI, T.81 F.1.2; with up to so many runs of sixteen zeros,
    which say nothing, before the end of each block."""
    dc = [{symbol: code for code, symbol in codes(c.dc).items()} for c in layout.components]
    ac = [{symbol: code for code, symbol in codes(c.ac).items()} for c in layout.components]
    out, bits, predicted = b"", "", [0] * len(layout.components)
    for number, mcu in enumerate(mcus, 1):
        for c, block in zip(layout.blocks, mcu, strict=True):
            value = bits_of(block[0] - predicted[c])
            predicted[c] = block[0]
            bits += dc[c][len(value)] + value
            places = [0] + [k for k in range(1, 64) if block[k]]
            for before, k in pairwise(places):
                zeros = k - before - 1
                value = bits_of(block[k])
                bits += ac[c][0xF0] * (zeros // 16) if zeros > 15 else ""
                bits += ac[c][zeros % 16 << 4 | len(value)] + value
            if places[-1] < 63:
                bits += ac[c].get(0xF0, "") * min(runs, (62 - places[-1]) // 16) + ac[c][0x00]
        last = number == len(mcus)
        if last or (layout.interval and number % layout.interval == 0):
            bits += "1" * (-len(bits) % 8)
            data = int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:]
            marker = 0xD9 if last else 0xD0 + (number // layout.interval - 1) % 8
            out += data.replace(b"\xff", b"\xff\x00") + bytes((0xFF, marker))
            bits, predicted = "", [0] * len(layout.components)
    return out


def djpeg_complaint(file: bytes) -> str:
    """What `djpeg -strict`, for which a warning is an error, says of a file; nothing if all is well."""
    assert DJPEG
    command = [DJPEG, "-strict", "-outfile", "/dev/null"]
    done = subprocess.run(command, input=file, capture_output=True, check=False)
    text = done.stderr.decode(errors="replace").strip()
    return text or (f"status {done.returncode}" if done.returncode else "")


def pillow_complaint(file: bytes) -> str:
    """What Pillow says of a file when it decodes it; nothing if all is well."""
    try:
        Image.open(io.BytesIO(file), formats=["JPEG"]).load()
    except (OSError, SyntaxError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""
