"""What the grammar allows token by token: against the automaton byte by byte, with and without a budget."""

import io
import itertools
import random

import pytest

from megatron_codec._csrc import JpegFault, JpegGrammar
from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.jpeg_format import check_scan, parse
from tests.data_sources import photo_crops
from tests.jpeg_agreement import forced
from tests.jpeg_oracle import first_fault
from tests.jpeg_sampling import (
    SAMPLINGS,
    Samples,
    Setting,
    allowed,
    finish_by_walking,
    grammar,
    tokens,
    window,
)

SETTINGS = [
    Setting(48, 32, "4:2:0", 25, 1, 320),
    Setting(40, 24, "4:2:2", 3, 0, 1024),
    Setting(33, 17, "4:4:4", 90, 2, 256),
    Setting(64, 48, "grey", 50, 5, 512),
]
FLAGS = [{}, {"canonical": True}, {"in_range": True}, {"canonical": True, "in_range": True}]
EVERY = list(itertools.product(SETTINGS, FLAGS))
BYTES = [bytes([i]) for i in range(256)]


def optimized(quality: int, in_range: bool, seed: int) -> JpegGrammar:
    """Of a picture's own Huffman tables, which have codes for what is in it only, over bytes alone."""
    picture, buffer = window(random.Random(seed), 24, 24), io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True, restart_marker_blocks=seed % 3)
    return JpegGrammar(parse(buffer.getvalue()).scan(in_range=in_range), b"", BYTES, 1 << 20)


@pytest.mark.parametrize(("setting", "flags"), EVERY)
def test_a_token_is_allowed_where_its_bytes_are(setting, flags):
    rng, found = random.Random(1), grammar(setting, **flags)
    layout, table = setting.layout, tokens(setting.vocabulary)
    at, scan, steps = found.begin(), b"", 0
    while not found.done(at):
        [row] = allowed(found, [at], [-1], setting.vocabulary)
        readable = [found.read(at.copy(), token) for token in range(len(table))]
        assert row.tolist() == readable
        if steps % 20 == 0 and len(scan) < 200:
            for token in rng.sample(range(len(table)), 6):
                fault = first_fault(layout, scan + table[token], **flags)
                assert readable[token] == (fault is None or fault >= len(scan + table[token]))
        token = rng.choice(row.nonzero()[0].tolist())
        assert found.read(at, token)
        scan, steps = scan + table[token], steps + 1
    assert not allowed(found, [at], [-1], setting.vocabulary).any()
    assert check_scan(layout, layout.scan(**flags), scan).valid


@pytest.mark.parametrize(("setting", "flags"), EVERY)
def test_rows_do_not_depend_on_the_cache(setting, flags):
    """A cache of one row, one that is filled, and one of another order of cursors."""
    tiny, ample = grammar(setting, memory=1, **flags), grammar(setting, **flags)
    rng = random.Random(2)
    for _ in range(2):
        one, other = tiny.begin(), ample.begin()
        while not tiny.done(one):
            row = allowed(tiny, [one], [-1], setting.vocabulary)
            assert (row == allowed(ample, [other], [-1], setting.vocabulary)).all()
            assert tiny.rows <= 1
            token = rng.choice(row[0].nonzero()[0].tolist())
            assert tiny.read(one, token) and ample.read(other, token)
            assert one.mcus == other.mcus
    assert ample.rows > 1 or flags.get("in_range")


def test_memory_is_bounded():
    setting = SETTINGS[0]
    bound = 1 << 16
    small = grammar(setting, memory=bound)
    fixed = small.memory
    for seed in range(3):
        Samples(small, setting.vocabulary, [-1] * 8, 1.0, seed).draw()
        assert small.rows >= 1 and small.memory - fixed <= bound


@pytest.mark.parametrize(("setting", "flags"), EVERY)
def test_finish_is_the_length_of_a_continuation(setting, flags):
    found, rng = grammar(setting, **flags), random.Random(3)
    at = found.begin()
    shortest = found.finish(at)
    assert finish_by_walking(found, at) == shortest
    steps = 0
    while not found.done(at):
        [row] = allowed(found, [at], [-1], setting.vocabulary)
        found.read(at, rng.choice(row.nonzero()[0].tolist()))
        if steps % 25 == 0:
            assert finish_by_walking(found, at) == found.finish(at)
        steps += 1


@pytest.mark.parametrize("in_range", [False, True])
@pytest.mark.parametrize("quality", [1, 30, 95])
def test_finish_with_tables_that_lack_cheap_codes(quality, in_range):
    for seed in range(6):
        found, rng = optimized(quality, in_range, seed), random.Random(seed)
        at = found.begin()
        for _ in range(12):
            assert finish_by_walking(found, at) == found.finish(at)
            for _ in range(5):
                [row] = allowed(found, [at], [-1], 256)
                if row.any():
                    found.read(at, rng.choice(row.nonzero()[0].tolist()))


