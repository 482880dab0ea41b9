"""What a dataset says by itself about a model's loss: payload bytes a token, and the unigram entropy."""

import math

import numpy as np

from megatron_codec.data import CodecDataset
from megatron_codec.tokenizer import Tokenizer


def token_counts(dataset: CodecDataset, num_tokens: int) -> np.ndarray:
    """How often each id occurs, int64 [num_tokens]."""
    counts = np.zeros(num_tokens, np.int64)
    for index in range(dataset.num_documents):
        counts += np.bincount(dataset.document(index), minlength=num_tokens)
    return counts


def unigram_nats(train_counts: np.ndarray, test_counts: np.ndarray) -> float:
    """Nats a token of the test documents under the frequencies of the training documents (add-one)."""
    probabilities = (train_counts + 1) / (train_counts + 1).sum()
    return float(-(test_counts * np.log(probabilities)).sum() / test_counts.sum())


def payload_bytes(counts: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of the codec streams that tokens with these counts stand for; BOS and EOS stand for none."""
    special = (tokenizer.bos, tokenizer.eos)
    return sum(int(n) * len(tokenizer.token_bytes(i)) for i, n in enumerate(counts) if n and i not in special)


def bits_per_byte(nats_per_token: float, counts: np.ndarray, tokenizer: Tokenizer) -> float:
    """The model's code length for a byte of payload, in bits."""
    return nats_per_token / math.log(2) * float(counts.sum()) / payload_bytes(counts, tokenizer)
