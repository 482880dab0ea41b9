"""What is trained on, as flags. A group of `PretrainConfig`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_codec.errors import UserError, out_of_range


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes P (P.bin, P.idx, P.json), or a weight before each: 0.7 A 0.3 B. --split cuts each."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test, by documents in order."""
    train_data_path: tuple[str, ...] = ()
    """Dataset prefixes, or weights and prefixes, for training alone, instead of --data-path."""
    valid_data_path: tuple[str, ...] = ()
    """Dataset prefixes for validation alone, beside --train-data-path."""
    test_data_path: tuple[str, ...] = ()
    """Dataset prefixes for a last evaluation alone, beside --train-data-path."""
    mock_data: bool = False
    """Random tokens instead of a dataset, to try speed and layouts."""
    num_workers: int = 1
    """Threads in each process that read ahead; 0 reads when a micro-batch is due."""

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """Prefixes, with their weights, by the flag that named them."""
        named = {
            "--data-path": self.data_path,
            "--train-data-path": self.train_data_path,
            "--valid-data-path": self.valid_data_path,
            "--test-data-path": self.test_data_path,
        }
        return {flag: values for flag, values in named.items() if values}

    def faults(self) -> Iterator[UserError]:
        """Datasets that are missing or contradict each other, and shares that are none."""
        given = {
            "--data-path": " ".join(self.data_path),
            "--train-data-path": " ".join(self.train_data_path),
            "--mock-data": "given" if self.mock_data else "",
        }
        if sum(map(bool, given.values())) != 1:
            yield UserError(
                ", ".join(f"{flag} {value or 'not given'}" for flag, value in given.items()),
                "exactly one of them has to be given",
                "make a dataset with tools/preprocess_jpeg.py and give its --output-prefix",
            )
        for flag, values in (
            ("--valid-data-path", self.valid_data_path),
            ("--test-data-path", self.test_data_path),
        ):
            if values and not self.train_data_path:
                yield UserError(
                    f"{flag} {' '.join(values)}",
                    "goes with --train-data-path; --data-path is cut by --split",
                    "give --train-data-path instead of --data-path",
                )
        yield from out_of_range(self, 0, "num_workers")
        try:
            shares = [float(share) for share in self.split.split(",")]
            good = len(shares) == 3 and min(shares) >= 0 and shares[0] > 0 and sum(shares) < math.inf
        except ValueError:
            good = False
        if not good:
            yield UserError(
                f"--split {self.split}",
                "must be three shares, the first above 0",
                "for instance --split 969,30,1",
            )
