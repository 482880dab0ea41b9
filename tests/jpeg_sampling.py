"""JPEGs from random logits under the grammar, real ones of the same settings, and damaged ones."""

import io
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from megatron_codec._csrc import JpegCursor, JpegGrammar
from megatron_codec.codecs.jpeg_format import Format, parse
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops, real_photos

GREY = "grey"
SAMPLINGS = ("4:2:0", "4:2:2", "4:4:4", GREY)
VOCABULARIES = (256, 320, 512, 1024)
MEMORY = 16 << 20


@dataclass(frozen=True)
class Setting:
    """How a picture is encoded, and how many tokens there are."""

    width: int
    height: int
    sampling: str
    quality: int
    interval: int
    vocabulary: int

    @classmethod
    def draw(cls, rng: random.Random, largest: int = 256) -> "Setting":
        width, height = rng.randint(16, largest), rng.randint(16, largest)
        if rng.random() < 0.5:
            width = height = width // 16 * 16
        across = -(-width // 16)
        interval = rng.choice([0, 0, 1, 1, 2, rng.randint(3, 40), across, 65535])
        return cls(
            width, height, rng.choice(SAMPLINGS), rng.randint(1, 95), interval, rng.choice(VOCABULARIES)
        )

    def save(self, picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        options = {"quality": self.quality, "restart_marker_blocks": self.interval}
        if self.sampling == GREY:
            picture.convert("L").save(buffer, "JPEG", **options)
        else:
            picture.save(buffer, "JPEG", subsampling=self.sampling, **options)
        return buffer.getvalue()

    @property
    def head(self) -> bytes:
        file = self.save(Image.new("RGB", (self.width, self.height)))
        return file[: parse(file).scan_offset]

    @property
    def layout(self) -> Format:
        return parse(self.head)


@cache
def tokenizer(vocabulary: int) -> Tokenizer:
    """Trained on 120 scans of all samplings at several qualities."""
    scans = []
    for number, crop in enumerate(photo_crops(120, 128)):
        quality, interval = (5, 25, 50, 90)[number // 4 % 4], (1, 0, 4)[number % 3]
        setting = Setting(128, 128, SAMPLINGS[number % 4], quality, interval, vocabulary)
        file = setting.save(crop)
        scans.append(file[parse(file).scan_offset :])
    return Tokenizer.train(scans, vocabulary)


@cache
def tokens(vocabulary: int) -> list[bytes]:
    return [tokenizer(vocabulary).token_bytes(i) for i in range(vocabulary)]


def grammar(setting: Setting, memory: int = MEMORY, **flags: bool) -> JpegGrammar:
    """Of the scan alone: its cursors begin behind the head."""
    return JpegGrammar(setting.layout.scan(**flags), b"", tokens(setting.vocabulary), memory)


def allowed(grammar: JpegGrammar, cursors: list[JpegCursor], left: list[int], vocabulary: int) -> np.ndarray:
    """Which tokens can come next, bool [cursors, tokens]."""
    rows = np.full((len(cursors), vocabulary), 7, np.uint8)
    grammar.allow(cursors, left, rows.ctypes.data, vocabulary)
    assert rows.max(initial=0) <= 1
    return rows.view(bool)


def finish_by_walking(found: JpegGrammar, at: JpegCursor) -> int:
    """Reads bytes each of which makes `finish` one shorter, to the end."""
    at, count = at.copy(), 0
    while not found.done(at):
        before = found.finish(at)
        for byte in range(256):
            then = at.copy()
            if found.read(then, byte) and found.finish(then) == before - 1:
                at = then
                break
        else:
            raise AssertionError(f"no byte makes {before} bytes one fewer")
        count += 1
    return count


class Samples:
    """Draws tokens from random logits until every sample is done.

    Args:
        budgets: the most tokens of each sample, or -1.
        scale: of a part of the logits that a sample has at every step, which makes it insist on some tokens.
    """

    def __init__(self, grammar: JpegGrammar, vocabulary: int, budgets: list[int], scale: float, seed: int):
        self.grammar, self.vocabulary = grammar, vocabulary
        self.budgets, self.rng = budgets, np.random.default_rng(seed)
        self.taste = self.rng.normal(0, scale, (len(budgets), vocabulary)).astype(np.float32)
        self.noise = self.rng.gumbel(size=1 << 18).astype(np.float32)
        self.drawn = [0] * len(budgets)  # tokens of each sample

    def draw(self) -> list[bytes]:
        table, scans = tokens(self.vocabulary), [bytearray() for _ in self.budgets]
        cursors = [self.grammar.begin() for _ in scans]
        left, running = list(self.budgets), list(range(len(scans)))
        while running:
            rows = allowed(
                self.grammar, [cursors[i] for i in running], [left[i] for i in running], self.vocabulary
            )
            assert rows.any(1).all(), "a dead end"
            size = rows.size
            places = self.rng.integers(0, len(self.noise) - size) if size < len(self.noise) else 0
            logits = self.taste[running] + self.noise[places : places + size].reshape(rows.shape)
            chosen = np.where(rows, logits, -np.inf).argmax(1).tolist()
            for i, token in zip(running, chosen, strict=True):
                assert self.grammar.read(cursors[i], token)
                scans[i] += table[token]
                self.drawn[i] += 1
                left[i] -= left[i] > 0
            running = [i for i in running if not self.grammar.done(cursors[i])]
        return [bytes(scan) for scan in scans]


@cache
def _photos() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in real_photos()]


def window(rng: random.Random, width: int, height: int) -> Image.Image:
    """A random window of a random photograph, `width` x `height`."""
    photo = rng.choice(_photos())
    scale = rng.uniform(0.3, 1) * min(photo.width / width, photo.height / height)
    across, down = width * scale, height * scale
    left, top = rng.uniform(0, photo.width - across), rng.uniform(0, photo.height - down)
    box = (left, top, left + across, top + down)
    picture = photo.resize((width, height), Image.Resampling.BILINEAR, box)
    picture.info = {}  # Pillow would write it into the head
    return picture


def pieces(file: bytes) -> list[bytes]:
    """SOI, each segment before the scan, each restart interval with the marker that ends it."""
    start, parts, at = parse(file).scan_offset, [file[:2]], 2
    while at < start:
        end = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        parts.append(file[at:end])
        at = end
    while at < len(file):
        found = at
        while not (file[found] == 0xFF and file[found + 1] != 0):
            found += 1
        parts.append(file[at : found + 2])
        at = found + 2
    assert b"".join(parts) == file
    return parts


DAMAGES = ("bit flip", "byte", "cut", "removed segment", "doubled segment", "swapped segments")


def damage(rng: random.Random, file: bytes, kind: str) -> bytes:
    """A file with one such damage, in its head or its scan."""
    if kind in ("bit flip", "byte"):
        # Half of them in the head, where fewer bytes are.
        start = parse(file).scan_offset
        place = rng.randrange(start) if rng.random() < 0.5 else rng.randrange(start, len(file))
        value = file[place] ^ 1 << rng.randrange(8) if kind == "bit flip" else rng.randrange(256)
        return file[:place] + bytes([value]) + file[place + 1 :]
    if kind == "cut":
        return file[: rng.randrange(len(file))]
    parts = pieces(file)
    place = rng.randrange(1, len(parts))
    if kind == "removed segment":
        del parts[place]
    elif kind == "doubled segment":
        parts.insert(place, parts[place])
    else:
        other = rng.randrange(1, len(parts))
        parts[place], parts[other] = parts[other], parts[place]
    return b"".join(parts)
