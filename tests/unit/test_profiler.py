"""The window of steps under torch's profiler: which steps and processes, and what is written."""

import dataclasses
import gzip
import json

import pytest
import torch

from megatron_codec import parallel
from megatron_codec.config import ParallelConfig
from megatron_codec.flags import parse_pretrain
from megatron_codec.training.profiler import ProfileWindow

LEFT, RIGHT = torch.randn(300, 300), torch.randn(300, 300)


def run(flags: list[str], steps: int = 6, first: int = 0) -> list[int]:
    """Makes steps of one matrix product each; returns the numbers of steps done where the window moved."""
    layout = parallel.initialize(ParallelConfig())
    window = ProfileWindow(parse_pretrain(flags), layout)
    moved = [first] if window.reached(first) else []
    for iteration in range(first + 1, steps + 1):
        LEFT @ RIGHT
        moved += [iteration] if window.reached(iteration) else []
    window.close()
    return moved


def products(path) -> int:
    with gzip.open(path) as stream:
        return sum(event.get("name") == "aten::mm" for event in json.load(stream)["traceEvents"])


@pytest.mark.parametrize(
    ("window", "first", "steps", "moved", "traced"),
    [
        ((2, 4), 0, 6, [2, 4], (2, 4)),
        ((0, 1), 0, 6, [0, 1], (0, 1)),
        ((2, 6), 0, 6, [2, 6], (2, 6)),
        ((2, 5), 3, 6, [3, 5], (3, 5)),  # a run that goes on within the window
        ((4, 9), 0, 6, [4], (4, 6)),  # a run that is stopped within it
        ((1, 3), 3, 6, [], None),  # and one that goes on behind it
        ((6, 9), 0, 6, [6], None),  # no step was made
    ],
)
def test_the_steps_of_the_window_are_traced(window, first, steps, moved, traced, tmp_path, capsys):
    flags = ["--profile-steps", *map(str, window), "--save", str(tmp_path)]
    assert run(flags, steps, first) == moved
    files = [path.name for path in (tmp_path / "profile").glob("*")] if traced else []
    text = capsys.readouterr().out
    if not traced:
        assert not (tmp_path / "profile").exists() and "profile" not in text
        return
    begin, end = traced
    assert files == [f"rank_0_steps_{begin}_to_{end}.pt.trace.json.gz"]
    assert products(tmp_path / "profile" / files[0]) == end - begin
    heading, columns, *rows = [line for line in text.splitlines() if not line.startswith("USDT")]
    assert f"profile of process 0, {end - begin} steps" in heading and columns.endswith("operator")
    [row] = [row.split() for row in rows if row.endswith(" aten::mm")]
    assert float(row[0]) > 0 and row[2] == "1.0"
    assert len(rows) <= 15 and float(rows[0].split()[0]) == max(float(row.split()[0]) for row in rows)


def test_only_chosen_processes_are_traced_and_the_first_of_them_prints(tmp_path, capsys):
    layout = parallel.initialize(ParallelConfig())
    flags = ["--profile-steps", "0", "1", "--tensorboard-dir", str(tmp_path), "--profile-ranks", "1", "2"]
    for rank in (0, 1, 2):
        other = dataclasses.replace(layout)
        type_of_rank = type("At", (type(other),), {"rank": property(lambda self, rank=rank: rank)})
        other = type_of_rank(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})
        window = ProfileWindow(parse_pretrain(flags), other)
        window.reached(0)
        LEFT @ RIGHT
        window.reached(1)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        f"rank_{rank}_steps_0_to_1.pt.trace.json.gz" for rank in (1, 2)
    ]
    text = capsys.readouterr().out
    assert text.count("profile of process") == text.count("profile of process 1") == 1


def test_without_the_flag_nothing_is_done(tmp_path):
    assert run(["--save", str(tmp_path)]) == [] and not list(tmp_path.iterdir())
