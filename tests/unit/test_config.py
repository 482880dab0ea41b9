"""Flags, presets, the rules that a layout and a batch have to keep, and how faults are told."""

import dataclasses
import itertools
import pickle
import re

import pytest

from megatron_codec.config import ModelConfig, ParallelConfig, PretrainConfig, TrainingConfig
from megatron_codec.errors import UserError, UserErrors, collecting, raise_all, run_tool
from megatron_codec.flags import parse_pretrain
from megatron_codec.presets import PRESETS, preset

EMULATED = "--fp8-format hybrid --fp8-emulation"


def faults_of(*arguments: str, world_size: int = 1) -> list[str]:
    config = parse_pretrain(["--data-path", "p", *arguments])
    return [str(fault) for fault in config.faults(world_size)]


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse_pretrain(["--help"])
    assert end.value.code == 0
    text = re.sub(r"[\s\u2502]+", " ", capsys.readouterr().out)
    groups = [getattr(PretrainConfig(), group.name) for group in dataclasses.fields(PretrainConfig)]
    flags = [f"--{field.name.replace('_', '-')}" for group in groups for field in dataclasses.fields(group)]
    assert len(flags) == len(set(flags)) > 40
    for flag in flags:
        entry = re.search(rf"{flag}\b(.*?)\(default", text)
        assert entry and len(re.findall(r" [a-z]+", entry[1])) >= 1, flag


def test_flags_replace_values_of_a_preset():
    tiny = PRESETS["jpeglm-tiny"]
    config = parse_pretrain(["--lr", "5e-4", "--preset", "jpeglm-tiny", "--no-bf16", "--data-path", "p"])
    assert config.model == tiny.model
    assert config.training == dataclasses.replace(tiny.training, lr=5e-4, bf16=False)
    assert config.data.data_path == ("p",)
    assert parse_pretrain([]) == PretrainConfig()
    with pytest.raises(UserError, match="--preset huge: is not known; use one of jpeglm-7b, "):
        parse_pretrain(["--preset", "huge"])


