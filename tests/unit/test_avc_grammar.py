"""The grammar of clips: what it lets through is a whole clip, and no real clip is held back."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest

from megatron_codec.codecs import AvcCodec
from megatron_codec.codecs.avc_grammar import AvcGrammar, Data, Header
from megatron_codec.codecs.avc_slices import IDR, PREDICTED
from megatron_codec.codecs.nal import IDR_SLICE, SLICE, nal_units
from megatron_codec.errors import UserError
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import VIDEOS, debian_video, real_video
from tests.llama import SMALL, small_model
from tests.videos import moving

FULL = AvcCodec()
SMALL_CLIPS = [
    AvcCodec(frames=4, width=48, height=32),
    AvcCodec(frames=4, width=48, height=32, remove_head=True),
    AvcCodec(frames=3, width=32, height=32, qp=10),
    AvcCodec(frames=18, width=16, height=16),
]
BYTES = [bytes([byte]) for byte in range(256)]


def noise(codec: AvcCodec, seed: int = 0) -> np.ndarray:
    """Frames of which each is a scene of its own."""
    shape = (codec.frames, codec.height // 4, codec.width // 4, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8).repeat(4, 1).repeat(4, 2)


def streams(codec: AvcCodec) -> list[bytes]:
    frames = moving(codec.frames, codec.width, codec.height)
    return [codec.encode(clip) for clip in (frames, noise(codec), np.zeros_like(frames))]


def vocabulary(codec: AvcCodec, size: int) -> list[bytes]:
    tokenizer = Tokenizer.train(streams(codec), size, codec=codec.to_dict())
    return [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]


def grammar_of(codec: AvcCodec, tokens: list[bytes]) -> AvcGrammar:
    grammar = codec.grammar(tokens)
    assert grammar is not None
    return grammar


def row_of(grammar: AvcGrammar, cursor, left: int) -> np.ndarray:
    row = np.full((1, len(grammar.tokens) + 3), 7, np.uint8)
    grammar.allow([cursor], [left], row)
    assert not row[0, len(grammar.tokens) :].any()
    return row[0, : len(grammar.tokens)]


def sample(grammar: AvcGrammar, limit: int, rng: np.random.Generator, prompt: bytes = b"") -> bytes:
    """The stream of random logits: at most so many tokens behind the prompt."""
    cursor, stream = grammar.begin(prompt), bytearray(prompt)
    for left in range(limit, -1, -1):
        logits = rng.normal(0, 2, len(grammar.tokens))
        if grammar.done(cursor) and (left == 0 or logits[0] > 3):
            return bytes(stream)
        token = int(np.where(row_of(grammar, cursor, left), logits, -np.inf).argmax())
        assert grammar.read(cursor, token)
        stream += grammar.tokens[token]
    raise AssertionError("no end within the limit")


def pictures(codec: AvcCodec, stream: bytes) -> int:
    """How many of the codec's size PyAV decodes, nothing cut off and nothing repeated."""
    context = av.CodecContext.create("h264", "r")
    packets = [*context.parse(codec.to_h264(stream)), *context.parse(None), None]
    found = [picture for packet in packets for picture in context.decode(packet)]
    assert all((picture.width, picture.height) == (codec.width, codec.height) for picture in found)
    return len(found)


@pytest.mark.parametrize("codec", SMALL_CLIPS, ids=str)
@pytest.mark.parametrize("size", [256, 400])
def test_random_samples_are_whole_clips(codec, size):
    grammar = grammar_of(codec, vocabulary(codec, size) if size > 256 else BYTES)
    rng = np.random.default_rng(1)
    least = grammar.finish(grammar.begin(b""))
    for limit in (least, least, least + 1, least + 7, 2 * least, 4 * least):
        stream = sample(grammar, limit, rng)
        report = codec.check(stream)
        assert report.valid, report
        assert pictures(codec, stream) == codec.frames
    for ratio in (0.3, 0.8):
        prompt = codec.prompt(streams(codec)[0], ratio)
        stream = sample(grammar, grammar.finish(grammar.begin(prompt)) + 5, rng, prompt)
        assert codec.check(stream).valid and pictures(codec, stream) == codec.frames


def test_a_clip_of_full_size_in_the_fewest_bytes():
    grammar = grammar_of(FULL, BYTES)
    least = grammar.finish(grammar.begin(b""))
    stream = sample(grammar, least, np.random.default_rng(2))
    assert len(stream) == least and FULL.check(stream).valid and pictures(FULL, stream) == 15


