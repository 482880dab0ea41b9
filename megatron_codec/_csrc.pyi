"""What the C++ extension (csrc/) offers to Python. A stream is any object with contiguous bytes."""

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

class BpeTrainer:
    def __init__(self, max_token_length: int) -> None: ...
    def add(self, stream: Any) -> None: ...
    def merge(self) -> tuple[int, int, int] | None:
        """The pair of ids merged, and how many tokens fewer that left; None if no pair is left."""

class BpeEncoder:
    proper: bool
    def __init__(self, merges: Sequence[tuple[int, int]], ids: list[int], prefix: list[int]) -> None: ...
    def encode(self, stream: Any, later_part: bool = False) -> np.ndarray: ...
    def encode_to_list(self, stream: Any) -> list[int]: ...
    def encode_batch(
        self, streams: Sequence[Any], out: np.ndarray, around: list[int], threads: int
    ) -> np.ndarray: ...
    def last_border(self, stream: Any, start: int) -> int: ...
    def decode(self, ids: np.ndarray) -> bytes: ...

def byte_histogram(stream: Any) -> np.ndarray:
    """How often each byte occurs, int64 [256]: the least work that encoding is measured beside."""

Place = tuple[int, int, int, int]
"""Address of a tensor [s, b, n, d], and its strides but for the last, which is 1."""

class Team:
    def __init__(self, openmp: int, threads: int) -> None: ...

class AttentionShape:
    def __init__(
        self, sequence: int, batch: int, heads: int, groups: int, width: int, scale: float
    ) -> None: ...

def has_amx() -> bool:
    """Whether the kernels below can run; what they take are addresses (model/kernels.py)."""

def attention_forward(
    team: Team, shape: AttentionShape, cos: int, sin: int, *places: Place | int
) -> None: ...
def attention_backward(
    team: Team, shape: AttentionShape, cos: int, sin: int, *places: Place | int
) -> None: ...
def rms_norm_forward(team: Team, rows: int, width: int, epsilon: float, *addresses: int) -> None: ...
def rms_norm_backward(team: Team, rows: int, width: int, *addresses: int) -> None: ...
def swiglu_forward(team: Team, rows: int, width: int, *addresses: int) -> None: ...
def swiglu_backward(team: Team, rows: int, width: int, *addresses: int) -> None: ...

class PagedShape:
    def __init__(self, heads: int, groups: int, block: int, width: int, scale: float) -> None: ...

class Pieces:
    def __init__(self, count: int, *addresses: int) -> None: ...

def rotate_and_store(
    team: Team, shape: PagedShape, tokens: int, qkv: int, cos: int, sin: int, angles: int, *addresses: int
) -> None:
    """This and the next are for generation (inference/kernels.py)."""

def paged_attention(
    team: Team,
    shape: PagedShape,
    tokens: int,
    query: int,
    positions: int,
    keys: int,
    values: int,
    blocks: int,
    pieces: Pieces,
    output: int,
) -> None: ...
def row_attention(
    team: Team,
    shape: PagedShape,
    tokens: int,
    wide: bool,
    query: int,
    positions: int,
    keys: int,
    values: int,
    blocks: int,
    pieces: Pieces,
    output: int,
) -> None: ...
def int8_linear(team: Team, rows: int, out: int, width: int, *addresses: int) -> None: ...
def bf16_linear(team: Team, rows: int, out: int, width: int, *addresses: int) -> None: ...

class JpegFault(enum.Enum):
    """Why a byte of a JPEG scan is refused; csrc/jpeg_scan.hpp."""

    NONE = 0
    CODE = 1
    RANGE = 2
    STUFFING = 3
    PADDING = 4
    MARKER = 5
    AFTER_END = 6
    HEAD = 7

_Place = tuple[int, int, int]  # MCU, block of it, coefficient

class JpegScan:
    """The scan of a baseline JPEG as an automaton; csrc/jpeg_scan.hpp."""

    def __init__(
        self,
        blocks: Sequence[int],
        dc: Sequence[tuple[Sequence[int], bytes]],
        ac: Sequence[tuple[Sequence[int], bytes]],
        mcus: int,
        interval: int,
        canonical: bool,
        ranges: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> None: ...
    def check(self, scan: bytes) -> tuple[JpegFault, int, _Place] | None:
        """The first fault, its offset and place; NONE where bytes are missing, None for a whole scan."""
    def mcu_ends(self, scan: bytes) -> list[int]:
        """For each complete MCU, how many bytes hold nothing of a later one; ends at the first fault."""

    @property
    def states(self) -> int: ...

class JpegCursor:
    """Where a stream stands."""

    def copy(self) -> JpegCursor: ...
    @property
    def mcus(self) -> int: ...

class JpegGrammar:
    """Which tokens can follow in a JPEG; csrc/jpeg_grammar.hpp."""

    def __init__(self, scan: JpegScan, head: bytes, tokens: Sequence[bytes], memory: int) -> None: ...
    def begin(self) -> JpegCursor: ...
    def read(self, at: JpegCursor, token: int) -> bool: ...
    def read_bytes(self, at: JpegCursor, stream: bytes) -> tuple[JpegFault, int, _Place]: ...
    def done(self, at: JpegCursor) -> bool: ...
    def finish(self, at: JpegCursor) -> int: ...
    def allow(self, cursors: Sequence[JpegCursor], left: Sequence[int], rows: int, stride: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def memory(self) -> int: ...
