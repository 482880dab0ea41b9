"""What a dry run says, and the paper's figures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_codec.config import ParallelConfig
from megatron_codec.errors import UserError, UserErrors
from megatron_codec.estimate import GPUS, dry_run, estimate, gpu
from megatron_codec.flags import parse_dry_run, parse_pretrain
from megatron_codec.presets import preset
from tests.llama import NUM_TOKENS

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --seq-length 256".split()
)


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
