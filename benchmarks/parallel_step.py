"""A training step of two processes on two cores beside one process with two threads, on the same batch.

    python benchmarks/parallel_step.py                     # jpeglm-tiny
    python benchmarks/parallel_step.py --shape medium      # 6 layers, 384 wide, 1024 tokens

Each run is tools/pretrain.py on mock data. Rounds interleave the layouts; an efficiency is the median over
rounds of (time of one process / time of two). The last run of each layout is profiled: how much of a step its
first process spent in collectives of gloo and messages between stages, waiting for the other one included.
"""

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from megatron_codec.errors import UserError, run_tool

SHAPES = {
    "tiny": "--preset jpeglm-tiny --micro-batch-size 3 --global-batch-size 12",
    "medium": "--num-layers 6 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 "
    "--seq-length 1024 --micro-batch-size 1 --global-batch-size 4 --bf16",
}
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "one process, two threads": (1, ""),
    "DP=2": (2, ""),
    "DP=2, overlapped": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "TP=2": (2, TP),
    "TP=2, sequence parallel": (2, f"{TP} --sequence-parallel"),
    "PP=2": (2, PP),
    "CP=2": (2, "--context-parallel-size 2"),
}
STEPS, SKIPPED = 24, 4
PROFILED = 20, 24
WAITS = ("gloo:", "c10d::", "record_param_comms")


@dataclass(frozen=True)
class Arguments:
    """What is compared."""

    shape: Literal["tiny", "medium"] = "tiny"
    rounds: int = 3


def run(shape: str, size: int, layout: str, profile: bool, folder: Path) -> float:
    """Median seconds of a step."""
    log = folder / "metrics.jsonl"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["tools/pretrain.py", "--mock-data", "--train-iters", str(STEPS), "--lr-warmup-iters", "0"]
    command += [*SHAPES[shape].split(), *layout.split(), "--log-interval", "1", "--metrics-file", str(log)]
    if profile:
        command += ["--profile-steps", *map(str, PROFILED), "--tensorboard-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2" if size == 1 else "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(layout, f"ended with status {done.returncode}", done.stderr[-2000:])
    times = [json.loads(line)["seconds_per_iteration"] for line in log.read_text().splitlines()]
    return statistics.median(times[SKIPPED : PROFILED[0]])


def share_of_waiting(folder: Path) -> float:
    """Of the profiled steps of the first process, the share within communication, overlaps counted once."""
    [trace] = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_size)[-1:]
    with gzip.open(trace, "rt") as stream:
        events = [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"].startswith(WAITS) or event["name"].startswith("nccl:")
    )
    covered, end = 0.0, float("-inf")
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    return covered / whole


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    waits: dict[str, float] = {}
    with tqdm(total=arguments.rounds * len(LAYOUTS), unit="run") as bar:
        for number in range(arguments.rounds):
            for name, (size, layout) in LAYOUTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    last = number == arguments.rounds - 1
                    seconds[name].append(run(arguments.shape, size, layout, last, Path(folder)))
                    if last and size > 1:
                        waits[name] = share_of_waiting(Path(folder))
                bar.update()
    whole = seconds["one process, two threads"]
    ratios = {
        name: statistics.median(one / two for one, two in zip(whole, times, strict=True))
        for name, times in seconds.items()
    }
    for name, times in seconds.items():
        wait = f"{waits[name]:8.1%}" if name in waits else ""
        print(f"{name:26}{statistics.median(times) * 1000:8.1f} ms a step {ratios[name]:8.2f}x {wait}")
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    run_tool(main)
