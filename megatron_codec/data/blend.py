"""Several corpora read as one, in exact proportions.

    Blend([a, b], [Fraction(7, 10), Fraction(3, 10)]).sample(i)

Sample i comes from the corpus that gains the i-th seat when seats are given out by Webster's method
(Sainte-Lague, 1910; Balinski and Young, "Fair Representation", 1982): always to the corpus with the smallest
(2 k + 1) / weight, k being the seats it has. So after any number of samples each corpus has had its share as
nearly as whole numbers allow, and which sample of which corpus number i is follows from i alone: any layout
and any resumed run reads the same.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Protocol

import numpy as np

from megatron_codec.errors import UserError


class Samples(Protocol):
    """A sequence of rows to train on (`PackedSamples`, `Blend`) or to evaluate with (`DocumentRows`)."""

    seq_length: int

    def sample(self, index: int) -> np.ndarray:
        """Token ids of row `index`, int64 [seq_length + 1]; -1 where there is nothing to predict."""
        ...


class Blend:
    """Rows of several sources, each in its own order.

    Args:
        sources: of one sequence length.
        weights: above 0; only their proportions count.
    """

    def __init__(self, sources: Sequence[Samples], weights: Sequence[Fraction]):
        common = lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * common) for weight in weights]
        self._sources = list(sources)
        self.seq_length = sources[0].seq_length

    def sample(self, index: int) -> np.ndarray:
        """See `Samples`."""
        source, row = self.locate(index)
        return self._sources[source].sample(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Which source row `index` comes from, and which row of it."""
        total, count = sum(self._weights), len(self._weights)
        # When t = (2 index - count) / (2 total), the sources have at most `index` rows together, and at most
        # `count` less; those are given out one by one.
        numerator = max(0, 2 * index - count)
        taken = [(weight * numerator + total) // (2 * total) for weight in self._weights]
        queue = [(Fraction(2 * taken[i] + 1, self._weights[i]), i) for i in range(count)]
        heapq.heapify(queue)
        for _ in range(index - sum(taken)):
            _, i = heapq.heappop(queue)
            taken[i] += 1
            heapq.heappush(queue, (Fraction(2 * taken[i] + 1, self._weights[i]), i))
        source = queue[0][1]
        return source, taken[source]


def parse_blend(flag: str, values: Sequence[str]) -> list[tuple[Fraction | None, str]]:
    """Weights and prefixes of `--data-path 0.7 A 0.3 B`, or of `--data-path A B` without weights.

    Raises UserError for a weight that is not above 0, or is there for some only.
    """
    given = f"{flag} {' '.join(values)}"
    remedy = f"for instance {flag} 0.7 data/a 0.3 data/b, or {flag} data/a data/b"
    numbers = [_number(value) for value in values]
    if all(number is None for number in numbers):
        return [(None, value) for value in values]
    odd = any(number is not None for number in numbers[1::2]) or None in numbers[::2]
    if len(values) % 2 or odd:
        raise UserError(given, "must be prefixes alone, or a weight before each", remedy)
    pairs = list(zip(numbers[::2], values[1::2], strict=True))
    if any(weight is not None and weight <= 0 for weight, _ in pairs):
        raise UserError(given, "every weight must be above 0", "leave out what is not wanted")
    return pairs


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
