"""What a recipe of FP8 costs in loss: the tiny preset in bf16, under each emulated recipe, and unscaled.

    python benchmarks/fp8_recipes.py --train-data-path P --valid-data-path Q --output runs/fp8

Each run is tools/pretrain.py with the same seed, data and learning rates. Those that are finished in
--output are not made again. Writes a table, OUTPUT/fp8.png, and as the last line the held-out loss of each
over that of bf16.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from megatron_codec.errors import UserError, run_tool
from megatron_codec.files import whole_file

EMULATED = "--fp8-format hybrid --fp8-emulation"
RECIPES = {
    "bf16": "",
    "delayed": f"{EMULATED} --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
    "delayed, most recent": EMULATED,
    "tensorwise": f"{EMULATED} --fp8-recipe tensorwise",
    "blockwise": f"{EMULATED} --fp8-recipe blockwise",
    "mxfp8": f"{EMULATED} --fp8-recipe mxfp8",
    "no scaling": f"{EMULATED} --no-fp8-emulation-scaling",
}


@dataclass(frozen=True)
class Arguments:
    """The runs."""

    train_data_path: str
    """Dataset prefix to train on."""
    valid_data_path: str
    """Dataset prefix to evaluate on, at the end."""
    output: Path = Path("runs/fp8")
    """Folder for metrics and the picture."""
    train_iters: int = 300
    """Steps of each run."""
    preset: str = "jpeglm-tiny"
    """Model and schedule; the learning rate decays over the preset's own steps."""


def course(name: str, flags: str, arguments: Arguments) -> dict[int, dict[str, float]]:
    """What the run logged, by iteration; made now unless it was made before."""
    file = arguments.output / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
    if "validation_loss" not in read(file).get(arguments.train_iters, {}):
        command = [sys.executable, "tools/pretrain.py", "--preset", arguments.preset]
        command += ["--train-iters", str(arguments.train_iters), "--lr-decay-iters", "3000"]
        command += ["--train-data-path", arguments.train_data_path]
        command += ["--valid-data-path", arguments.valid_data_path]
        command += ["--log-interval", "10", "--eval-interval", str(arguments.train_iters)]
        command += ["--metrics-file", str(file), *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(name, f"ended with status {done.returncode}", done.stderr[-2000:])
    return read(file)


def read(file: Path) -> dict[int, dict[str, float]]:
    """Lines of a metrics file, put together by iteration."""
    steps: dict[int, dict[str, float]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        values = json.loads(line)
        steps.setdefault(values.pop("iteration"), {}).update(values)
    return steps


def draw(courses: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Training loss over steps, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, steps in courses.items():
        points = [(i, step["loss"]) for i, step in steps.items() if "loss" in step]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss, nats a token", title="Emulated FP8 (hybrid)")
    axes.legend()
    with whole_file(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.output.mkdir(parents=True, exist_ok=True)
    courses = {name: course(name, flags, arguments) for name, flags in tqdm(RECIPES.items(), unit="run")}
    held_out = {name: steps[arguments.train_iters]["validation_loss"] for name, steps in courses.items()}
    print(f"{'recipe':22}{'training loss':>15}{'held out':>12}{'over bf16':>12}")
    for name, loss in held_out.items():
        last = courses[name][arguments.train_iters]["loss"]
        print(f"{name:22}{last:15.4f}{loss:12.4f}{loss / held_out['bf16'] - 1:12.2%}")
    draw(courses, arguments.output / "fp8.png")
    print(json.dumps({name: round(loss / held_out["bf16"], 5) for name, loss in held_out.items()}))


if __name__ == "__main__":
    run_tool(main)
