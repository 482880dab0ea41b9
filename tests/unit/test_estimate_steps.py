"""What is estimated, against real models, optimizers and training steps."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_codec import _csrc, parallel
from megatron_codec.config import PretrainConfig
from megatron_codec.estimate import estimate
from megatron_codec.flags import parse_pretrain
from megatron_codec.model import build_model, products, transformer_config
from megatron_codec.training import step
from megatron_codec.training.optimizer import build_optimizer, data_parallel
from tests.distributed.launch import launch
from tests.llama import NUM_TOKENS

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
    pairs = [(layout, "--bf16") for layout in layouts]
    pairs += [(layouts[1], "--no-bf16"), (layouts[2], "--no-bf16")]
    pairs += [(layouts[1], "--bf16 --recompute-granularity full")]
    command_lines = [
        # A wide MLP, because gloo's threads at times hold a tensor of the width for a moment longer.
        [*SHAPE, "--ffn-hidden-size", "768", *layout.split(), *precision.split()]
        for layout, precision in pairs
    ]
    for measured in launch("tests.unit.test_estimate_steps:measure", 2, command_lines=command_lines):
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


@pytest.mark.slow
def test_memory_of_two_processes_under_context_parallelism_virtual_stages_and_recomputation():
    interleaved = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    layouts = (
        "--context-parallel-size 2 --bf16",
        "--context-parallel-size 2 --no-bf16",
        "--context-parallel-size 2 --bf16 --recompute-granularity full",
        "--context-parallel-size 2 --bf16 --recompute-granularity selective",
        "--context-parallel-size 2 --bf16 --micro-batch-size 2 --global-batch-size 2",
        f"{interleaved} --bf16 --global-batch-size 2",
        f"{interleaved} --no-bf16 --global-batch-size 8",
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
    for measured in launch("tests.unit.test_estimate_steps:measure", 2, command_lines=command_lines):
        for command_line, values in zip(command_lines, measured, strict=True):
            assert_agrees(command_line, values, 2)


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
