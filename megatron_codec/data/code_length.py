"""How long the code of documents is: payload bytes of tokens, bits a byte, and the unigram entropy.

`counts` says how often each id is predicted, int64 [num_tokens]; `token_bytes` is `Tokenizer.token_bytes`.
"""

import math
from collections.abc import Callable

import numpy as np

from megatron_codec.data.blend import Samples
from megatron_codec.data.dataset import CodecDataset


def token_counts(dataset: CodecDataset, num_tokens: int) -> np.ndarray:
    """How often each id occurs, int64 [num_tokens]."""
    counts = np.zeros(num_tokens, np.int64)
    for index in range(dataset.num_documents):
        counts += np.bincount(dataset.document(index), minlength=num_tokens)
    return counts


def predicted_counts(rows: Samples, num_rows: int, num_tokens: int) -> np.ndarray:
    """How often each id is to be predicted in the first `num_rows` rows, int64 [num_tokens].

    What is not predicted is not counted: BOS, which is given, and the filling behind a document.
    """
    counts = np.zeros(num_tokens, np.int64)
    for index in range(num_rows):
        labels = rows.sample(index)[1:]
        counts += np.bincount(labels[labels >= 0], minlength=num_tokens)
    return counts


def unigram_nats(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
    """Nats a token of the test documents under the frequencies of the training documents (add-one)."""
    probabilities = (train_counts + 1) / (train_counts + 1).sum()
    return float(-(test_counts * np.log(probabilities)).sum() / test_counts.sum())


def payload_bytes(counts: np.ndarray, token_bytes: Callable[[int], bytes]) -> int:
    """Bytes of the codec streams that tokens with these counts stand for; BOS and EOS stand for none."""
    return sum(int(n) * len(token_bytes(i)) for i, n in enumerate(counts) if n)


def bits_per_byte(
    nats_per_token: float, counts: np.ndarray, token_bytes: Callable[[int], bytes]
) -> float | None:
    """The model's code length for a byte of payload, in bits: the nats of all tokens, EOS with them, over
    the bytes that they stand for. None where they stand for no bytes."""
    num_bytes = payload_bytes(counts, token_bytes)
    return nats_per_token / math.log(2) * float(counts.sum()) / num_bytes if num_bytes else None
