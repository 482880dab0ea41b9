"""Which tokens can follow in a stream of an `AvcCodec`, so that its NAL units become those of a whole clip.

The automaton knows start codes, emulation prevention, parameter sets and the header of every slice, which it
takes as x264 writes it; the macroblock behind a header is free bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megatron_codec.codecs.avc_check import Layout
from megatron_codec.codecs.avc_slices import IDR, OPEN, PREDICTED, Node, SliceHeaders
from megatron_codec.codecs.nal import IDR_SLICE, SLICE, SPS, nal_units, sequence_parameters
from megatron_codec.errors import UserError

ROW_BYTES = 64 << 20  # of rows that are kept
_NEVER = 1 << 30
_IDR_HEADER, _HEADER, _SPS_HEADER = 0x60 | IDR_SLICE, 0x40 | SLICE, 0x60 | SPS  # as x264 has nal_ref_idc
_IDR_START = b"\x00\x00\x01" + bytes([_IDR_HEADER])


class Slice(NamedTuple):
    """Which slice of a stream: its frame and macroblock, the frame's kind, `age` frames after the last IDR
    picture, and idr_pic_id of that, -1 if there was none."""

    frame: int
    macroblock: int
    kind: int
    age: int
    idr_pic_id: int


class Head(NamedTuple):
    """Within the bytes before the first slice of an IDR picture; `at` is the slice they lead to."""

    at: Slice
    position: int


class Start(NamedTuple):
    """Behind a start code of so many bytes, before the slice `at`."""

    at: Slice
    length: int


class Header(NamedTuple):
    """Within a slice's header. Of `zeros`, -1 says that an emulation prevention byte was last."""

    at: Slice
    node: Node
    zeros: int


class Data(NamedTuple):
    """Behind a slice's header. Bytes are needed before it may end; `opens` says that the zeros just read
    can be those of the next start code."""

    at: Slice
    need: int
    zeros: int
    opens: bool


State = Head | Start | Header | Data


