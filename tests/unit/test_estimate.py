"""What a dry run says, against real models, optimizers and training steps, and the paper's figures."""

import json
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_codec import _csrc, parallel
from megatron_codec.config import ParallelConfig, PretrainConfig
from megatron_codec.errors import UserError, UserErrors
from megatron_codec.estimate import GPUS, dry_run, estimate, gpu
from megatron_codec.flags import parse_dry_run, parse_pretrain
from megatron_codec.model import build_model, products, transformer_config
from megatron_codec.presets import preset
from megatron_codec.training import step
from megatron_codec.training.optimizer import build_optimizer, data_parallel
from tests.distributed.launch import launch
from tests.llama import NUM_TOKENS

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --seq-length 256".split()
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and still there, and of those that are sent.

    Attributes:
        peak: bytes at most so far.
        sent: to other processes of two, by operation.
    """

    def __init__(self, existing: set[int]):
        super().__init__()
        self.peak = 0
        self.sent: Counter[str] = Counter()
        self._existing = existing
        self._seen: dict[int, weakref.ref] = {}

    @property
    def now(self) -> int:
        """Bytes at the moment: recomputation empties and fills storages without an operation of torch."""
        there = (storage() for storage in list(self._seen.values()))
        return sum(storage.nbytes() for storage in there if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
            self.sent[name] += max(sizes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._existing and key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._seen.pop(key))


def measure(command_lines: list[list[str]]) -> list[dict[str, Any]]:
    """Builds the model of each command line in this world and takes a step on random tokens.

    Gradients are not reduced: gloo copies the whole buffer for it, and NCCL does not.

    Returns:
        Bytes of `weights`, `gradients` and `optimizer`; `parameters`; `kept`, bytes at the end of the last
        forward pass; `peak`, the most bytes beside weights, gradients and optimizer; `stage`; `sent`,
        bytes in operations of torch.distributed.
    """
    return [_measure(command_line) for command_line in command_lines]


def _measure(command_line: list[str]) -> dict[str, Any]:
    # Copies in fp32, where a processor lacks bf16, are no part of what is estimated.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "processor_lacks_bf16", lambda: False)
        return _take_a_step(command_line)


def _take_a_step(command_line: list[str]) -> dict[str, Any]:
    config = parse_pretrain(command_line)
    model, training = config.model, config.training
    layout = parallel.initialize(config.parallel)
    shape = transformer_config(model, config.parallel, training, layout)
    chunks = [build_model(shape, model, NUM_TOKENS, layout, chunk=i) for i in range(layout.vp)]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    torch.manual_seed(layout.rank)
    wrapped = data_parallel(chunks, config.parallel, layout)
    optimizer = build_optimizer(wrapped, training, config.parallel)
    weights = storages(parameters)
    gradients = storages(parameter.main_grad for parameter in parameters)
    shape = training.micro_batch_size, model.seq_length // layout.cp
    batches = []
    for _ in range(training.num_microbatches(layout.dp)):
        tokens = torch.randint(NUM_TOKENS, (shape[0], shape[1] + 1))
        batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
        positions = layout.positions(model.seq_length).expand(shape)
        batch |= {"position_ids": positions, "loss_mask": torch.ones(shape)}
        batches.append(batch)
    live = LiveBytes(weights.keys() | gradients.keys())
    kept = []

    def forward(batches, model):
        losses, mean = step.forward_step(batches, model, layout)
        kept.append(live.now)
        return losses, mean

    with live:
        step.get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches) if layout.vp == 1 else [iter(batches) for _ in chunks],
            model=wrapped[0] if layout.vp == 1 else [*wrapped],
            num_microbatches=len(batches),
            seq_length=model.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
    optimizer.step()
    owned: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        owned += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        owned += [x for state in part.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    state = {key: size for key, size in storages(owned).items() if key not in weights}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "kept": max(kept),
        "peak": live.peak,
        "stage": layout.pp_rank,
        "sent": live.sent,
    }


def storages(tensors) -> dict[int, int]:
    """Bytes of each memory that the tensors lie in."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def assert_agrees(command_line: list[str], measured: dict[str, Any], world_size: int) -> None:
    """Every component within 1% in one process (5% without AMX, whose kernels keep less than torch's) and 5%
    in two, parameters exactly."""
    estimated = estimate(parse_pretrain(command_line), world_size, NUM_TOKENS, on_cpu=True)
    stage = estimated.stages[measured["stage"]]
    memory = stage.memory
    assert sum(stage.parameters.values()) == measured["parameters"]
    expected = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "peak": memory.activations + memory.logits + memory.workspace,
    }
    if world_size == 2:
        sent = measured["sent"]
        gathered = sent.get("_allgather_base_", 0) + sent.get("_reduce_scatter_base_", 0)
        within = (
            "context-parallel" if estimated.config.parallel.context_parallel_size > 1 else "tensor-parallel"
        )
        measured[within] = gathered // 2 + sent.get("allreduce_", 0)  # of two processes
        measured["pipeline"] = sent.get("send", 0)
        for name in (within, "pipeline"):
            if stage.traffic[name]:
                expected[name] = stage.traffic[name]
            else:
                assert measured[name] < 100
    if len(estimated.stages) == 1:  # or the schedule holds a few tensors between its calls
        expected["kept"] = memory.activations + memory.logits
    ratios = {name: expected[name] / measured[name] for name in expected}
    most = 0.05 if world_size == 2 else 0.01 if _csrc.has_amx() else 0.05
    assert all(abs(ratio - 1) < most for ratio in ratios.values()), (
        command_line,
        ratios,
    )


