"""The harness itself: a test of layouts is worth as much as its launcher's failures are loud."""

import os
import time
from pathlib import Path

import pytest

from tests.distributed import launch as harness
from tests.distributed.launch import RankFailed, launch

HERE = "tests.distributed.test_launch"


@pytest.fixture(params=["imports by itself", "fork server"], autouse=True)
def kind(request, monkeypatch):
    """Every way that a launch goes where no GPU is seen."""
    if request.param == "imports by itself":
        monkeypatch.setattr(harness, "ALONE", {HERE})


def who(greeting: str) -> list:
    return [greeting, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.getpid(), os.getcwd()]


def fail_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise RuntimeError(f"the reason of rank {rank}")
    time.sleep(60)


def hang(folder: str) -> None:
    with open(f"{folder}/{os.environ['RANK']}", "w") as stream:
        stream.write(str(os.getpid()))
    print("about to wait", flush=True)
    time.sleep(60)


def alive(pid: int) -> bool:
    try:
        # Forks of a killed process are zombies until init has seen them, which is not quick everywhere.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_back_in_the_order_of_ranks(world_size):
    results = launch(f"{HERE}:who", world_size, greeting="hello")
    assert [result[:3] for result in results] == [["hello", rank, world_size] for rank in range(world_size)]
    assert len({os.getpid(), *(pid for *_, pid, _ in results)}) == world_size + 1
    assert {folder for *_, folder in results} == {str(harness.ROOT)}


def test_a_failed_rank_ends_all_and_shows_its_output():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)ranks \[1\] failed.*the reason of rank 1") as failure:
        launch(f"{HERE}:fail_on", 2, rank=1)
    assert failure.value.statuses == [None, 1]
    assert time.monotonic() - started < 30


def test_what_fails_at_its_imports_is_told():
    with pytest.raises(RankFailed, match=r"(?s)ranks \[0, 1\] failed.*has no attribute 'nothing'"):
        launch(f"{HERE}:nothing", 2)


def test_a_hang_ends_at_the_time_out(tmp_path):
    with pytest.raises(RankFailed, match=r"(?s)not done after 8 s.*about to wait"):
        launch(f"{HERE}:hang", 2, timeout=8, folder=str(tmp_path))
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