class AvcAutomaton:
    """Reads a stream byte by byte, and knows the length of the shortest rest.

    Args:
        layout: of the streams; its head may not be empty.
    """

    def __init__(self, layout: Layout):
        sps, pps = (layout.head[unit.begin : unit.end] for unit in nal_units(layout.head))
        self.headers = SliceHeaders(pps, sequence_parameters(sps).frame_num_bits)
        self.last_frame, self.last = layout.frames - 1, layout.size[0] * layout.size[1] - 1
        self.before_idr = (b"" if layout.head_removed else layout.head) + _IDR_START
        self.head_removed = layout.head_removed
        self._frame = lru_cache(maxsize=256)(self._frame_rests)
        self._future = lru_cache(maxsize=None)(self._future_bytes)
        self.begin: State = Head(Slice(0, 0, IDR, 0, -1), 0)

    def codes(self, at: Slice) -> tuple[bool, bool]:
        """Whether a start code of 3 bytes, and of 4, can follow a slice."""
        if at.macroblock < self.last:
            return True, False
        later = at.frame < self.last_frame
        return later and self.head_removed, later

    def step(self, state: State, byte: int) -> State | None:
        """The state behind a byte, None where it cannot come."""
        if isinstance(state, Data):
            return self._data(state, byte)
        if isinstance(state, Header):
            return self._header(state, byte)
        at = state.at
        if isinstance(state, Start):
            if at.macroblock:
                return self._root(at) if byte == (_IDR_HEADER if at.kind == IDR else _HEADER) else None
            idr = Slice(at.frame, 0, IDR, 0, at.idr_pic_id)
            if state.length == 3:
                return self._root(idr) if byte == _IDR_HEADER else None
            if byte == _SPS_HEADER and not self.head_removed:
                return Head(idr, 5)
            return self._root(at) if byte == _HEADER else None
        if byte != self.before_idr[state.position]:
            return None
        after = state.position + 1
        return Head(at, after) if after < len(self.before_idr) else self._root(at)

    def _root(self, at: Slice) -> Header:
        return Header(at, self.headers.root(*at[1:]), 0)

    def _header(self, state: Header, byte: int) -> State | None:
        at, node, zeros = state
        if zeros == 2:
            if byte == 3:
                return Header(at, node, -1)
            if byte < 3:
                return None
        elif zeros < 0 and byte > 3:
            return None
        found = node.table.get(byte)
        if found is None:
            return None
        after, need = found
        zeros = 0 if byte else max(zeros, 0) + 1
        if not after.over:
            return Header(at, after, zeros)
        return Data(at._replace(kind=after.kind, idr_pic_id=after.idr_pic_id), need, zeros, False)

    def _data(self, state: Data, byte: int) -> State | None:
        at, need, zeros, opens = state
        less = need - 1 if need else 0
        if zeros == 0:
            if byte:
                return Data(at, less, 0, False)
            return Data(at, less, 1, need == 0 and any(self.codes(at)))
        if zeros == 1:
            return Data(at, less, 0, False) if byte else Data(at, less, 2, opens)
        if zeros < 0:
            return None if byte > 3 else Data(at, less, 0 if byte else 1, False)
        if zeros == 3:
            return Start(self._next(at), 4) if byte == 1 else None
        if byte == 3:
            return Data(at, need, -1, False)
        if byte > 3:
            return Data(at, less, 0, False)
        short, long = self.codes(at)
        if byte == 0 and opens and long:
            return Data(at, 0, 3, True)
        return Start(self._next(at), 3) if byte == 1 and opens and short else None

    def _next(self, at: Slice) -> Slice:
        if at.macroblock < self.last:
            return at._replace(macroblock=at.macroblock + 1)
        return Slice(at.frame + 1, 0, OPEN, at.age + 1, at.idr_pic_id)

    def bytes_after(self, state: State) -> Sequence[int]:
        """All bytes that can come next, and perhaps some that cannot."""
        if isinstance(state, Head):
            return (self.before_idr[state.position],)
        if isinstance(state, Start):
            return (_HEADER, _IDR_HEADER, _SPS_HEADER)
        if isinstance(state, Header):
            return [*state.node.table, *((3,) if state.zeros == 2 and 3 not in state.node.table else ())]
        return range(256)

    def done(self, state: State) -> bool:
        """Whether the stream is whole."""
        if not isinstance(state, Data) or state.need or state.zeros:
            return False
        return state.at.macroblock == self.last and state.at.frame == self.last_frame

    def finish(self, state: State) -> int:
        """Bytes of the shortest rest of the stream."""
        at = state.at
        if isinstance(state, Data):
            return self.own(state.need, state.zeros, state.opens) + self.rest(at)
        if isinstance(state, Start):
            if state.length == 3 and at.macroblock == 0:
                at = Slice(at.frame, 0, IDR, 0, at.idr_pic_id)
            return 1 + self.finish(self._root(at))
        if isinstance(state, Head):
            return len(self.before_idr) - state.position + self.finish(self._root(at))
        node = state.node
        chosen = at._replace(kind=node.kind, idr_pic_id=node.idr_pic_id)
        return node.shortest(state.zeros) + self.rest(chosen)

    @staticmethod
    def own(need: int, zeros: int, opens: bool) -> int:
        """Bytes by which the shortest rest of the stream differs, in a slice's data, from `rest`."""
        return -zeros if opens else max(need, 1 if zeros else 0)

    def rest(self, at: Slice) -> int:
        """Bytes of the shortest units behind a slice, their start codes included."""
        return self._frame(*at[2:])[at.macroblock] + self._future(at.frame, at.age)

    def _frame_rests(self, kind: int, age: int, idr_pic_id: int) -> list[int]:
        """Of each macroblock of a frame, the bytes of the slices behind it."""
        units = [4 + self._shortest(n, kind, age, idr_pic_id) for n in range(self.last, 0, -1)]
        return list(accumulate(units, initial=0))[::-1]

    def _future_bytes(self, frame: int, age: int) -> int:
        """Of the frames behind one, all predicted: those are the shortest."""
        total = 0
        for later in range(1, self.last_frame - frame + 1):
            total += 5 + self._shortest(0, PREDICTED, age + later, 0)
            total += self._frame(PREDICTED, age + later, 0)[0]
        return total

    def _shortest(self, macroblock: int, kind: int, age: int, idr_pic_id: int) -> int:
        return self.headers.root(macroblock, kind, age, idr_pic_id).shortest(0)


class _Tree:
    """Tokens by their bytes."""

    __slots__ = ("branches", "tokens")

    def __init__(self):
        self.branches: dict[int, _Tree] = {}
        self.tokens: list[int] = []


@dataclass(frozen=True)
class _Inner:
    """What tokens do within a slice's data: the bytes by which the shortest rest then differs from
    `AvcAutomaton.rest`, int32 [tokens], and the trees that go on behind a start code, of how many bytes."""

    own: np.ndarray
    beyond: list[tuple[_Tree, int]]


@dataclass
class AvcCursor:
    """Where a stream stands."""

    state: State

    def copy(self) -> "AvcCursor":
        """Another that moves by itself."""
        return AvcCursor(self.state)