@pytest.mark.parametrize(("setting", "flags"), EVERY)
@pytest.mark.parametrize("slack", [0, 1, 7, 60])
def test_a_budget_leads_to_a_whole_picture(setting, flags, slack):
    found = grammar(setting, **flags)
    least = found.finish(found.begin())
    samples = Samples(found, setting.vocabulary, [least + slack] * 4, 2.0, slack)
    for drawn, scan in zip(samples.drawn, samples.draw(), strict=False):
        assert drawn <= least + slack
        assert check_scan(setting.layout, setting.layout.scan(**flags), scan).valid
    assert max(samples.drawn) <= least + slack


@pytest.mark.parametrize("in_range", [False, True])
def test_a_budget_with_tables_that_lack_cheap_codes(in_range):
    for seed in range(6):
        found, rng = optimized(40, in_range, seed), random.Random(seed)
        at, left = found.begin(), found.finish(found.begin()) + 3
        while not found.done(at):
            [row] = allowed(found, [at], [left], 256)
            found.read(at, rng.choice(row.nonzero()[0].tolist()))
            left -= 1
            assert found.finish(at) <= left


@pytest.mark.parametrize(("setting", "flags"), EVERY)
def test_a_budget_masks_exactly_what_would_break_it(setting, flags):
    found, rng = grammar(setting, **flags), random.Random(5)
    at = found.begin()
    for step in range(60):
        if found.done(at):
            break
        [free] = allowed(found, [at], [-1], setting.vocabulary)
        enough = found.finish(at)
        for left in (enough, enough + rng.randint(0, 4), enough + rng.randint(0, 300)):
            [row] = allowed(found, [at], [left], setting.vocabulary)
            assert row.any()
            if step % 6 == 0:
                for token in range(setting.vocabulary):
                    then = at.copy()
                    assert row[token] == (found.read(then, token) and found.finish(then) < left)
        found.read(at, rng.choice(free.nonzero()[0].tolist()))


def test_the_head_is_a_chain_that_has_one_way():
    codec = JpegCodec(32)
    table = [
        *BYTES,
        codec.head[:2],
        codec.head[1:5],
        codec.head[-4:] + b"\x28",
        codec.head[-1:] + b"\xff\xff",
    ]
    found = JpegGrammar(codec.format.scan(), codec.head, table, 1 << 20)
    at = found.begin()
    assert found.finish(at) == len(codec.head) + 4 * 4 + 4 * 2
    for place, byte in enumerate(codec.head):
        [row] = allowed(found, [at], [-1], len(table))
        rest = codec.head[place:]
        for token, text in enumerate(table):
            if len(text) <= len(rest):
                assert row[token] == rest.startswith(text)
        assert row[258] == (place == len(codec.head) - 4) and not row[259]
        assert found.read(at, byte)
    stream = codec.encode(photo_crops(1, 32)[0])
    assert found.read_bytes(at, stream[len(codec.head) :])[1] == len(stream) - len(codec.head)
    assert found.done(at)


def test_a_prompt_is_read_or_its_fault_told():
    codec = JpegCodec(32)
    found = JpegGrammar(codec.format.scan(), codec.head, BYTES, 1 << 20)
    stream = codec.encode(photo_crops(1, 32)[0])
    for length in range(0, len(stream), 11):
        at = found.begin()
        assert found.read_bytes(at, stream[:length])[:2] == (JpegFault.NONE, length)
        broken = stream[:length] + bytes([stream[length] ^ 0x55])
        before = found.begin()
        _, offset, place = found.read_bytes(before, broken + b"\xff\xff\xff\xff")
        assert length <= offset < length + 5 and place[0] <= 4
        # The cursor stays where it was.
        assert found.finish(before) == found.finish(found.begin())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_token_of_a_real_picture_is_masked(sampling):
    rng = random.Random(sampling)
    for vocabulary in (256, 1024):
        setting = Setting(64, 48, sampling, rng.randint(1, 95), rng.choice([0, 1, 3]), vocabulary)
        pictures = [window(rng, 64, 48) for _ in range(5)]
        assert forced(setting, pictures, canonical=True, in_range=True) > 0


def test_tokens_longer_than_an_interval():
    """A token may hold whole MCUs with their markers, and reach EOI."""
    grey = b"\x28\xa2\x8a\x00"
    chain = [grey + bytes((0xFF, 0xD0 + i)) for i in range(8)]
    table = [*BYTES, *chain, b"".join(chain), chain[0] + grey + b"\xff\xd9", b"\xff\xd9", grey * 2]
    layout = Setting(48, 48, "4:2:0", 25, 1, 256).layout
    found = JpegGrammar(layout.scan(), b"", table, 1 << 20)
    at = found.begin()
    assert allowed(found, [at], [-1], len(table))[0].nonzero()[0].tolist()[-2:] == [256, 264]
    assert found.read(at, 264) and at.mcus == 8
    assert not allowed(found, [at], [-1], len(table))[0][256:].any()
    assert found.read_bytes(at, grey)[1] == 4
    assert allowed(found, [at], [-1], len(table))[0].nonzero()[0].tolist() == [0xFF, 266]
    assert found.finish(at) == 2
    assert allowed(found, [at], [2], len(table))[0].nonzero()[0].tolist() == [0xFF, 266]
