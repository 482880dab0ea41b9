"""Random Huffman tables, frames, tokens, bytes and budgets: what has to hold for all of them.

bash tests/run.sh -m slow tests/unit/test_jpeg_fuzz.py     # 20,000 rounds
bash csrc/sanitize.sh                                      # under sanitizers
"""

import random

import pytest

from megatron_codec._csrc import JpegFault, JpegGrammar
from megatron_codec.codecs.jpeg_format import Format, check_file
from megatron_codec.errors import UserError
from tests.jpeg_layouts import random_layout
from tests.jpeg_sampling import DAMAGES, Setting, allowed, damage, finish_by_walking, window

slow = [pytest.mark.slow, pytest.mark.timeout(6000)]
MARKERS = [bytes((0xFF, 0xD0 + i)) for i in range(10)]


def random_tokens(rng: random.Random) -> list[bytes]:
    """The bytes, and tokens of several, some of which hold markers or what no scan has."""
    pieces = [*MARKERS, b"\xff\x00", b"\xff\xff", b"\xff\xc0", *(bytes([i]) for i in range(256))]
    more = [b"".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(rng.randint(0, 80))]
    return [*(bytes([i]) for i in range(256)), *more]


def random_grammar(rng: random.Random) -> tuple[Format, JpegGrammar, list[bytes]]:
    while True:
        layout = random_layout(rng)
        flags = {"canonical": rng.random() < 0.5, "in_range": rng.random() < 0.5}
        try:
            if layout is not None:
                tokens = random_tokens(rng)
                head = rng.randbytes(rng.choice([0, 0, 3]))
                memory = rng.choice([0, 1000, 1 << 20])
                return layout, JpegGrammar(layout.scan(**flags), head, tokens, memory), tokens
        except UserError as error:
            assert "Huffman tables" in str(error)


def one_round(rng: random.Random) -> None:
    """Follows one stream to its end, or for so many tokens."""
    layout, found, tokens = random_grammar(rng)
    at = found.begin()
    left = found.finish(at) + rng.choice([0, 1, 5, 40]) if rng.random() < 0.7 else -1
    stream = b""
    for step in range(40):
        if found.done(at):
            break
        [row] = allowed(found, [at], [left], len(tokens))
        assert row.any(), "a dead end"
        shorter = finish_by_walking(found, at) if step % 20 == 0 and found.finish(at) < 60 else None
        assert shorter is None or shorter == found.finish(at)
        for token in rng.sample(range(len(tokens)), 12):
            then = at.copy()
            readable = found.read(then, token)
            assert row[token] == (readable and (left < 0 or found.finish(then) < left))
            broken = at.copy()
            fault, count, _ = found.read_bytes(broken, tokens[token])
            assert (fault == JpegFault.NONE) == readable == (count == len(tokens[token]))
        chosen = rng.choice(row.nonzero()[0].tolist())
        assert found.read(at, chosen)
        stream += tokens[chosen]
        left -= left > 0
        assert left < 0 or found.finish(at) <= left
    again = found.begin()
    assert found.read_bytes(again, stream)[:2] == (JpegFault.NONE, len(stream))
    assert found.finish(again) == found.finish(at) and again.mcus == at.mcus <= layout.mcus


@pytest.mark.parametrize("rounds", [150, pytest.param(20_000, marks=slow)])
def test_random_grammars(rounds):
    rng = random.Random(rounds)
    for _ in range(rounds):
        one_round(rng)


@pytest.mark.parametrize("rounds", [300, pytest.param(40_000, marks=slow)])
def test_files_with_several_damages_have_a_verdict(rounds):
    rng = random.Random(rounds)
    for number in range(rounds):
        if number % 20 == 0:
            setting = Setting.draw(rng, 48)
            file = setting.save(window(rng, setting.width, setting.height))
        broken = file
        for _ in range(rng.randint(1, 6)):
            try:
                broken = damage(rng, broken, rng.choice(DAMAGES[:2]))
            except ValueError:  # its head is no head any more
                break
        report = check_file(broken, canonical=rng.random() < 0.5, in_range=rng.random() < 0.5)
        assert report.valid or (report.reason and report.offset is not None and report.offset <= len(broken))
