"""Which ids of a stream's first part are certain, held against the encoding of the whole stream."""

from functools import cache

import numpy as np
import pytest

from megatron_codec.codecs import AvcCodec, JpegCodec
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.open_end import OpenEnd, open_end
from megatron_codec.tokenizer.vocabulary import ForeignIds
from tests.data_sources import VIDEOS, photo_crops, real_video

CLIPS = AvcCodec(width=64, height=48)


@cache
def clips() -> tuple[list[bytes], Tokenizer]:
    """Overlapping clips of all real videos, and a vocabulary of 1024 entries as in the paper."""
    streams = []
    for name in VIDEOS:
        streams += CLIPS.encode_clips(real_video(name), clips=None, stride=1, pad_short=True)
    return streams, Tokenizer.train(streams, 1024, codec=CLIPS.to_dict())


def agrees(tokenizer: Tokenizer, stream: bytes, cut: int) -> OpenEnd:
    """The open end of a prompt.

    An AssertionError unless the whole stream's ids begin with the certain ones and go on in just one of the
    ways, and the first way is the prompt by itself.
    """
    whole, end = tuple(tokenizer.encode(stream).tolist()), open_end(tokenizer, stream[:cut])
    assert whole[: len(end.certain)] == end.certain
    assert (*end.certain, *end.ways[0].within) == tuple(tokenizer.encode(stream[:cut]).tolist())
    assert not end.ways[0].beyond and all(way.beyond for way in end.ways[1:])
    rest, found = whole[len(end.certain) :], 0
    for way in end.ways:
        count = len(way.within)
        alike = rest[:count] == way.within
        if way.beyond:
            found += alike and len(rest) > count and rest[count] in way.beyond
        else:
            found += alike
    assert found == 1, (cut, end)
    return end


def test_every_prompt_of_real_clips():
    streams, tokenizer = clips()
    changed = total = 0
    for stream in streams:
        whole = tokenizer.encode(stream).tolist()
        for frames in range(CLIPS.frames + 1):
            cut = len(CLIPS.first_frames(stream, frames))
            agrees(tokenizer, stream, cut)
            alone = tokenizer.encode(stream[:cut]).tolist()
            changed += alone != whole[: len(alone)]
            total += 1
    # What all of it is for: so often the prompt by itself ends in tokens that the whole stream has not.
    assert changed > total / 6


@pytest.mark.parametrize("size", [320, 1024])
@pytest.mark.parametrize("remove_head", [False, True])
def test_every_prompt_of_real_pictures(size, remove_head):
    codec = JpegCodec(image_size=32, quality=25, remove_head=remove_head)
    streams = [codec.encode(crop) for crop in photo_crops(120, 32)]
    tokenizer = Tokenizer.train(streams, size, codec=codec.to_dict())
    for stream in streams:
        for patches in range(codec.num_patches + 1):
            agrees(tokenizer, stream, len(codec.prompt(stream, patches / codec.num_patches)))


def test_cuts_anywhere():
    streams, tokenizer = clips()
    rng = np.random.default_rng(0)
    for stream in streams:
        for cut in rng.integers(0, len(stream), 20).tolist():
            agrees(tokenizer, stream, cut)


@pytest.mark.parametrize("seed", range(12))
def test_random_vocabularies(seed):
    """Few letters and many merges, with ids of another vocabulary and a prefix every other time."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 2 + seed % 3, 200, np.uint8).tobytes() for _ in range(20)]
    tokenizer = Tokenizer.train(documents, 256 + 60)
    if seed % 2:
        ids = rng.permutation(400)[: tokenizer.vocab_size + 3].tolist()
        tokens = tuple(ids[3:])
        tokenizer = Tokenizer(tokenizer.merges, ids=ForeignIds(tokens, ids[0], ids[1], 400, (ids[2],)))
    for document in documents:
        for cut in range(1, 60):
            agrees(tokenizer, document, cut)


def test_no_way_is_missing():
    """Of two letters, every stream there is: the ways are exactly those that occur."""
    rng = np.random.default_rng(3)
    tokenizer = Tokenizer.train([rng.integers(0, 2, 300, np.uint8).tobytes()], 256 + 12)
    longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
    assert longest <= 8
    for start in (b"\0", b"\1\0", b"\0\1\1\0\1\0\0", b"\1" * 9, b"\0\1" * 6):
        end, occurring = open_end(tokenizer, start), set()
        for follows in (b"", *(bytes(number >> i & 1 for i in range(9)) for number in range(2**9))):
            agrees(tokenizer, start + follows, len(start))
            ids = tokenizer.encode(start + follows).tolist()[len(end.certain) :]
            within, place = [], len(tokenizer.decode(list(end.certain)))
            while place < len(start):
                within.append(ids[len(within)])
                place += len(tokenizer.token_bytes(within[-1]))
            occurring.add(tuple(within))
        ways = {(*way.within, id) for way in end.ways[1:] for id in way.beyond} | {end.ways[0].within}
        assert occurring == ways
        ends = {way.within[:1] or ("beyond",) for way in end.ways}
        assert len(end.ways) == 1 or len(ends) > 1  # nothing that is the same in all was left out


def test_vocabularies_that_are_not_proper_are_left_alone():
    tokenizer = Tokenizer([(0, 0), (1, 2), (256, 256), (0, 256), (3, 259), (0, 1), (261, 2)])
    assert not tokenizer.proper
    stream = b"\0" * 5 + b"\1"
    end = open_end(tokenizer, stream)
    assert end.certain == tuple(tokenizer.encode(stream).tolist()) and [w.within for w in end.ways] == [()]
    assert open_end(Tokenizer([]), b"") == open_end(tokenizer, b"")
