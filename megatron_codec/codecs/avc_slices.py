"""Headers of slices (ITU-T H.264, 7.3.3) as x264 writes them with a codec's settings: what can follow.

A header is a walk through nodes, a bit a step. The nodes behind first_mb_in_slice are the same for all slices
of a frame.
"""

from dataclasses import dataclass
from functools import lru_cache

from megatron_codec.codecs.nal import Bits, I, P

IDR, PREDICTED, INTRA, OPEN = 0, 1, 2, 3  # of a frame; OPEN: PREDICTED or INTRA, its first slice will say
# Bits behind the header of the shortest slices that decode, the stop bit included: mb_skip_run 1; or mb_type
# I_16x16_2_0_0, the only prediction without neighbours, intra_chroma_pred_mode 0, mb_qp_delta 0, no levels.
_TAIL_BITS = {IDR: 9, PREDICTED: 4, INTRA: 9}
_KEPT = 1 << 14


class Node:
    """A place between two bits of a slice's header, or behind its last.

    Args:
        zero, one: what each bit leads to; None where it cannot come.
        kind, idr_pic_id: of the frame, known behind the header; before, those of the shortest slice.
    """

    __slots__ = ("_table", "idr_pic_id", "kind", "left", "one", "over", "zero")

    def __init__(self, zero: "Node | None", one: "Node | None", kind: int = IDR, idr_pic_id: int = 0):
        self.zero, self.one, self.over = zero, one, zero is None and one is None
        if self.over:
            self.kind, self.idr_pic_id, self.left = kind, idr_pic_id, _TAIL_BITS[kind]
        else:
            near = min((node for node in (one, zero) if node), key=lambda node: node.left)
            self.kind, self.idr_pic_id, self.left = near.kind, near.idr_pic_id, near.left + 1
        self._table: dict[int, tuple[Node, int]] | None = None

    @property
    def table(self) -> dict[int, tuple["Node", int]]:
        """What each byte of payload leads to: the node, and bytes that the slice still has to have."""
        if self._table is None:
            found: dict[int, tuple[Node, int]] = {}
            self._expand(found, 0, 0)
            self._table = found
        return self._table

    def _expand(self, found: dict[int, tuple["Node", int]], value: int, bits: int) -> None:
        if self.over:
            free = 8 - bits
            need = max(0, -(-(self.left - free) // 8))
            for fill in range(1 << free):
                found[value << free | fill] = (self, need)
        elif bits == 8:
            found[value] = (self, 0)
        else:
            for bit, node in ((0, self.zero), (1, self.one)):
                if node:
                    node._expand(found, value << 1 | bit, bits + 1)

    @lru_cache(maxsize=_KEPT)  # noqa: B019 - nodes are few and live as long as their codec's grammar
    def shortest(self, zeros: int) -> int:
        """Bytes of the shortest rest of the slice.

        Args:
            zeros: bytes 00 just before, at most 2; -1 behind an emulation prevention byte.
        """
        bits, node = "", self
        while not node.over:
            near_one = node.one and (not node.zero or node.one.left <= node.zero.left)
            bits += "1" if near_one else "0"
            following = node.one if near_one else node.zero
            assert following
            node = following
        bits += "1" * node.left
        bits += "1" * (-len(bits) % 8)
        count = 0
        for start in range(0, len(bits), 8):
            byte = int(bits[start : start + 8], 2)
            if zeros == 2 and byte <= 3:
                count, zeros = count + 1, -1
            count += 1
            zeros = max(zeros, 0) + 1 if byte == 0 else 0
        return count


def ue(value: int) -> str:
    """The unsigned Exp-Golomb code (9.1)."""
    code = f"{value + 1:b}"
    return "0" * (len(code) - 1) + code


def se(value: int) -> str:
    """The signed Exp-Golomb code (9.1.1)."""
    return ue(2 * value - 1 if value > 0 else -2 * value)


def choice(codes: dict[str, Node]) -> Node:
    """A field with these codes, none of which begins another, and what follows each."""
    if "" in codes:
        return codes[""]
    zero, one = ({code[1:]: node for code, node in codes.items() if code[0] == bit} for bit in "01")
    return Node(choice(zero) if zero else None, choice(one) if one else None)


@dataclass(frozen=True)
class PictureParameters:
    """What a picture parameter set says (7.3.2.2) of its slices.

    Args:
        references: num_ref_idx_l0_default_active, which is also the most that x264 uses.
        qp: before slice_qp_delta.
        deblocking: whether slices have the fields of the deblocking filter.
    """

    references: int
    qp: int
    deblocking: bool


def picture_parameters(content: bytes) -> PictureParameters:
    """Reads a PPS without slice groups, header byte included."""
    bits = Bits(content[1:])
    for _ in range(2):
        bits.ue()  # pic_parameter_set_id, seq_parameter_set_id
    bits.u(2)  # entropy_coding_mode_flag, bottom_field_pic_order_in_frame_present_flag
    bits.ue()  # num_slice_groups_minus1
    references = bits.ue() + 1
    bits.ue()  # num_ref_idx_l1_default_active_minus1
    bits.u(3)  # weighted_pred_flag, weighted_bipred_idc
    qp = 26 + _signed(bits.ue())
    for _ in range(2):
        bits.ue()  # pic_init_qs_minus26, chroma_qp_index_offset
    return PictureParameters(references, qp, bool(bits.u(1)))


def _signed(code: int) -> int:
    return (code + 1) // 2 if code % 2 else -(code // 2)


class SliceHeaders:
    """The headers of a codec's slices.

    Args:
        pps: of the codec, header byte included.
        frame_num_bits: of its SPS.
    """

    def __init__(self, pps: bytes, frame_num_bits: int):
        self._pps, self._bits = picture_parameters(pps), frame_num_bits
        self.root = lru_cache(maxsize=_KEPT)(self._root)
        self._fields = lru_cache(maxsize=_KEPT)(self._fields_behind)

    def _root(self, first_mb: int, kind: int, age: int, idr_pic_id: int) -> Node:
        """The beginning of the header of a slice.

        Args:
            age: frames since the last IDR picture.
            idr_pic_id: of the last IDR picture, also if this is a later slice of it; -1 if there was none.
        """
        later = first_mb > 0 and kind == IDR
        return choice({ue(first_mb): self._fields(kind, age, idr_pic_id, later)})

    def _fields_behind(self, kind: int, age: int, idr_pic_id: int, later: bool) -> Node:
        if kind == OPEN:
            kinds = [(PREDICTED, P), (INTRA, I)]
        else:
            kinds = [(kind, P if kind == PREDICTED else I)]
        # x264 says 5 to 9: all slices of the picture are of this type.
        types = {
            ue(5 + kind_of_slice): self._behind_type(k, age, idr_pic_id, later) for k, kind_of_slice in kinds
        }
        return choice(types)

    def _behind_type(self, kind: int, age: int, idr_pic_id: int, later: bool) -> Node:
        frame_num = ue(0) + f"{age % (1 << self._bits):0{self._bits}b}"  # pic_parameter_set_id before it
        if kind == IDR:
            ids = (idr_pic_id,) if later else tuple({0, 1} - {idr_pic_id})
            # no_output_of_prior_pics_flag and long_term_reference_flag
            return choice({frame_num: choice({ue(id) + "00": self._quantizer(kind, id) for id in ids})})
        last = self._quantizer(kind, idr_pic_id)
        if kind == INTRA:
            return choice({frame_num + "0": last})  # adaptive_ref_pic_marking_mode_flag
        counts = range(1, min(self._pps.references, age) + 1)
        active = ("0" if count == self._pps.references else "1" + ue(count - 1) for count in counts)
        # ref_pic_list_modification_flag_l0 and adaptive_ref_pic_marking_mode_flag
        return choice({frame_num: choice({code + "00": last for code in active})})

    def _quantizer(self, kind: int, idr_pic_id: int) -> Node:
        node = Node(None, None, kind, idr_pic_id)
        if self._pps.deblocking:
            # On with offsets of 0, or off, as x264 has it below QP 16.
            node = choice({ue(0) + se(0) + se(0): node, ue(1): node})
        return choice({se(qp - self._pps.qp): node for qp in range(52)})
