"""Pictures sampled from the model in training: those of its checkpoint, and without a trace in the run."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.flags import parse_pretrain
from megatron_codec.inference import Engine
from megatron_codec.inference.training_samples import PictureSampler
from megatron_codec.tokenizer import Tokenizer
from tests.distributed.launch import launch
from tests.llama import NUM_TOKENS, SMALL, small_model
from tests.tiny import CODEC, read_metrics
from tests.unconstrained import Sampling

pytestmark = pytest.mark.timeout(600)  # one start of processes runs through many layouts
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "one process": (1, []),
    "bf16": (1, ["--bf16"]),
    "TP=2, sequence parallel": (2, [*TP, "--sequence-parallel"]),
    "PP=2, recomputed": (2, [*PP, "--recompute-granularity", "full"]),
    # Without an evaluation, nothing but the sampler asks for the weights of the other process.
    "DP=2, overlapped": (2, ["--overlap-grad-reduce", "--overlap-param-gather", "--eval-iters", "0"]),
}
NUM_SAMPLES, EVERY, STEPS = 3, 2, 4


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """The --save of a run with samples, and the metrics of one without, of each layout."""
    folder = tmp_path_factory.mktemp("samples")
    flags = [
        "--sample-interval",
        str(EVERY),
        "--num-samples",
        str(NUM_SAMPLES),
        "--save-interval",
        str(EVERY),
    ]
    runs = {name: (folder / f"{i}-with", folder / f"{i}-without") for i, name in enumerate(LAYOUTS)}
    for size in (1, 2):
        lines = []
        for name, (world_size, layout) in LAYOUTS.items():
            if world_size == size:
                save, log = runs[name]
                common = [*corpus.flags, "--train-iters", str(STEPS), "--eval-interval", "3", *layout]
                lines += [[*common, *flags, "--save", str(save)], [*common, "--metrics-file", str(log)]]
        launch("tests.distributed.jobs:train", size, command_lines=lines)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_leaves_no_trace_in_the_course_of_training(layout, runs):
    save, log = runs[layout]
    with_samples, without = read_metrics(save / "metrics.jsonl"), read_metrics(log)
    assert with_samples.keys() == without.keys() == set(range(1, STEPS + 1))
    for iteration, step in without.items():
        for name in ("loss", "grad_norm", "learning_rate", "validation_loss", "validation_bits_per_byte"):
            assert with_samples[iteration].get(name) == step.get(name), (iteration, name)
        assert ("share_that_decodes" in with_samples[iteration]) == (iteration % EVERY == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_those_of_an_engine_with_the_checkpoint(layout, runs):
    save, _ = runs[layout]
    assert sorted(path.name for path in (save / "samples").iterdir()) == [
        f"iter_{iteration:07d}.png" for iteration in (EVERY, 2 * EVERY)
    ]
    for iteration in (EVERY, 2 * EVERY):
        engine = Engine.load(save / f"iter_{iteration:07d}")
        settings = Sampling(seed=1234, n=NUM_SAMPLES, heal_prompt=True)
        completions = engine.generate([engine.prompt_ids()], settings)
        pictures = [completion.media for completion in completions]
        expected = contact_sheet([pictures[i : i + 2] for i in range(0, NUM_SAMPLES, 2)])
        found = Image.open(save / "samples" / f"iter_{iteration:07d}.png")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert read_metrics(save / "metrics.jsonl")[iteration]["share_that_decodes"] == 1.0


@pytest.fixture
def sampler() -> PictureSampler:
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    assert tokenizer.num_tokens == NUM_TOKENS
    flags = {
        name: getattr(SMALL, name)
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
    }
    command = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return PictureSampler(parse_pretrain([*command, "--num-samples", "3"]), tokenizer, CODEC.to_dict())


def test_the_engine_reads_the_weights_and_nothing_changes(sampler):
    from megatron.core import tensor_parallel  # only once the platform is prepared

    module, layout = small_model()
    module.train()
    parameters = {name: (p.data_ptr(), p.clone()) for name, p in module.named_parameters()}
    tracker = tensor_parallel.get_cuda_rng_tracker()
    state, states = torch.get_rng_state(), {k: v.clone() for k, v in tracker.get_states().items()}
    first = sampler.sample(module, layout)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tracker.get_states()[name], each) for name, each in states.items())
    assert module.training and all(p.requires_grad for p in module.parameters())
    for name, parameter in module.named_parameters():
        pointer, values = parameters[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)
    assert first.count == 3 and math.isfinite(first.seconds)
    # The same weights give the same pictures; new weights give others, without being handed over again.
    again = sampler.sample(module, layout)
    assert np.array_equal(np.asarray(again.sheet), np.asarray(first.sheet))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    other = sampler.sample(module, layout)
    assert not np.array_equal(np.asarray(other.sheet), np.asarray(first.sheet))


def test_a_run_of_samples_has_a_fault_for_each_thing_it_lacks():
    def told(*flags: str) -> list[str]:
        return [str(fault) for fault in parse_pretrain([*flags, "--sample-interval", "5"]).faults(1)]

    codec, place = told("--mock-data")
    assert codec.startswith("--sample-interval 5: needs real data: --mock-data has no codec to decode with; ")
    assert place.startswith("--sample-interval 5: needs a place for the pictures; give --save, ")
    assert told("--data-path", "p", "--save", "s") == []