@pytest.mark.parametrize("codec", SMALL_CLIPS, ids=str)
def test_the_shortest_rest_is_as_long_as_said(codec):
    """Along random ways: some byte makes the rest one shorter, and none makes it shorter than that."""
    automaton, rng = grammar_of(codec, BYTES).automaton, np.random.default_rng(3)
    state, stream = automaton.begin, bytearray()
    for step in range(20_000):
        after = {byte: then for byte in range(256) if (then := automaton.step(state, byte))}
        left = {byte: automaton.finish(following) for byte, following in after.items()}
        assert set(after) <= set(automaton.bytes_after(state))
        if automaton.done(state):
            assert automaton.finish(state) == 0
            break
        assert min(left.values()) == automaton.finish(state) - 1
        # Wandering first, then the shortest way.
        shortest = [byte for byte in left if left[byte] == automaton.finish(state) - 1]
        byte = int(rng.choice(list(left) if step < 120 else shortest))
        state = after[byte]
        stream.append(byte)
    assert codec.check(bytes(stream)).valid


def test_the_shortest_slices_decode_without_concealment():
    """One skipped macroblock in P slices, DC prediction without levels in I slices."""
    codec = SMALL_CLIPS[0]
    automaton = grammar_of(codec, BYTES).automaton
    tails = {PREDICTED: "010" + "1", IDR: "00100" + "1" + "1" + "1" + "1"}
    stream = bytearray(codec.head)
    for frame in range(codec.frames):
        kind = PREDICTED if frame else IDR
        for macroblock in range(codec.num_macroblocks):
            node, bits = automaton.headers.root(macroblock, kind, frame, 0 if macroblock else -1), ""
            while not node.over:
                nearest = min((n for n in (node.one, node.zero) if n), key=lambda n: n.left)
                bits += "1" if nearest is node.one else "0"
                node = nearest
            bits += tails[kind]
            bits += "0" * (-len(bits) % 8)
            stream += b"\0" * (macroblock == 0 < frame) + b"\0\0\1" + (b"\x41" if frame else b"\x65")
            stream += int(bits, 2).to_bytes(len(bits) // 8, "big")
    assert len(stream) == automaton.finish(automaton.begin)
    assert codec.check(bytes(stream)).valid
    _, concealment = codec.decode_reported(bytes(stream))
    assert not concealment and pictures(codec, bytes(stream)) == codec.frames


def real_clips(codec: AvcCodec) -> list[bytes]:
    clips = [codec.encode(real_video(name), pad_short=True) for name in VIDEOS[:2]]
    tree = debian_video("tree.avi")
    return clips + ([codec.encode(io.BytesIO(tree))] if tree else [])


@pytest.mark.parametrize("size", [256, 1024])
def test_no_true_token_of_a_real_clip_is_masked(size):
    """The budget is just enough for its bytes."""
    clips = real_clips(FULL)
    tokenizer = Tokenizer.train(clips, size, codec=FULL.to_dict()) if size > 256 else None
    grammar = grammar_of(FULL, [tokenizer.token_bytes(id) for id in range(size)] if tokenizer else BYTES)
    for clip in clips[:: 1 if tokenizer else 3]:
        cursor, left = grammar.begin(b""), len(clip)
        for id in map(int, tokenizer.encode(clip) if tokenizer else clip):
            assert row_of(grammar, cursor, left)[id], (left, cursor)
            assert grammar.read(cursor, id)
            left -= len(grammar.tokens[id])
        assert grammar.done(cursor) and left == 0


@pytest.mark.parametrize("codec", SMALL_CLIPS, ids=str)
def test_no_true_token_of_a_small_clip_is_masked(codec):
    cuts = 0
    for size in (256, 300, 600):
        grammar = grammar_of(codec, vocabulary(codec, size) if size > 256 else BYTES)
        longest_first = sorted(range(len(grammar.tokens)), key=lambda id: -len(grammar.tokens[id]))
        for clip in streams(codec):
            cuts += sum(unit.type == IDR_SLICE for unit in nal_units(clip))
            cursor, position = grammar.begin(b""), 0
            while position < len(clip):
                id = next(id for id in longest_first if clip.startswith(grammar.tokens[id], position))
                assert row_of(grammar, cursor, len(clip) - position)[id]
                assert grammar.read(cursor, id)
                position += len(grammar.tokens[id])
            assert grammar.done(cursor)
    assert cuts >= 9 * codec.num_macroblocks


@pytest.mark.parametrize("codec", SMALL_CLIPS[:3], ids=str)
def test_rows_are_those_of_reading_byte_by_byte(codec):
    """Tokens that span start codes and headers, made up and cut from streams."""
    rng = np.random.default_rng(4)
    source = b"".join(streams(codec))
    cuts = [int(cut) for cut in rng.integers(0, len(source) - 12, 300)]
    cuts += [unit.start - int(rng.integers(0, 4)) for unit in nal_units(source)[1:]]
    odd = [bytes(rng.choice([0, 1, 2, 3, 0x41, 0x65, 0x67, 0x9A, 255], 4).tolist()) for _ in range(100)]
    pieces = [source[cut : cut + int(rng.integers(2, 12))] for cut in cuts]
    tokens = [*BYTES, *{piece for piece in pieces + odd if piece}, b"", b"\xff"]
    grammar = grammar_of(codec, tokens)
    automaton = grammar.automaton
    codes = [id for id, token in enumerate(tokens) if b"\x00\x00\x01" in token]
    kinds, allowed, refused = set(), 0, 0
    cursor = grammar.begin(codec.preamble)
    for _ in range(60):
        least, after = grammar.finish(cursor), []
        for token in tokens:
            state = cursor.state if token else None
            for byte in token:
                state = state and automaton.step(state, byte)
            after.append(automaton.finish(state) if state else 10**9)
        for left in (least, least + 1, least + 3, 10**6):
            row, expected = row_of(grammar, cursor, left), np.array(after) < left
            np.testing.assert_array_equal(row, expected)
            allowed, refused = allowed + expected.sum(), refused + (~expected).sum()
        kinds.add(type(cursor.state))
        if grammar.done(cursor):
            break
        on = [id for id in codes if row[id]] or np.flatnonzero(row)
        id = int(rng.choice(on if rng.random() < 0.4 else np.flatnonzero(row)))
        before = cursor.copy()
        assert grammar.read(cursor, id) and automaton.finish(cursor.state) == after[id]
        kept = before.copy()
        assert not grammar.read(before, int(rng.choice(np.flatnonzero(row == 0)))) and before == kept
    assert allowed > 1000 and refused > 1000 and kinds >= {Data, Header}


@pytest.mark.parametrize("codec", SMALL_CLIPS, ids=str)
def test_damage_that_the_grammar_reads_is_none_to_the_check(codec):
    """Most of it lies in start codes and headers."""
    rng = np.random.default_rng(5)
    grammar = grammar_of(codec, BYTES)
    read = refused = 0
    for stream in streams(codec):
        units = nal_units(stream)
        for _ in range(600):
            unit = units[rng.integers(len(units))]
            place = min(unit.start + int(rng.integers(0, 14)), len(stream) - 1)
            value = int(
                rng.choice([0, 1, 2, 3, int(rng.integers(256)), stream[place] ^ 1 << int(rng.integers(8))])
            )
            new = [bytes([value]), b"", bytes([stream[place], value])][rng.integers(3)]
            damaged = stream[:place] + new + stream[place + 1 :]
            try:
                whole = grammar.done(grammar.begin(damaged))
            except UserError:
                whole = False
            if whole:
                assert codec.check(damaged).valid
            read, refused = read + whole, refused + (not whole)
    assert read > 50 and refused > 50


def test_prompts_that_begin_no_clip_are_refused_with_the_byte():
    codec = SMALL_CLIPS[0]
    grammar, stream = grammar_of(codec, BYTES), streams(codec)[0]
    units = nal_units(stream)
    first, second = units[2:4]
    predicted = next(unit for unit in units if unit.type == SLICE)

    def changed(place: int, value: int) -> bytes:
        return stream[:place] + bytes([value]) + stream[place + 1 :]

    cases = [
        (b"\x01", 0, "01 differs from the parameter sets"),
        (changed(10, 0), 10, "00 differs from the parameter sets"),
        (changed(first.begin, 0x41), first.begin, "41 differs from"),
        (
            changed(second.begin, 0x41),
            second.begin,
            "41 is not the NAL unit type due before frame 0, macroblock 1",
        ),
        (
            changed(second.begin + 1, 0x62),
            second.begin + 1,
            "62 does not fit into the slice header of frame 0",
        ),
        (changed(predicted.begin + 1, 0x42), predicted.begin + 1, "slice header of frame 1, macroblock 0"),
        (stream[: second.start] + b"\x00\x00\x02", second.start + 2, "02 breaks a start code"),
        (stream[: second.start] + b"\x00\x00\x00\x01", second.start + 2, "00 breaks a start code"),
        (
            stream + b"\x00\x00\x01",
            len(stream) + 2,
            "01 breaks a start code, emulation prevention or the end",
        ),
    ]
    for prompt, place, reason in cases:
        with pytest.raises(
            UserError, match=rf"byte {place} of its stream: cannot be part of a clip: .*{reason}"
        ):
            grammar.begin(prompt)


def test_heads_of_their_own_have_no_grammar():
    assert AvcCodec(paper_bytes=True).grammar(BYTES) is None


@pytest.fixture(scope="module")
def engine() -> Engine:
    codec = SMALL_CLIPS[2]
    module, layout = small_model()
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=codec.to_dict())
    config = replace(SMALL, seq_length=512)
    return Engine(module, config, tokenizer, codec, layout, EngineConfig(cache_tokens=8192))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}, {"max_tokens": 140}], ids=str)
def test_every_sample_of_the_engine_is_a_valid_clip(engine, settings):
    codec = engine.codec
    prompts = [engine.prompt_ids(), engine.prompt_ids(codec.encode(np.zeros((3, 32, 32, 3), np.uint8)), 0.5)]
    for completion in engine.generate(prompts, Sampling(seed=1, n=2, **settings)):
        assert completion.finish_reason == "stop"
        assert codec.check(completion.stream).valid and pictures(codec, completion.stream) == 3
    [cut] = engine.generate(prompts[:1], Sampling(max_tokens=5))
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5