class AvcGrammar:
    """See `codecs.base.Grammar`.

    Args:
        layout: of the streams; its head may not be empty.
        tokens: the bytes of each.
    """

    def __init__(self, layout: Layout, tokens: Sequence[bytes]):
        self.automaton, self.tokens = AvcAutomaton(layout), list(tokens)
        self._tree = _Tree()
        for number, token in enumerate(self.tokens):
            tree = self._tree
            for byte in token:
                tree = tree.branches.setdefault(byte, _Tree())
            if token:
                tree.tokens.append(number)
        self._rows: dict[State, np.ndarray] = {}
        self._room = max(1, ROW_BYTES // (4 * max(1, len(self.tokens))))
        self._inner: dict[tuple, _Inner] = {}

    def begin(self, prompt: bytes) -> AvcCursor:
        """Where a stream stands after its first bytes. Raises UserError where no clip begins so."""
        state = self.automaton.begin
        for offset, byte in enumerate(prompt):
            after = self.automaton.step(state, byte)
            if after is None:
                raise UserError(
                    f"byte {offset} of its stream",
                    f"cannot be part of a clip: {byte:02X} {_place(state)}",
                    "cut the prompt from a valid stream, or switch the grammar off (constrain)",
                )
            state = after
        return AvcCursor(state)

    def allow(self, cursors: Sequence[AvcCursor], left: Sequence[int], rows: np.ndarray) -> None:
        """Writes 1 into rows [b, at least the number of tokens], uint8, for every token that can come next,
        else 0."""
        rows[:] = 0
        for cursor, room, row in zip(cursors, left, rows, strict=True):
            found, own = self._row(cursor.state), row[: len(self.tokens)]
            # A limit too short for any end cuts the sample, as it would without one.
            enough = room if room >= self.automaton.finish(cursor.state) else _NEVER
            np.less(found, enough, out=own, casting="unsafe")

    def read(self, cursor: AvcCursor, token: int) -> bool:
        """Moves on by a token; False, and nothing moved, where that cannot come."""
        state: State | None = cursor.state
        for byte in self.tokens[token]:
            state = self.automaton.step(state, byte)
            if state is None:
                return False
        cursor.state = state
        return bool(self.tokens[token])

    def done(self, cursor: AvcCursor) -> bool:
        """Whether the stream has ended: it may, and its last slice may also go on."""
        return self.automaton.done(cursor.state)

    def finish(self, cursor: AvcCursor) -> int:
        """Tokens that are enough to end the stream."""
        return self.automaton.finish(cursor.state)

    def _row(self, state: State) -> np.ndarray:
        """Of each token the bytes of the shortest rest behind it, int32."""
        row = self._rows.get(state)
        if row is None:
            row = self._found(state)
            if len(self._rows) >= self._room:
                self._rows.clear()
            self._rows[state] = row
        return row

    def _found(self, state: State) -> np.ndarray:
        if not isinstance(state, Data):
            row = np.full(len(self.tokens), _NEVER, np.int32)
            self._walk(self._tree, state, row)
            return row
        automaton, at = self.automaton, state.at
        key = (*state[1:], *automaton.codes(at))
        inner = self._inner.get(key)
        if inner is None:
            inner = self._inner[key] = self._within(state)
        row = inner.own + np.int32(automaton.rest(at))
        following = automaton._next(at)
        for tree, length in inner.beyond:
            self._walk(tree, Start(following, length), row)
        return row

    def _walk(self, tree: _Tree, state: State, row: np.ndarray) -> None:
        if tree.tokens:
            row[tree.tokens] = self.automaton.finish(state)
        branches = tree.branches
        if not branches:
            return
        for byte in self.automaton.bytes_after(state) if len(branches) > 3 else branches:
            branch = branches.get(byte)
            after = self.automaton.step(state, byte) if branch else None
            if branch and after:
                self._walk(branch, after, row)

    def _within(self, state: Data) -> _Inner:
        inner = _Inner(np.full(len(self.tokens), _NEVER, np.int32), [])

        def walk(tree: _Tree, at: Data) -> None:
            inner.own[tree.tokens] = self.automaton.own(*at[1:])
            for byte, branch in tree.branches.items():
                after = self.automaton.step(at, byte)
                if isinstance(after, Data):
                    walk(branch, after)
                elif isinstance(after, Start):
                    inner.beyond.append((branch, after.length))

        for byte, branch in self._tree.branches.items():
            after = self.automaton.step(state, byte)
            if isinstance(after, Data):
                walk(branch, after)
            elif isinstance(after, Start):
                inner.beyond.append((branch, after.length))
        return inner


def _place(state: State) -> str:
    """Where a byte did not fit."""
    at = f"frame {state.at.frame}, macroblock {state.at.macroblock}"
    if isinstance(state, Head):
        return f"differs from the parameter sets and the start of frame {state.at.frame}"
    if isinstance(state, Start):
        return f"is not the NAL unit type due before {at}"
    if isinstance(state, Header):
        return f"does not fit into the slice header of {at}"
    return f"breaks a start code, emulation prevention or the end of the slice of {at}"
