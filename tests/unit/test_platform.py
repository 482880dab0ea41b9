"""What `prepare` does on a CPU, and that it touches nothing where there is CUDA or where it is not called."""

import subprocess
import sys

import pytest
import torch

from megatron_codec import platform
from tests.forks import ROOT


def run_python(code: str) -> str:
    """In a process of its own: this one has been prepared."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def prepared() -> platform.Platform:
    return platform.prepare()


def test_it_runs_on_the_cpu_over_gloo_and_says_so(prepared):
    assert prepared.backend == "gloo" and prepared.device == torch.device("cpu")
    assert not prepared.transformer_engine
    assert "\n" not in prepared.description and "gloo" in prepared.description
    assert platform.prepare() is prepared


def test_what_megatron_asks_of_cuda_is_answered_by_the_cpu(prepared):
    assert torch.cuda.current_device() == torch.device("cpu")
    for make in (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn):
        assert make(2, 3, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.tensor([1], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.full((2,), 1.0, device="cuda").tolist() == [1, 1]
    assert torch.arange(3, device="cuda").tolist() == [0, 1, 2]
    assert torch.zeros_like(torch.ones(2), device="cuda").tolist() == [0, 0]
    x = torch.ones(2)
    assert x.cuda() is x and x.pin_memory() is x
    assert x.type() == "torch.cuda.FloatTensor" and x.half().type() == "torch.cuda.HalfTensor"
    assert x.type(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event(enable_timing=True).record()
    torch.cuda.synchronize()


def test_transformer_engine_and_apex_are_hidden_where_no_gpu_is_seen(tmp_path):
    """As on a login node where they are installed: their kernels need a GPU."""
    for module in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise RuntimeError('imported without a GPU')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from megatron_codec import platform
from megatron_codec.config import transformer_engine_installed
platform.prepare()
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
print(clip_grads.multi_tensor_applier.__module__, transformer_engine_installed())
"""
    assert run_python(code) == "megatron.core.utils True"


def test_a_device_chosen_by_a_block_is_kept():
    """transformers makes a model on "meta" before it reads its weights."""
    code = """
import torch
from megatron_codec import platform
platform.prepare()
with torch.device("meta"):
    made = [torch.empty(2), torch.arange(3), torch.zeros_like(torch.ones(2))]
print({str(tensor.device) for tensor in made})
"""
    assert run_python(code) == "{'meta'}"


def test_random_state_is_that_of_the_cpu(prepared):
    from megatron.core.tensor_parallel import random

    for module in (torch.cuda, random):
        read = getattr(module, "_get_cuda_rng_state", None) or module.get_rng_state
        write = getattr(module, "_set_cuda_rng_state", None) or module.set_rng_state
        state = read()
        first = torch.rand(5)
        write(state)
        assert torch.equal(torch.rand(5), first)
    torch.cuda.manual_seed(3)
    first = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(5), first)


def test_nothing_is_compiled_at_run_time(prepared):
    from megatron.core import jit

    def function(x):
        return x + 1

    assert jit.jit_fuser(function) is function
    # torch.compile itself is left for users.
    assert torch.compile.__module__ == "torch"
    code = (
        "import torch\nbefore = torch.compile\n"
        "from megatron_codec import platform; platform.prepare()\nprint(torch.compile is before)"
    )
    assert run_python(code) == "True"


def test_megatron_must_not_be_imported_first():
    code = """
import megatron.core
from megatron_codec import platform
try:
    platform.prepare()
except RuntimeError as error:
    print(error)
"""
    assert run_python(code) == "megatron.core was imported before megatron_codec.platform.prepare()"


def test_with_cuda_nothing_is_patched():
    """CUDA is pretended; every attribute of torch, torch.cuda, Tensor and distributed stays what it was."""
    code = """
import torch, torch.distributed
places = (torch, torch.cuda, torch.cuda.random, torch.Tensor, torch.distributed)
torch.cuda.is_available, torch.cuda.current_device = (lambda: True), (lambda: 3)
before = [dict(vars(place)) for place in places]
from megatron_codec import platform
found = platform.prepare()
after = [dict(vars(place)) for place in places]
for place, old, new in zip(places, before, after):
    changed = [name for name in old if new.get(name) is not old[name]]
    assert not changed, (place, changed)
print(found.backend, found.device, "nothing of torch patched" in found.description)
"""
    assert run_python(code) == "nccl cuda:3 True"


def test_importing_the_package_prepares_nothing():
    code = """
import sys
from megatron_codec import codecs, data, flags, presets, tokenizer
print(sorted({"torch", "megatron"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_collectives_of_one_process_are_left_out_and_change_nothing(prepared):
    from megatron_codec import parallel
    from megatron_codec.config import ParallelConfig

    parallel.initialize(ParallelConfig())
    x = torch.arange(6.0)
    torch.distributed.all_gather_into_tensor(x, x)
    torch.distributed.reduce_scatter_tensor(x, x)
    assert x.tolist() == [0, 1, 2, 3, 4, 5]
    y = torch.zeros(6)
    torch.distributed.all_gather_into_tensor(y, x)
    assert y.tolist() == x.tolist()
    y.zero_()
    work = torch.distributed.reduce_scatter_tensor(y, x, async_op=True)
    work.wait()
    assert y.tolist() == x.tolist()