@pytest.mark.parametrize("recompute", ["None", "full"])
@pytest.mark.parametrize("precision", ["--bf16", "--no-bf16"])
def test_memory_of_one_process(precision, recompute):
    shapes = (
        SHAPE,
        [*SHAPE, "--micro-batch-size", "3", "--global-batch-size", "3"],
        [*SHAPE, "--num-layers", "2", "--hidden-size", "256", "--seq-length", "96"],
        [*SHAPE, "--num-layers", "6", "--ffn-hidden-size", "640", "--global-batch-size", "2"],
    )
    for shape in shapes:
        command_line = [*shape, precision, "--recompute-granularity", recompute]
        assert_agrees(command_line, _measure(command_line), 1)


def test_memory_of_two_processes():
    layouts = (
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2 --global-batch-size 4",
        "--global-batch-size 2",
    )
    command_lines = [
        # A wide MLP, because gloo's threads at times hold a tensor of the width for a moment longer.
        [*SHAPE, "--ffn-hidden-size", "768", *layout.split(), *precision.split()]
        for layout in layouts
        for precision in ("--bf16", "--no-bf16", "--bf16 --recompute-granularity full")
    ]
    for measured in launch("tests.unit.test_estimate:measure", 2, command_lines=command_lines):
        for command_line, values in zip(command_lines, measured, strict=True):
            assert_agrees(command_line, values, 2)


PARTS = (
    "selective",
    "selective --recompute-modules mlp",
    "selective --recompute-modules layernorm",
    "selective --recompute-modules core_attn mlp layernorm",
    "full --recompute-num-layers 2",
    "full --recompute-method block --recompute-num-layers 1",
    "full --recompute-method block --recompute-num-layers 4",
)


@pytest.mark.parametrize("recompute", PARTS)
def test_memory_under_recomputation_of_parts(recompute):
    for precision in ("--bf16", "--no-bf16"):
        command_line = [*SHAPE, precision, "--recompute-granularity", *recompute.split()]
        assert_agrees(command_line, _measure(command_line), 1)


