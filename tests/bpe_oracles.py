"""What the tests compare byte-pair encoding with: its plain definition, and Hugging Face `tokenizers`."""

import json
import random
from itertools import pairwise

from tokenizers import Tokenizer as HuggingFace
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

ALPHABET = [chr(0x2800 + byte) for byte in range(256)]


def plain_encode(document: bytes, merges: list[tuple[int, int]]) -> list[int]:
    """The definition: again and again the lowest merge that applies, at its leftmost place."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokens = list(document)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        if not found:
            return tokens
        rank, i = min(found)
        tokens[i : i + 2] = [256 + rank]


def as_word(document: bytes) -> str:
    """One word of a character a byte, which nothing in `tokenizers` splits."""
    return document.decode("latin-1").translate({byte: 0x2800 + byte for byte in range(256)})


def hugging_face(documents: list[bytes], vocab_size: int, max_token_length: int | None = None) -> HuggingFace:
    """A tokenizer trained on one word a document; its limit on token lengths excludes the limit itself."""
    limit = {} if max_token_length is None else {"max_token_length": max_token_length + 1}
    tokenizer = HuggingFace(BPE())
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=ALPHABET, show_progress=False, **limit)
    tokenizer.train_from_iterator([as_word(document) for document in documents], trainer)
    return tokenizer


def merges_of(tokenizer: HuggingFace) -> list[tuple[int, int]]:
    """The merges of a `tokenizers` BPE model as pairs of ids."""
    model = json.loads(tokenizer.to_str())["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def random_document(rng: random.Random, alphabet: int, longest: int = 300) -> bytes:
    """Bytes below `alphabet`: none, one, few, many, or a run of one byte."""
    length = rng.choice([0, 1, 2, 3, 5, 17, longest])
    if rng.random() < 0.2:
        return bytes([rng.randrange(alphabet)]) * length
    return bytes(rng.randrange(alphabet) for _ in range(length))


def random_merges(rng: random.Random, alphabet: int, count: int) -> list[tuple[int, int]]:
    """A hand-made list of merges, which need not be proper: some tokens may not encode to themselves."""
    merges: list[tuple[int, int]] = []
    lengths = [1] * 256
    for _ in range(count):
        known = [*range(alphabet), *range(256, 256 + len(merges))]
        left, right = rng.choice(known), rng.choice(known)
        if rng.random() < 0.2:
            left = right = known[-1]
        if (left, right) not in merges and lengths[left] + lengths[right] < 2000:
            merges.append((left, right))
            lengths.append(lengths[left] + lengths[right])
    return merges
