"""Restart markers at other intervals than the paper's, or none: the streams, and where prompts end."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec, Report, get_codec
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

INTERVALS = [0, 2, 3, 16, 65535]


def pillow_stream(picture: Image.Image, quality: int, interval: int, streamtype: int = 2) -> bytes:
    buffer = io.BytesIO()
    flags = {"restart_marker_blocks": interval} if interval else {}
    Image.fromarray(np.asarray(picture)).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0", streamtype=streamtype, **flags
    )
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("remove_head", [False, True])
@pytest.mark.parametrize("interval", INTERVALS)
def test_bytes_are_pillows_and_pictures_those_of_the_paper(interval, remove_head):
    for size, quality in ((16, 25), (64, 25), (64, 95), (256, 25)):
        codec = JpegCodec(size, quality, remove_head, interval)
        assert get_codec(**codec.to_dict()) == codec
        for crop in photo_crops(6, size):
            stream = codec.encode(crop)
            assert stream == pillow_stream(crop, quality, interval)[len(codec.head) * remove_head :]
            assert codec.to_file(stream) == pillow_stream(crop, quality, interval, streamtype=0)
            assert codec.check(stream) == Report(True)
            paper = JpegCodec(size, quality)
            np.testing.assert_array_equal(
                pixels(codec.decode(stream)), pixels(paper.decode(paper.encode(crop)))
            )
            with_markers = JpegCodec(size, quality, remove_head).encode(crop)
            if size > 16 or (not remove_head and interval == 0):
                assert len(stream) < len(with_markers)  # a marker costs 2 bytes and what it pads


@pytest.mark.parametrize("interval", [0, 2, 3])
def test_a_prompt_holds_its_patches_and_nothing_of_the_next(interval):
    """Pictures that agree in the first patches have the same prompt."""
    codec, rows = JpegCodec(64, remove_head=True, restart_interval=interval), 4
    shared = 0
    crops = [pixels(crop) for crop in photo_crops(40, 64)]
    for one, other in itertools.pairwise(crops):
        stream = codec.encode(one)
        for patches in range(codec.num_patches + 1):
            y, x = divmod(patches, rows)
            mixed = other.copy()
            mixed[: 16 * y] = one[: 16 * y]
            mixed[16 * y : 16 * y + 16, : 16 * x] = one[16 * y : 16 * y + 16, : 16 * x]
            prompt = codec.prompt(stream, patches / codec.num_patches)
            assert stream.startswith(prompt)
            assert codec.prompt(codec.encode(mixed), patches / codec.num_patches) == prompt
            # All of what the patches share with no other: one byte more holds something of the next.
            read, shown = codec.whole_patches(stream[: len(prompt) + 1])
            assert read >= patches - (patches == codec.num_patches) and shown[: len(prompt)] == prompt
            if interval and patches and patches % interval == 0 and patches < codec.num_patches:
                assert prompt[-2:] == bytes((0xFF, 0xD0 + (patches // interval - 1) % 8))
            elif 0 < patches < codec.num_patches:
                shared += codec.encode(mixed)[len(prompt)] != stream[len(prompt)]
            finished = max(0, y * 16 - 17)  # the last row of patches may miss bits, and chroma looks into it
            np.testing.assert_array_equal(
                pixels(codec.decode(prompt))[:finished], pixels(codec.decode(stream))[:finished]
            )
    assert shared > 50


@pytest.mark.parametrize("interval", [0, 3])
def test_whole_patches_grow_with_the_stream(interval):
    codec = JpegCodec(48, restart_interval=interval)
    for crop in photo_crops(5, 48):
        stream = codec.encode(crop)
        seen = [codec.whole_patches(stream[:length]) for length in range(len(stream) + 1)]
        counts = [count for count, _ in seen]
        assert counts == sorted(counts) and set(counts) == set(range(codec.num_patches + 1))
        for length, (_, prefix) in enumerate(seen):
            assert stream[:length].startswith(prefix) or length < len(codec.head)
        # What is damaged ends where it is.
        damaged = stream[:-20] + b"\xff\xd9" + stream[-20:]
        assert codec.whole_patches(damaged)[0] < codec.num_patches


def test_prompts_of_the_paper_are_found_by_markers_and_by_codes():
    codec = JpegCodec(64)
    for crop in photo_crops(10, 64):
        stream = codec.encode(crop)
        by_codes = [len(codec.head) + end for end in codec._scan.mcu_ends(stream[len(codec.head) :])]
        assert by_codes == [*codec._patch_ends(stream), len(stream)]


@pytest.mark.parametrize("interval", [0, 2])
def test_random_tokens_under_the_grammar_are_whole_pictures(interval):
    codec = JpegCodec(32, remove_head=True, restart_interval=interval)
    tokenizer = Tokenizer.train(
        [codec.encode(crop) for crop in photo_crops(60, 32)], 320, codec=codec.to_dict()
    )
    tokens = [tokenizer.token_bytes(token) for token in range(320)]
    grammar = codec.grammar(tokens)
    rng = np.random.default_rng(0)
    for _ in range(30):
        cursor, stream = grammar.begin(b""), b""
        row = np.zeros((1, 320), np.uint8)
        while not grammar.done(cursor):
            grammar.allow([cursor], [400 - len(stream)], row)
            token = int(rng.choice(np.flatnonzero(row[0])))
            assert grammar.read(cursor, token)
            stream += tokens[token]
        assert codec.check(stream) == Report(True)
        Image.open(io.BytesIO(codec.to_file(stream))).load()


@pytest.mark.parametrize("interval", [-1, 65536])
def test_an_interval_that_no_header_can_say_is_refused(interval):
    with pytest.raises(UserError, match=f"restart interval {interval}.*65535.*use 1"):
        JpegCodec(restart_interval=interval)