def test_memory_of_two_processes_under_context_parallelism_virtual_stages_and_recomputation():
    interleaved = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    layouts = (
        "--context-parallel-size 2 --bf16",
        "--context-parallel-size 2 --no-bf16",
        "--context-parallel-size 2 --bf16 --recompute-granularity full",
        "--context-parallel-size 2 --bf16 --recompute-granularity selective",
        "--context-parallel-size 2 --bf16 --micro-batch-size 2 --global-batch-size 2",
        f"{interleaved} --bf16 --global-batch-size 2",
        f"{interleaved} --bf16 --global-batch-size 4",
        f"{interleaved} --no-bf16 --global-batch-size 8",
        f"{interleaved} --bf16 --global-batch-size 8 --num-layers 8",
        f"{interleaved} --bf16 --global-batch-size 4 --recompute-granularity selective "
        "--recompute-modules mlp",
        "--tensor-model-parallel-size 2 --sequence-parallel --bf16 --recompute-granularity selective "
        "--recompute-modules mlp layernorm",
        "--tensor-model-parallel-size 2 --bf16 --recompute-granularity selective "
        "--recompute-modules core_attn mlp layernorm",
        "--pipeline-model-parallel-size 2 --bf16 --global-batch-size 4 --recompute-granularity full "
        "--recompute-method block --recompute-num-layers 1",
    )
    command_lines = [[*SHAPE, "--ffn-hidden-size", "768", *layout.split()] for layout in layouts]
    for measured in launch("tests.unit.test_estimate:measure", 2, command_lines=command_lines):
        for command_line, values in zip(command_lines, measured, strict=True):
            assert_agrees(command_line, values, 2)