def test_presets_are_those_of_the_paper():
    """Han et al. 2024: Llama-2 7B, 12K and 32K tokens of context; two epochs of 114 billion tokens."""
    for name, seq_length in (("jpeglm-7b", 12288), ("avclm-7b", 32768)):
        model, training = preset(name).model, preset(name).training
        assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads) == (
            32, 4096, 11008, 32,
        )  # fmt: skip
        assert model.seq_length == seq_length
        assert training.lr == 3e-4 and training.bf16
    seen = preset("jpeglm-7b").training.global_batch_size * 12288 * preset("jpeglm-7b").training.train_iters
    assert seen == pytest.approx(2 * 114e9, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_on_one_process(name):
    assert faults_of("--preset", name) == []


@pytest.mark.parametrize("name", ["jpeglm-7b", "avclm-7b"])
def test_the_paper_presets_run_on_a_cluster(name):
    for world_size, tp, pp in ((8, 1, 1), (8, 8, 1), (32, 2, 2), (32, 8, 4)):
        layout = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
        assert faults_of("--preset", name, *layout, world_size=world_size) == []


def test_a_layout_is_refused_exactly_when_something_does_not_divide():
    model = ModelConfig(num_layers=6, hidden_size=48, ffn_hidden_size=96, num_attention_heads=12)
    for tp, pp, world_size in itertools.product(range(1, 9), range(1, 8), range(1, 17)):
        parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        rules = {
            "processes": world_size % (tp * pp) == 0,
            "--num-attention-heads 12": 12 % tp == 0,
            "--ffn-hidden-size 96": 96 % tp == 0,
            "--make-vocab-size-divisible-by 128": 128 % tp == 0,
            "--num-layers 6": 6 % pp == 0,
        }
        told = [str(fault) for fault in (*parallel.faults(world_size), *model.faults(parallel))]
        for rule, kept in rules.items():
            assert sum(rule in fault for fault in told) == (not kept)
        assert len(told) == len(rules) - sum(rules.values())


def test_the_remedy_of_a_batch_is_a_legal_batch():
    for micro, batch, dp in itertools.product(range(1, 5), range(1, 20), range(1, 5)):
        training = TrainingConfig(micro_batch_size=micro, global_batch_size=batch)
        faults = list(training.faults(dp))
        assert bool(faults) == (batch % (micro * dp) != 0)
        for fault in faults:
            size = int(fault.remedy.removeprefix("use "))
            assert not list(dataclasses.replace(training, global_batch_size=size).faults(dp))
            assert 0 <= size - batch < micro * dp
        if not faults:
            assert training.num_microbatches(dp) * micro * dp == batch


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ("--num-layers 0", "--num-layers 0: must be at least 1"),
        ("--hidden-size -64", "--hidden-size -64: must be at least 1"),
        ("--hidden-size 100 --num-attention-heads 8", "--hidden-size 100: must be a multiple of .* use 104"),
        ("--hidden-size 24 --num-attention-heads 8", "--num-attention-heads 8: makes heads 3 wide"),
        ("--num-attention-heads 0", "--num-attention-heads 0: must be at least 1"),
        ("--seq-length 0", "--seq-length 0: must be at least 1"),
        ("--max-position-embeddings 0", "--max-position-embeddings 0: must be at least 1"),
        (
            "--preset jpeglm-7b --seq-length 12290",
            "--seq-length 12290: must be at most --max-position-embeddings 12288; use 12288, or raise",
        ),
        ("--norm-epsilon nan", "--norm-epsilon nan: must be at least 0 and finite"),
        ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by 0: must be at least 1"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: must be at least 1"),
        ("--context-parallel-size 0", "--context-parallel-size 0: must be at least 1"),
        ("--recompute-method block", "--recompute-method block: goes with --recompute-granularity full"),
        ("--recompute-num-layers 2", "--recompute-num-layers 2: goes with --recompute-granularity full"),
        (
            "--recompute-granularity full --recompute-num-layers 3",
            "--recompute-num-layers 3: must divide the 32 layers .* use one of 1, 2, 4, 8, 16, 32, or",
        ),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 33",
            "--recompute-num-layers 33: must lie between 1 and the 32 layers",
        ),
        (
            "--num-virtual-stages-per-pipeline-rank 2",
            "--num-virtual-stages-per-pipeline-rank 2: needs --pipeline-model-parallel-size above 1",
        ),
        ("--sequence-parallel", "--sequence-parallel: needs --tensor-model-parallel-size above 1"),
        ("--no-use-distributed-optimizer", "--no-use-distributed-optimizer: is not supported"),
        ("--overlap-param-gather", "--overlap-param-gather: needs --overlap-grad-reduce"),
        (
            "--train-data-path q",
            "--data-path p, --train-data-path q, --mock-data not given: exactly one of them",
        ),
        ("--valid-data-path q", "--valid-data-path q: goes with --train-data-path"),
        ("--split 1,2", "--split 1,2: must be three shares"),
        ("--split 0,1,1", "--split 0,1,1: must be three shares, the first above 0"),
        ("--split nan,1,1", "--split nan,1,1: must be three shares"),
        ("--split inf,1,1", "--split inf,1,1: must be three shares"),
        ("--split a,b,c", "--split a,b,c: must be three shares"),
        ("--micro-batch-size 0", "--micro-batch-size 0: must be at least 1"),
        ("--global-batch-size 0", "--global-batch-size 0: must be at least 1"),
        ("--train-iters 0", "--train-iters 0: must be at least 1"),
        ("--lr -1", "--lr -1.0: must be at least 0 and finite"),
        ("--lr inf", "--lr inf: must be at least 0 and finite"),
        ("--lr 1e-5", "--min-lr 3e-05: must not be above --lr 1e-05; use 1e-06"),
        ("--lr-decay-iters 0", "--lr-decay-iters 0: must be at least 1"),
        (
            "--lr-warmup-iters 1000",
            "--lr-warmup-iters 1000: must be below the 1000 steps of the decay; use 50",
        ),
        ("--weight-decay nan", "--weight-decay nan: must be at least 0 and finite"),
        ("--adam-beta2 1", "--adam-beta2 1.0: must be at least 0 and below 1"),
        ("--clip-grad -1", "--clip-grad -1.0: must be at least 0"),
        ("--seed -1", "--seed -1: must be at least 0 and below 4294967296"),
        ("--fp8-emulation", "--fp8-emulation: needs --fp8-format; add --fp8-format hybrid"),
        (f"{EMULATED} --fp8-margin -1", "--fp8-margin -1: must be at least 0"),
        (f"{EMULATED} --fp8-amax-history-len 0", "--fp8-amax-history-len 0: must be at least 1"),
        (f"{EMULATED} --first-last-layers-bf16", "--first-last-layers-bf16: is not possible with .* delayed"),
        (
            f"{EMULATED} --fp8-recipe mxfp8 --fp8-margin 1",
            "--fp8-margin 1: means nothing to --fp8-recipe mxfp8; leave it out, or use --fp8-recipe delayed",
        ),
        (f"{EMULATED} --fp8-recipe blockwise --no-fp8-wgrad", "--no-fp8-wgrad: means nothing to"),
        (
            f"{EMULATED} --fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-end-in-bf16 33",
            "--num-layers-at-end-in-bf16 33: must be at most the 32 layers",
        ),
        (
            f"{EMULATED} --recompute-granularity selective --recompute-modules mlp layernorm",
            "--recompute-modules layernorm: is not possible with --fp8-recipe delayed",
        ),
        ("--save-interval 0 --save s", "--save-interval 0: must be at least 1"),
        ("--save-interval 5", "--save-interval 5: needs --save"),
        ("--finetune", "--finetune: needs --load"),
        ("--log-interval 0", "--log-interval 0: must be at least 1"),
        ("--eval-interval 0", "--eval-interval 0: must be at least 1"),
        ("--eval-iters -1", "--eval-iters -1: must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_one_fault(arguments, fault):
    [told] = faults_of(*arguments.split())
    assert re.match(fault, told) and "; " in told


def test_fp8_needs_what_it_runs_on():
    """This machine has no Transformer Engine. All faults of FP8 come together."""
    arguments = ["--fp8-format", "hybrid", "--hidden-size", "4000", "--seq-length", "1001"]
    told = faults_of(*arguments, "--num-attention-heads", "40", "--no-fp8-emulation-scaling")
    assert [fault.split(":")[0] for fault in told] == [
        "--no-fp8-emulation-scaling",
        "--fp8-format hybrid",
        "--micro-batch-size 1 --seq-length 1001",
        "--fp8-format hybrid",
    ]
    assert "needs --bf16" in told[1] and "needs Transformer Engine, which is not installed" in told[3]
    assert faults_of("--fp8-format", "hybrid", "--fp8-emulation") == []
    # The sizes are Transformer Engine's to ask for, of each process.
    narrow = ["--fp8-format", "e4m3", "--bf16", "--tensor-model-parallel-size", "4", "--hidden-size", "1056"]
    narrow += ["--num-attention-heads", "44", "--ffn-hidden-size", "2816"]
    [told, _] = faults_of(*narrow, world_size=4)
    assert told.startswith("--hidden-size 1056: must be a multiple of 16 x TP = 64") and "use 1088" in told
    assert faults_of(*narrow, "--fp8-emulation", world_size=4) == []
    [told] = [f for f in faults_of(*narrow[:3], "--fp8-recipe", "mxfp8", "--hidden-size", "4112",
                                   "--num-attention-heads", "8") if "hidden" in f]  # fmt: skip
    assert "must be a multiple of 32 x TP = 32" in told and "use 4128" in told


def test_all_faults_come_in_one_message():
    config = parse_pretrain(["--num-layers", "0", "--split", "1", "--lr", "nan", "--eval-iters", "-2"])
    with pytest.raises(UserErrors) as error:
        config.check(1)
    told = [line.split(":")[0] for line in str(error.value).splitlines()]
    data = "--data-path not given, --train-data-path not given, --mock-data not given"
    assert told == ["--num-layers 0", "--lr nan", data, "--split 1", "--eval-iters -2"]


def test_faults_are_collected_raised_and_carried_between_processes():
    one, two = UserError("--a 1", "must be 2", "use 2"), UserError("--b 1", "must be 3")
    assert str(one) == "--a 1: must be 2; use 2" and str(two) == "--b 1: must be 3"
    raise_all([])
    with pytest.raises(UserError) as alone:
        raise_all([one])
    assert alone.value is one
    faults: list[UserError] = []
    with collecting(faults):
        raise_all([one, two])
    with collecting(faults):
        raise two
    assert faults == [one, two, two]
    with pytest.raises(KeyError), collecting(faults):
        raise KeyError
    several = pickle.loads(pickle.dumps(UserErrors([one, two])))
    assert str(several) == "--a 1: must be 2; use 2\n--b 1: must be 3"


def test_a_tool_ends_with_a_status(capsys):
    def interrupted():
        raise KeyboardInterrupt

    outcomes = [(lambda: None, 0), (lambda: 3, 3), (interrupted, 130)]
    outcomes.append((lambda: raise_all([UserError("--a 1", "no"), UserError("--b 2", "no", "use 3")]), 2))
    for main, status in outcomes:
        with pytest.raises(SystemExit) as end:
            run_tool(main)
        assert end.value.code == status
    assert capsys.readouterr().err == "interrupted\nerror: --a 1: no\nerror: --b 2: no; use 3\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--profile-steps 3 3 --save s", "--profile-steps 3 3: must be two steps"),
        ("--profile-steps -1 3 --save s", "--profile-steps -1 3: must be two steps"),
        ("--profile-steps 3 9 --save s --train-iters 8", "--profile-steps 3 9: must lie within the 8 steps"),
        ("--profile-steps 3 8", "--profile-steps 3 8: needs a place for the trace; give --save or"),
        (
            "--profile-steps 3 8 --save s --profile-ranks 0 2",
            "--profile-ranks 0 2: must name processes from 0 to",
        ),
        ("--peak-tflops 0", "--peak-tflops 0.0: must be above 0"),
        ("--peak-tflops nan", "--peak-tflops nan: must be at least 0 and finite"),
        ("--num-samples 0", "--num-samples 0: must be at least 1"),
        ("--sample-interval 0 --save s", "--sample-interval 0: must be at least 1"),
        ("--wandb-exp-name x", "--wandb-exp-name x: needs --wandb-project"),
        ("--wandb-save-dir x", "--wandb-save-dir x: needs --wandb-project"),
    ],
)
def test_what_one_watches_is_checked(flags, told):
    [fault] = faults_of(*flags.split(), world_size=1)
    assert fault.startswith(told)


def test_a_profile_window_is_judged_by_the_steps_that_the_data_give():
    flags = ["--profile-steps", "3", "8", "--save", "s", "--train-iters", "5"]
    assert len(faults_of(*flags)) == 1
    assert faults_of(*flags, "--train-epochs", "2") == []
