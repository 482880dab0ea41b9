"""Losses and gradient norms that were written down once, at full precision: they change only on purpose.

    python -m tests.end_to_end.test_golden    # writes golden.json anew, when it is meant to change

Another version of a library or another kind of CPU sums in another order. There the first steps have to agree
closely, and the whole course about; on the machine and with the versions named in the file, every bit.
"""

import hashlib
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_codec.files import write_json
from tests.distributed.launch import launch
from tests.tiny import STEPS, make_corpus, read_metrics

pytestmark = pytest.mark.timeout(600)
GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "fp32": [],
    "bf16": ["--bf16"],
    "fp8": ["--bf16", "--fp8-format", "hybrid", "--fp8-emulation"],
}
# Of a step in another order of sums: the first three, and all.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-3, 1e-2), "fp8": (1e-2, 3e-2)}


def machine() -> dict[str, str]:
    """What the bits depend on."""
    names = ("torch", "megatron-core", "numpy", "pillow", "scikit-image")
    kinds = {name: version(name) for name in names}
    found = {}
    if Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {name.strip(): value.strip() for name, _, value in lines}
    # Kernels are chosen by what the CPU can do, such as AMX, which torch does not tell.
    abilities = hashlib.sha256(found.get("flags", "").encode()).hexdigest()[:16]
    return kinds | {"cpu": f"{found.get('model name', platform.processor())}, flags {abilities}"}


def run_all(flags: list[str], folder: Path) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm of every step of each run, in one process with one thread."""
    files = {name: folder / f"{name}.jsonl" for name in RUNS}
    lines = [
        [*flags, "--eval-iters", "0", *more, "--metrics-file", str(files[name])]
        for name, more in RUNS.items()
    ]
    launch("tests.distributed.jobs:train", 1, command_lines=lines)
    return {
        name: {key: [step[key] for step in read_metrics(file).values()] for key in ("loss", "grad_norm")}
        for name, file in files.items()
    }


@pytest.fixture(scope="module")
def courses(corpus, tmp_path_factory):
    return run_all(corpus.flags, tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name, courses):
    golden, found = json.loads(GOLDEN.read_text()), courses[name]
    for key, expected in golden[name].items():
        assert len(found[key]) == len(expected) == STEPS
        if golden["machine"] == machine():
            assert found[key] == expected
            continue
        early, late = TOLERANCES[name]
        assert found[key][:3] == pytest.approx(expected[:3], rel=early)
        assert found[key] == pytest.approx(expected, rel=late if key == "loss" else 10 * late)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name))
        write_json(GOLDEN, {"machine": machine(), **run_all(corpus.flags, Path(name))})


if __name__ == "__main__":
    main()
