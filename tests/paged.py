"""Calls of attention over a paged cache, with their pieces as they were asked for, and the formula."""

from dataclasses import dataclass, replace
from itertools import chain

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from megatron_codec.inference.kernels import PieceArrays, paged_attention, row_attention

B = 32


@dataclass
class Piece:
    """Keys start .. start + length - 1, seen by `rows`, a dict of row to its position."""

    start: int
    length: int
    rows: dict[int, int]


@dataclass
class Call:
    """What paged_attention takes, and the pieces as they were asked for."""

    query: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    arrays: PieceArrays
    scale: float
    pieces: list[Piece]

    def run(self) -> torch.Tensor:
        return paged_attention(self.query, self.positions, self.keys, self.values, self.arrays, self.scale)

    def run_rows(self) -> torch.Tensor:
        """By `row_attention`; NaN where it writes nothing."""
        output = torch.full_like(self.query, torch.nan)
        row_attention(self.query, self.positions, self.keys, self.values, self.arrays, self.scale, output)
        return output

    def wide(self) -> "Call":
        """The same in fp32."""
        query, keys, values = (x.float() for x in (self.query, self.keys, self.values))
        return replace(self, query=query, keys=keys, values=values)

    def seen(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a row sees, [t, g, d] each, gathered one by one."""
        found = []
        for number, piece in enumerate(self.pieces):
            if row not in piece.rows:
                continue
            first = int(self.arrays.block_offsets[number])
            for place in range(piece.length):
                if piece.start + place <= piece.rows[row]:
                    found.append((int(self.arrays.blocks[first + place // B]), place % B))
        blocks, places = torch.tensor(found).reshape(-1, 2).T
        return self.keys[blocks, :, places], self.values[blocks, :, places]

    def by(self, attend) -> torch.Tensor:
        """Every row's [n, d] from `attend`, which takes [1, n, 1, d], [1, n, t, d] twice and the scale."""
        n, g = self.query.shape[1], self.keys.shape[1]
        result = []
        for row, query in enumerate(self.query):
            key, value = (x.transpose(0, 1).repeat_interleave(n // g, 0)[None] for x in self.seen(row))
            result.append(attend(query[None, :, None], key, value, self.scale)[0, :, 0])
        return torch.stack(result)


def formula(query, key, value, scale):
    query, key, value = query.double(), key.double(), value.double()
    return (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value


def torch_kernel(query, key, value, scale):
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def ints(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)


def offsets(lists) -> torch.Tensor:
    return F.pad(ints(map(len, lists)).cumsum(0), (1, 0)).int()


def arrays_of(pieces: list[Piece], tables: list[list[int]]) -> PieceArrays:
    rows = [list(piece.rows) for piece in pieces]
    return PieceArrays(
        starts=ints(piece.start for piece in pieces),
        lengths=ints(piece.length for piece in pieces),
        blocks=ints(chain(*tables)),
        block_offsets=offsets(tables),
        rows=ints(chain(*rows)),
        row_offsets=offsets(rows),
        num_pieces=len(pieces),
    )


def call_of(pieces: list[Piece], n: int, g: int, d: int, seed: int = 0, spread: float = 1.0) -> Call:
    """Random numbers, blocks in random order; what is in no piece is NaN, keys and values alike."""
    generator = torch.Generator().manual_seed(seed)
    counts = [(piece.length + B - 1) // B for piece in pieces]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    pools = torch.full((2, sum(counts) + 3, g, B, d), torch.nan).bfloat16()
    for piece, table in zip(pieces, tables, strict=True):
        for place in range(piece.length):
            pools[:, table[place // B], :, place % B] = torch.randn(2, g, d, generator=generator).bfloat16()
    positions = {row: position for piece in pieces for row, position in piece.rows.items()}
    t = max(positions, default=0) + 1
    query = (torch.randn(t, n, d, generator=generator) * spread).bfloat16()
    return Call(
        query=query,
        positions=torch.tensor([positions.get(row, 0) for row in range(t)]),
        keys=pools[0].contiguous(),
        values=pools[1].contiguous(),
        arrays=arrays_of(pieces, tables),
        scale=d**-0.5,
        pieces=pieces,
    )


def decode(*lengths: int) -> list[Piece]:
    """A row for each length, the last of a sequence of its own."""
    return [Piece(0, length, {row: length - 1}) for row, length in enumerate(lengths)]


def shared(prompt: int, *lengths: int) -> list[Piece]:
    """A prompt of a multiple of B tokens that all rows share, and so many tokens of each row's own."""
    rows = {row: prompt + length - 1 for row, length in enumerate(lengths)}
    own = [Piece(prompt, length, {row: rows[row]}) for row, length in enumerate(lengths)]
    return [Piece(0, prompt, rows), *own]


def prefill(length: int, count: int) -> list[Piece]:
    """The last `count` tokens of a sequence, in an order that is none."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return [Piece(0, length, {row: length - count + place for place, row in enumerate(order)})]


def together(*groups: list[Piece]) -> list[Piece]:
    """Pieces of several calls in one: the rows of the later ones follow."""
    result, first = [], 0
    for pieces in groups:
        result += [Piece(p.start, p.length, {row + first: at for row, at in p.rows.items()}) for p in pieces]
        first = 1 + max(row for piece in result for row in piece.rows)
    return result


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true.double()).norm() / true.norm())


CASES = {
    "one row": decode(1100),
    "one key": decode(1),
    "borders": decode(1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129),
    "splits": decode(1023, 1024, 1025, 2048, 2049),
    "unequal": decode(3, 700, 50, 1500, 17, 17, 64, 300, 1, 33, 90, 512, 255, 257, 40, 128),
    "shared": shared(1056, *range(1, 9)),
    "shared by many": shared(160, *([5] * 40)),
    "prefill": prefill(300, 70),
    "prefill of all": prefill(65, 65),
    "long prefill": prefill(1500, 40),
    "together": together(prefill(200, 33), decode(90, 1200), shared(64, 3, 40), prefill(40, 40)),
}


@st.composite
def pieces_of_rows(draw) -> list[Piece]:
    """Rows that see any pieces of a sequence up to any positions, in any order."""
    rows = {row: draw(st.integers(0, 200)) for row in range(draw(st.integers(1, 40)))}
    result = []
    for _ in range(draw(st.integers(1, 5))):
        start, length = B * draw(st.integers(0, 3)), draw(st.integers(1, 150))
        seen = draw(st.lists(st.sampled_from(sorted(rows)), unique=True))
        result.append(Piece(start, length, {row: rows[row] for row in seen}))
    everyone = Piece(0, 1, rows)  # so that no row sees nothing
    return [*result, everyone]
