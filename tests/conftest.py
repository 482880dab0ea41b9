"""Fixtures that several folders of tests share."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.tiny import SAVED_AT, Corpus, make_corpus, read_metrics

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "")


def pytest_configure(config) -> None:
    # The way over gloo is what these tests hold, on a machine with a GPU as well; processes inherit it. Those
    # of tests/cuda alone see GPUS.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Models this small gain nothing from threads, and on a busy machine threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Megatron-Core calls its own deprecated functions; nobody here can act on that.
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}:megatron")
        config.addinivalue_line("filterwarnings", f"ignore::{category}:torch.distributed")


@dataclass(frozen=True)
class Trained:
    """A finished run of one process in fp32, with its checkpoints of iterations 6 and 12.

    Attributes:
        folder: its --save.
        metrics: what it logged about each iteration.
        rows: of each iteration, a hash of each sample that it was trained on.
    """

    folder: Path
    metrics: dict[int, dict[str, float]]
    rows: list[list[str]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Datasets of real photographs, 32 pixels wide."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> Trained:
    """The run that the others are compared with."""
    folder = tmp_path_factory.mktemp("trained")
    command_line = [*corpus.flags, "--save", str(folder), "--save-interval", str(SAVED_AT)]
    [[run]] = launch("tests.distributed.jobs:train", 1, command_lines=[command_line])
    return Trained(folder, read_metrics(folder / "metrics.jsonl"), run["rows"])
