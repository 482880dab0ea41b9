"""An engine of several processes samples the tokens of one process."""

import functools

import pytest

from megatron_codec.data import CodecDataset
from megatron_codec.inference import Engine
from tests.distributed.launch import launch
from tests.unconstrained import Sampling

pytestmark = pytest.mark.timeout(600)  # one start of processes runs through many layouts
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {"TP=2": (2, TP), "PP=2": (2, PP), "TP=2, PP=2": (4, TP | PP)}
SAMPLING = {"temperature": 1.2, "top_k": 250, "top_p": 0.97, "seed": 3, "n": 2, "max_tokens": 40}
SAMPLING["heal_prompt"] = True
OPTIONS = {"max_batch_size": 10, "prefill_chunk_size": 16}


@pytest.fixture(scope="module")
def prompts(corpus) -> list[list[int]]:
    """From nothing, and the beginnings of real pictures, of unequal lengths."""
    dataset = CodecDataset.open(corpus.valid)
    return [dataset.document(index)[:length].tolist() for index, length in enumerate((1, 90, 40, 17, 63))]


@pytest.fixture(scope="module")
def of_one_process(trained, prompts):
    return Engine.load(trained.folder).generate(prompts, Sampling(**SAMPLING))


@pytest.fixture(scope="module")
def of_processes(trained, prompts):
    """What all layouts of a number of processes sample, in one start of them."""

    @functools.cache
    def run(world_size: int):
        chosen = {name: layout for name, (size, layout) in LAYOUTS.items() if size == world_size}
        ranks = launch(
            "tests.distributed.jobs:generate",
            world_size,
            checkpoint_folder=str(trained.folder),
            layouts=list(chosen.values()),
            prompts=prompts,
            sampling=SAMPLING,
            **OPTIONS,
        )
        return {name: [results[number] for results in ranks] for number, name in enumerate(chosen)}

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_samples_the_tokens_of_one_process(layout, of_processes, of_one_process, prompts):
    ranks = of_processes(LAYOUTS[layout][0])[layout]
    assert all(rank == ranks[0] for rank in ranks)
    assert len(ranks[0]) == len(of_one_process) == 10
    # Some prompts are healed.
    assert {tuple(made.prompt_ids) for made in of_one_process} != {tuple(prompt) for prompt in prompts}
    for ours, expected in zip(ranks[0], of_one_process, strict=True):
        assert ours["ids"] == expected.token_ids
        assert ours["reason"] == expected.finish_reason
        assert ours["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