def test_parameters_of_all_gpus_are_those_of_the_model():
    config = preset("jpeglm-7b")
    assert estimate(config, 1, NUM_TOKENS).parameters == 6_479_417_344
    norms = (2 * config.model.num_layers + 1) * config.model.hidden_size  # the only ones that are not cut
    for tp in (1, 2, 8):
        for pp in (1, 2, 4):
            layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
            run = estimate(replace(config, parallel=layout), 64, NUM_TOKENS)
            held = sum(sum(stage.parameters.values()) for stage in run.stages)
            assert tp * held - (tp - 1) * norms == run.parameters == 6_479_417_344
            assert sum(stage.memory.weights for stage in run.stages) == 2 * held
            assert [stage.in_flight for stage in run.stages] == list(range(pp, 0, -1))
            assert run.bubble == (pp - 1) / (512 // (64 // (tp * pp)) + pp - 1)


def flops_of_a_step(config: PretrainConfig) -> int:
    """Of a forward and a backward pass over one sequence, as torch counts them."""
    model = config.model
    layout = parallel.initialize(config.parallel)
    module = build_model(
        transformer_config(model, config.parallel, config.training, layout), model, NUM_TOKENS, layout
    )
    tokens = torch.randint(NUM_TOKENS, (1, model.seq_length))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products torch counts
        module(
            tokens, torch.arange(model.seq_length)[None], attention_mask=None, labels=tokens
        ).sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts():
    """All of attention is counted, as in PaLM; embedding and norms are in 6N and not multiplied."""
    config = parse_pretrain(SHAPE)
    model, counted = config.model, flops_of_a_step(config)
    run = estimate(config, 1, NUM_TOKENS)
    unused = run.vocab_rows * model.hidden_size + (2 * model.num_layers + 1) * model.hidden_size
    assert counted / model.seq_length == run.flops_full - 6 * unused
    assert run.flops_full - run.flops_causal == 6 * model.num_layers * model.hidden_size * model.seq_length


@pytest.mark.parametrize("recompute", ["full", *PARTS])
def test_flops_of_recomputation_are_those_that_torch_counts(recompute):
    without = flops_of_a_step(parse_pretrain(SHAPE))
    config = parse_pretrain([*SHAPE, "--recompute-granularity", *recompute.split()])
    again = flops_of_a_step(config) - without
    assert again == estimate(config, 1, NUM_TOKENS).flops_recomputed * config.model.seq_length


def test_virtual_stages_wait_less_and_hold_more():
    """The example of Narayanan et al. (2021), figure 4: 4 stages, 8 micro-batches, and 2 pieces a stage."""
    command = [*SHAPE, "--num-layers", "8", "--pipeline-model-parallel-size", "4"]
    command += ["--global-batch-size", "8"]
    plain = estimate(parse_pretrain(command), 4, NUM_TOKENS)
    virtual = estimate(
        parse_pretrain([*command, "--num-virtual-stages-per-pipeline-rank", "2"]), 4, NUM_TOKENS
    )
    assert (plain.bubble, virtual.bubble) == (3 / 11, 3 / 19)
    assert [stage.in_flight for stage in plain.stages] == [4, 3, 2, 1]
    assert [stage.in_flight for stage in virtual.stages] == [11, 9, 7, 5]
    assert virtual.stages[1].traffic["pipeline"] == 2 * plain.stages[1].traffic["pipeline"]
    assert virtual.stages[0].traffic["pipeline"] == 3 * plain.stages[0].traffic["pipeline"]


def test_context_parallelism_on_gpus_is_a_ring():
    base = [*SHAPE, "--bf16"]
    alone = estimate(parse_pretrain(base), 1, NUM_TOKENS)
    shared = estimate(parse_pretrain([*base, "--context-parallel-size", "4"]), 4, NUM_TOKENS)
    one, own = alone.stages[0], shared.stages[0]
    keys = 4 * 64 * 128 * 2  # of 4 layers, a quarter of the tokens
    assert own.traffic["context-parallel"] == 3 * (2 + 4) * keys
    assert own.traffic["data-parallel"] == 6 * sum(own.parameters.values()) * 3 // 4
    assert 4 * own.memory.optimizer == one.memory.optimizer  # over DP x CP
    tables = 256 * 32 * 4  # of the rotary embedding, of the whole sequence
    assert (own.memory.activations - tables) * 4 == one.memory.activations - tables


def test_fp8_counts_where_it_is_computed():
    command = ["--preset", "jpeglm-7b", "--recompute-granularity", "None"]
    bf16, fp8, emulated, mixed = (
        estimate(parse_pretrain([*command, *flags.split()]), 32, NUM_TOKENS)
        for flags in (
            "",
            "--fp8-format hybrid",
            "--fp8-format hybrid --fp8-emulation",
            "--fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16",
        )
    )
    matrices, h, f = 4096 * (4 * 4096 + 3 * 11008), 4096, 11008
    assert fp8.stages[0].memory.fp8_copies == 2 * 32 * matrices
    assert mixed.stages[0].memory.fp8_copies == 2 * 30 * matrices
    assert bf16.stages[0].memory == emulated.stages[0].memory
    # Inputs of the products: one byte less each, but for that of attention's output, kept in both.
    saved = bf16.stages[0].memory.activations - fp8.stages[0].memory.activations
    assert saved == 32 * 12288 * (h + h + f - h)
    a100, h100 = gpu("a100-80gb"), gpu("h100-80gb")
    assert [h100.peak(run.config.fp8) for run in (bf16, fp8, emulated)] == [989, 1979, 989]
    assert fp8.tokens_per_second(a100, 0.4) is None and a100.peak(emulated.config.fp8) == 312
    assert h100.peak(replace(fp8.config.fp8, fp8_recipe="mxfp8")) is None
    texts = [dry_run(run.config, 32, 320, 0.4) for run in (fp8, emulated)]
    assert "A100 80 GB has no FP8" in texts[0] and "1,979 FP8" in texts[0]
    assert "counted as bf16" in texts[1] and "1,979" not in texts[1]
    with pytest.raises(UserError, match="use --gpu h100-80gb --fp8-format hybrid"):
        gpu("h100-fp8")


def test_the_table_has_a_column_for_what_is_chosen():
    def head(*flags: str) -> list[str]:
        text = dry_run(parse_pretrain(["--recompute-granularity", *flags]), 1, 320, 0.4)
        [line] = [line for line in text.splitlines() if line.startswith("  recomputation")]
        return line.split()[1:]

    assert head("None") == head("full") == ["none", "full"]
    assert head("selective", "--recompute-modules", "mlp") == ["none", "chosen", "full"]
    assert head("full", "--recompute-method", "block") == ["none", "chosen", "full"]


def test_transformer_engine_fuses_the_norms_that_layernorm_would_recompute():
    def kept(*modules: str, on_cpu: bool = False) -> int:
        flags = ["--recompute-granularity", "selective", "--recompute-modules", *modules]
        run = estimate(parse_pretrain([*SHAPE, *flags]), 1, NUM_TOKENS, on_cpu=on_cpu)
        return run.stages[0].memory.activations

    assert kept("core_attn", "layernorm") == kept("core_attn")
    assert kept("core_attn", "layernorm", on_cpu=True) < kept("core_attn", on_cpu=True)
    assert kept("mlp") < kept("mlp", on_cpu=True)  # the norm is a part of its MLP


def test_the_papers_month_on_32_a100():
    """228 billion tokens in 30 days: 2,749 tokens/s/GPU, 51.3% of the peak, or 42.8% counting half."""
    run = estimate(preset("jpeglm-7b"), 32, NUM_TOKENS)
    a100 = gpu("a100-80gb")
    assert run.tokens / 32 / (30 * 86400) == pytest.approx(2749, abs=1)
    mfu = 2749 * run.flops_full / (a100.tflops * 1e12)
    assert mfu == pytest.approx(0.513, abs=5e-4)
    assert 2749 * run.flops_causal / (a100.tflops * 1e12) == pytest.approx(0.428, abs=5e-4)
    assert run.tokens_per_second(a100, mfu) == pytest.approx(2749)


COMMAND = [
    *("--preset", "jpeglm-7b", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--pipeline-model-parallel-size", "4", "--dry-run"),
]


def test_the_text_says_everything():
    command = [*COMMAND, "--world-size", "64", "--mfu", "0.5"]
    code = """
import json, runpy, sys
sys.argv = ["tools/pretrain.py", *json.loads(sys.argv[1])]
runpy.run_path("tools/pretrain.py")["main"]()
print(sorted({"torch", "megatron"} & set(sys.modules)))
"""
    text = subprocess.check_output([sys.executable, "-c", code, json.dumps(command)], cwd=ROOT, text=True)
    assert text.endswith("\n[]\n")
    for part in (
        *("--num-layers 32", "--bf16", "6,479,417,344", "TP=2 PP=4 DP=8 on 64 GPUs", "64 micro-batches of 1"),
        *(
            "bubble      4.5% of a step",
            "stage 0 of 4",
            "4 micro-batches in flight",
            "5.8204e+10",
            "228.0 billion",
        ),
        *(kind.label for kind in GPUS.values()),
    ):
        assert part in text, part
    run = estimate(parse_dry_run(command).config, 64, NUM_TOKENS)
    assert f"{run.stages[0].memory.total / 2**30:.2f}" in text
    row = next(line for line in text.splitlines() if line.startswith("  A100 80 GB  ") and "2,680" in line)
    assert float(row.split()[-1]) == pytest.approx(run.tokens / (2680 * 64 * 86400), abs=0.06)


def test_the_number_of_gpus(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse_dry_run(COMMAND[:-1]) is None
    assert parse_dry_run(COMMAND).world_size == 8
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert parse_dry_run(COMMAND).world_size == 16
    assert parse_dry_run([*COMMAND, "--world-size", "32"]).world_size == 32
    assert parse_dry_run([*COMMAND, "--lr", "1e-4"]).config.training.lr == 1e-4


def test_a_run_that_does_not_fit_says_so():
    run = estimate(preset("jpeglm-7b"), 8, NUM_TOKENS)
    assert run.headroom(gpu("a100-80gb"), recompute=False) < 0 < run.headroom(gpu("h200-141gb"))
    assert run.need() == run.stages[0].memory.total
    assert json.loads(json.dumps(run.to_dict()))["stages"][0]["memory"]["weights"] == 2 * 6_479_417_344


def test_faults_are_told_as_in_a_run():
    config = parse_pretrain(["--tensor-model-parallel-size", "3", "--global-batch-size", "5"])
    with pytest.raises(UserErrors) as caught:
        dry_run(config, 8, vocab_size=10, mfu=1.5, gpu_name="a10")
    text = str(caught.value)
    for part in (
        "8 processes: must be a multiple",
        "must divide --num-attention-heads",
        "--global-batch-size",
    ):
        assert part in text
    assert "--vocab-size 10" in text and "--mfu 1.5" in text and "--gpu a10: is not known; use one of" in text
    with pytest.raises(UserError, match="--world-size 0"):
        estimate(config, 0, NUM_TOKENS)
