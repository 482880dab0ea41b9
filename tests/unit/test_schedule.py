"""Learning rates over a whole run, against the formulas written out."""

import math
from types import SimpleNamespace

import pytest

from megatron_codec.flags import parse_pretrain
from megatron_codec.training.optimizer import build_schedule

WARMUP, STEPS, HIGH, LOW = 10, 200, 1e-3, 1e-4
DECAY = {  # from the share of the decay that is done to the height above LOW, in shares of HIGH - LOW
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def rates(*arguments: str) -> list[float]:
    """Of every step."""
    fixed = [
        "--lr",
        HIGH,
        "--min-lr",
        LOW,
        "--lr-warmup-iters",
        WARMUP,
        "--train-iters",
        STEPS,
        "--mock-data",
    ]
    config = parse_pretrain([*map(str, fixed), "--global-batch-size", "4", *arguments])
    config.check(1)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "params": []}])
    schedule = build_schedule(optimizer, config.training)  # type: ignore[arg-type]
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=4)
    return found


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_plain_schedules(style):
    for step, rate in enumerate(rates("--lr-decay-style", style)):
        if step <= WARMUP:
            expected = HIGH * step / WARMUP
        else:
            expected = LOW + (HIGH - LOW) * DECAY[style]((step - WARMUP) / (STEPS - WARMUP))
        if style == "constant":
            expected = min(HIGH, HIGH * step / WARMUP)
        assert rate == pytest.approx(expected, rel=1e-9), step


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_warm_up_stable_decay(style):
    found = rates(*("--lr-decay-style", "WSD", "--lr-wsd-decay-style", style, "--lr-wsd-decay-iters", "50"))
    for step, rate in enumerate(found):
        if step <= WARMUP:
            expected = HIGH * step / WARMUP
        else:
            expected = LOW + (HIGH - LOW) * DECAY[style](max(0, step - (STEPS - 50)) / 50)
        assert rate == pytest.approx(expected, rel=1e-9), step


def test_wsd_needs_its_decay():
    for arguments in ([], ["--lr-wsd-decay-iters", "201"]):
        config = parse_pretrain(
            ["--mock-data", "--train-iters", "200", "--lr-decay-style", "WSD", *arguments]
        )
        (fault,) = config.faults(1)
        assert "must lie between 1 and the 200 steps" in str(fault)
