"""FLOP/s, MFU and memory: against the paper's figures, and against memory that is really used."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_codec.estimate import GPUS, peak_tflops
from megatron_codec.flags import parse_pretrain
from megatron_codec.training.throughput import Throughput
from tests.forks import ROOT

CPU = torch.device("cpu")


def test_the_papers_utilization():
    """Han et al. 2024: 228 billion tokens in a month on 32 A100 (FACTS in docs/parallelism.md)."""
    config = parse_pretrain(["--preset", "jpeglm-7b", "--peak-tflops", "312"])
    used = Throughput(config, 322, CPU, fp8=False).of(2749)
    assert used["mfu_full_attention"] == pytest.approx(0.513, abs=5e-4)
    assert used["mfu_causal_attention"] == pytest.approx(0.428, abs=5e-4)
    # PaLM, appendix B: 6 N + 12 L h s FLOPs a token; N of docs/parallelism.md.
    flops = 6 * 6_479_417_344 + 12 * 32 * 4096 * 12288
    assert used["tflops_per_device"] == pytest.approx(2749 * flops / 1e12)
    assert used["tflops_per_device_causal_attention"] == pytest.approx(
        2749 * (flops - 6 * 32 * 4096 * 12288) / 1e12
    )


def test_without_a_peak_there_is_no_mfu():
    used = Throughput(parse_pretrain(["--preset", "jpeglm-tiny"]), 322, CPU, fp8=False).of(1000)
    assert used.keys() == {"tflops_per_device", "tflops_per_device_causal_attention"}


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100-PCIE-40GB", 312, None),
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H200", 989, 1979),
        # Slower cards, a part of a card, and what is not known.
        ("NVIDIA H100 PCIe", None, None),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A1000", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_peaks_are_known_by_the_names_that_torch_gives(name, bf16, fp8, monkeypatch):
    assert (peak_tflops(name, fp8=False), peak_tflops(name, fp8=True)) == (bf16, fp8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for is_fp8, peak in ((False, bf16), (True, fp8)):
        assert Throughput(parse_pretrain([]), 322, torch.device("cuda"), fp8=is_fp8).peak == peak
    given = parse_pretrain(["--peak-tflops", "100"])
    assert Throughput(given, 322, torch.device("cuda"), fp8=False).peak == 100


def test_every_known_gpu_has_a_name():
    assert all(kind.device_names for kind in GPUS.values())


def test_memory_is_that_of_the_fullest_moment():
    # In a process of its own: other tests of this one may have held more.
    code = """
import json
from megatron_codec import parallel
from megatron_codec.config import ParallelConfig
from megatron_codec.training.throughput import peak_memory
layout = parallel.initialize(ParallelConfig())
before = peak_memory(layout)
block = bytearray(b"x") * (3 * 2**29)
during = peak_memory(layout)
del block
print(json.dumps([before, during, peak_memory(layout)]))
parallel.shut_down()
"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    values = json.loads(output.splitlines()[-1])
    assert all(each.keys() == {"memory_gib"} for each in values)
    before, during, after = (each["memory_gib"] for each in values)
    assert during > before + 1.3
    # The kernel counts each core's last few pages later.
    assert after >= during - 0.01


def test_memory_of_a_child_is_not_that_of_its_parent():
    """ru_maxrss is inherited through exec."""
    ballast = bytearray(b"x") * 2**30
    code = """
from megatron_codec.training.throughput import _peak_resident_bytes
import json; print(json.dumps(_peak_resident_bytes()))
"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert len(ballast) == 2**30 and 2**26 < json.loads(output) < 2**30
