"""The order in which a dataset's tokens are read.

Training follows the paper: documents are shuffled, concatenated and chunked to the sequence length. Sample
i is a function of the seed, the manifest's hash and i alone, so a run resumes at any sample, and under any
number of data-parallel ranks, without replaying what came before. A document begins at each BOS, should
attention be masked between documents.
"""

import hashlib
import threading

import numpy as np

from megatron_codec.data.dataset import CodecDataset
from megatron_codec.errors import UserError


class PackedSamples:
    """Chunks of the infinite stream of documents, each epoch in a new order.

    Args:
        dataset: the documents.
        seq_length: tokens that the model sees at a time.
        seed: chooses the orders.
    """

    def __init__(self, dataset: CodecDataset, seq_length: int, seed: int):
        if dataset.num_tokens == 0:
            raise UserError(f"{dataset.prefix}: 0 documents", "training needs at least one", "change --split")
        if seq_length < 1:
            raise UserError(f"sequence length {seq_length}", "must be at least 1")
        self.dataset, self.seq_length, self.seed = dataset, seq_length, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()  # of the threads that read ahead

    @property
    def samples_per_epoch(self) -> float:
        """Samples in which each token is predicted once."""
        return self.dataset.num_tokens / self.seq_length

    def sample(self, index: int) -> np.ndarray:
        """Token ids int64 [seq_length + 1] from `index * seq_length` on: inputs and, one later, labels."""
        tokens = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        epoch, offset = divmod(index * self.seq_length, self.dataset.num_tokens)
        while filled < len(tokens):
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            while filled < len(tokens) and place < len(order):
                document = self.dataset.document(int(order[place]))
                begin = len(document) - int(ends[place] - offset)
                piece = document[begin : begin + len(tokens) - filled]
                tokens[filled : filled + len(piece)] = piece
                filled, offset, place = filled + len(piece), offset + len(piece), place + 1
            epoch, offset = epoch + 1, 0
        return tokens

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and where in its tokens each of them ends."""
        with self._lock:
            return self._epoch_locked(epoch)

    def _epoch_locked(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            order = epoch_order(self.dataset.num_documents, self.seed, self.dataset.manifest.hash, epoch)
            ends = np.cumsum(self.dataset.lengths[order], dtype=np.int64)
            # Two, for the samples that straddle; more would cost memory with every epoch.
            self._epochs = {e: kept for e, kept in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = order, ends
        return self._epochs[epoch]


def epoch_order(num_documents: int, seed: int, dataset_hash: str, epoch: int) -> np.ndarray:
    """A permutation of the documents, int32 or int64 [num_documents].

    Sorts raw words of a counter-based generator (Philox 4x64-10): NumPy keeps those the same between its
    releases, which it does not promise of `permutation`.
    """
    key = hashlib.sha256(f"{seed}/{dataset_hash}/{epoch}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(num_documents)
    order = np.argsort(words, kind="stable")
    return order.astype(np.int32) if num_documents < 2**31 else order


class DocumentRows:
    """Whole documents, one a row, for evaluation: each token but BOS is predicted once, in its own document.

    A document longer than `seq_length + 1` fills several rows, each of which starts with the last token of
    the row before.
    """

    def __init__(self, dataset: CodecDataset, seq_length: int):
        self.dataset, self.seq_length = dataset, seq_length
        rows = -(-(dataset.lengths.astype(np.int64) - 1) // seq_length)
        self._ends = np.cumsum(rows)

    @property
    def num_rows(self) -> int:
        """How many rows hold all documents."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int) -> np.ndarray:
        """Token ids of row `index`, int64 [seq_length + 1], and -1 behind the end of its document.

        Rows behind the last document are -1 throughout, so that a batch may be filled up with them.
        """
        tokens = np.full(self.seq_length + 1, -1, np.int64)
        if index < self.num_rows:
            document = int(np.searchsorted(self._ends, index, side="right"))
            row = index - (int(self._ends[document - 1]) if document else 0)
            piece = self.dataset.document(document)[row * self.seq_length :][: self.seq_length + 1]
            tokens[: len(piece)] = piece
        return tokens
