"""Frames and Huffman codes that no encoder would make, to try the automaton of scans with."""

import random

from megatron_codec.codecs.jpeg_format import Component, Format
from megatron_codec.errors import UserError


def random_table(rng: random.Random, symbols: list[int]) -> tuple[tuple[int, ...], bytes]:
    """A Huffman code of some of these symbols, with its code of ones alone free."""
    chosen = rng.sample(symbols, rng.randint(1, min(len(symbols), 8)))
    lengths = [16]
    while sum(2.0**-length for length in lengths) >= 1 or len(lengths) != len(chosen):
        lengths = [rng.randint(1, 8) for _ in chosen]
    return tuple(lengths.count(length) for length in range(1, 17)), bytes(chosen)


def random_layout(rng: random.Random) -> Format | None:
    """A frame with Huffman codes that no encoder would make; None if it has none for a whole MCU."""
    ac = [0x00, 0xF0, *(run << 4 | size for run in (0, 1, 3, 7, 14, 15) for size in (1, 2, 5, 10, 11))]
    components = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        dc_table, ac_table = random_table(rng, list(range(14))), random_table(rng, ac)
        steps = tuple(rng.choice([1, 16, 100, 255]) for _ in range(64))
        components.append(Component(rng.randint(1, 2), 1, steps, dc_table, ac_table))
    interval = rng.choice([0, 0, 1, 2, 65535])
    layout = Format(rng.randint(1, 40), rng.randint(1, 20), tuple(components), interval, 0)
    try:
        layout.scan()
    except UserError as error:
        assert "no codes for a whole MCU" in str(error)
        return None
    return layout
