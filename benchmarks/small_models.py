"""Which small JPEG-LM learns most from the same computation: shapes, learning rates and batches, run by run.

    python benchmarks/small_models.py --train-data-path P --valid-data-path Q --output runs/small-models

Each run is tools/pretrain.py with the tiny preset's model and schedule but for what its name says, and
ends when the same number of FLOPs is spent; --jobs of them run side by side on a thread each. Those that are
finished in --output are not made again. Prints a table, best first, in Markdown.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from megatron_codec.errors import UserError, run_tool

BASE = {
    "num-layers": 4, "hidden-size": 128, "ffn-hidden-size": 384, "num-attention-heads": 2, "seq-length": 304,
    "micro-batch-size": 6, "global-batch-size": 6, "lr": 4e-3, "min-lr": 4e-4, "lr-warmup-iters": 100,
}  # fmt: skip


def shape(layers: int, width: int, heads: int, lr: float) -> dict[str, float]:
    """A Llama whose feed-forward layers are three times as wide, as in the base."""
    size = {"num-layers": layers, "hidden-size": width, "ffn-hidden-size": 3 * width}
    return size | {"num-attention-heads": heads, "lr": lr, "min-lr": lr / 10}


def batch(sequences: int) -> dict[str, float]:
    """Sequences a step."""
    return {"micro-batch-size": sequences, "global-batch-size": sequences}


RUNS: dict[str, dict[str, float]] = {
    "4 x 128, 4e-3": {},
    "4 x 128, 2e-3": shape(4, 128, 2, 2e-3),
    "4 x 128, 8e-3": shape(4, 128, 2, 8e-3),
    "6 x 256, 2e-3": shape(6, 256, 4, 2e-3),
    "4 x 192, 3e-3": shape(4, 192, 3, 3e-3),
    "8 x 128, 3e-3": shape(8, 128, 2, 3e-3),
    "2 x 128, 4e-3": shape(2, 128, 2, 4e-3),
    "8 x 96, 5e-3": shape(8, 96, 2, 5e-3),
    "8 x 64, 6e-3": shape(8, 64, 1, 6e-3),
    "12 x 64, 6e-3": shape(12, 64, 1, 6e-3),
    "2 x 64, 8e-3": shape(2, 64, 1, 8e-3),
    "batch 3": batch(3),
    "batch 12": batch(12),
    "least learning rate 0": {"min-lr": 0},
    "beta2 0.99": {"adam-beta2": 0.99},
    "weight decay 0": {"weight-decay": 0},
    "initial deviation 0.05": {"init-method-std": 0.05},
    "4 heads": {"num-attention-heads": 4},
    "rotary base 500": {"rotary-base": 500},
}


@dataclass(frozen=True)
class Arguments:
    """The runs."""

    train_data_path: str
    """Dataset prefix to train on."""
    valid_data_path: str
    """Dataset prefix to evaluate on, at the end."""
    output: Path = Path("runs/small-models")
    """Folder of the metrics."""
    flops: float = 2e13
    """Computation of each run."""
    runs: tuple[str, ...] = ()
    """Names of the runs to make; by default all."""
    jobs: int = 2
    """How many run at a time."""


def learn(name: str, arguments: Arguments) -> list[dict[str, float]]:
    """The lines that a run logged; made now unless it was made before."""
    file = arguments.output / f"{arguments.flops:g} {name}.jsonl"
    if not file.exists():
        running = file.with_suffix(".running")
        running.unlink(missing_ok=True)
        command = [sys.executable, "tools/pretrain.py", "--bf16", "--train-flops", f"{arguments.flops:g}"]
        for flag, value in (BASE | RUNS[name]).items():
            command += [f"--{flag}", f"{value:g}"]
        command += ["--train-data-path", arguments.train_data_path]
        command += ["--valid-data-path", arguments.valid_data_path]
        command += ["--log-interval", "10", "--eval-interval", "1000000", "--eval-iters", "200"]
        command += ["--metrics-file", str(running)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise UserError(name, f"ended with status {done.returncode}", done.stderr[-2000:])
        running.rename(file)
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if unknown := set(arguments.runs) - set(RUNS):
        raise UserError(f"--runs {sorted(unknown)}", "is not known", f"use some of {list(RUNS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = arguments.runs or tuple(RUNS)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda name: learn(name, arguments), names)
        courses = dict(zip(names, tqdm(found, total=len(names), unit="run"), strict=True))
    print("| | steps | training loss | held out, nats a token |\n|---|---|---|---|")
    rows = []
    for name, lines in courses.items():
        held_out = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
        losses = [line["loss"] for line in lines if "loss" in line]
        rows.append((held_out, name, lines[-1]["iteration"], losses[-1]))
    for held_out, name, steps, loss in sorted(rows):
        print(f"| {name} | {steps:,} | {loss:.4f} | {held_out:.4f} |")


if __name__ == "__main__":
    run_tool(main)
