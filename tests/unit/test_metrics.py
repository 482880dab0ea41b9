"""The log line and the numbers of steps, evaluations and samples."""

import json
import re
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_codec import parallel
from megatron_codec.config import ParallelConfig
from megatron_codec.flags import parse_pretrain
from megatron_codec.training.metrics import Metrics
from megatron_codec.training.step import StepResult


@pytest.fixture
def start(tmp_path):
    """Makes metrics that write into METRICS; returns them and what reads the lines back."""
    layout = parallel.initialize(ParallelConfig())

    def make(*flags: str):
        command = ["--preset", "jpeglm-tiny", "--metrics-file", str(tmp_path / "m.jsonl"), *flags]
        metrics = Metrics(parse_pretrain(command), layout, 0, 322)
        return metrics, lambda: [json.loads(line) for line in (tmp_path / "m.jsonl").open()]

    return make


def test_the_line_says_what_the_file_holds(start, capsys):
    metrics, lines = start("--log-interval", "2", "--peak-tflops", "0.25")
    for iteration in (1, 2):
        metrics.step(iteration, 1e-3, StepResult(float(iteration), 0.5, skipped=iteration == 1))
    metrics.close()
    [values] = lines()
    text = capsys.readouterr().out
    assert values["iteration"] == 2 and values["loss"] == 1.5
    assert "number of skipped iterations:   1 |" in text
    full, causal = values["tflops_per_device"], values["tflops_per_device_causal_attention"]
    assert (
        f"| TFLOP/s/CPU: {full:.4g} (full attention), {causal:.4g} (causal) | MFU: {full / 0.25:.1%} " in text
    )
    assert values["mfu_full_attention"] == full / 0.25 and values["mfu_causal_attention"] == causal / 0.25
    # tokens of a step over its time, and FLOPs of a token
    tokens = 6 * 304 / values["seconds_per_iteration"]
    assert values["tokens_per_second_per_device"] == pytest.approx(tokens)
    assert full - causal == pytest.approx(tokens * 6 * 4 * 128 * 304 / 1e12)
    assert f"| memory (GiB): {values['memory_gib']:.2f} |" in text and values["memory_gib"] > 0.05


def test_what_is_not_a_step_is_left_out_of_its_time(start):
    """Also in the middle of a log interval."""
    metrics, lines = start("--log-interval", "3")
    for iteration in (1, 2, 3):
        time.sleep(0.05)
        metrics.step(iteration, 1e-3, StepResult(1.0, 0.5, skipped=False))
        if iteration != 3:
            time.sleep(0.5)  # an evaluation
            metrics.restart_clock()
    [values] = lines()
    assert 0.05 <= values["seconds_per_iteration"] < 0.3
    metrics.close()


def test_evaluations_and_samples(start, capsys):
    metrics, lines = start()
    metrics.evaluation(5, 2.0, 3.25)
    metrics.evaluation(5, 1.0, None, "test")
    picture = Image.new("RGB", (2, 2))
    metrics.samples(
        5,
        SimpleNamespace(sheet=picture, count=4, seconds=1.5, share_that_decodes=0.75, share_valid=0.5),
    )
    metrics.samples(6, None)
    metrics.close()
    assert lines() == [
        {"iteration": 5, "validation_loss": 2.0, "validation_bits_per_byte": 3.25},
        {"iteration": 5, "test_loss": 1.0},
        {"iteration": 5, "share_that_decodes": 0.75, "share_valid": 0.5},
    ]
    text = capsys.readouterr().out
    assert re.search(r"validation loss at iteration 5 \|.*\| bits a byte of payload: 3.2500\n", text)
    assert "sampled 4 pictures at iteration 5 in 1.5 s | decode: 75.0% | valid: 50.0%" in text


def test_a_line_is_written_when_it_is_said(start, tmp_path, monkeypatch):
    """Standard output is a file in a job, which Python writes in blocks."""
    metrics, _ = start()
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        monkeypatch.setattr("sys.stdout", log)
        metrics.say("here I am")
        assert (tmp_path / "log").read_text().endswith("] here I am\n")
    monkeypatch.undo()
    metrics.close()
