"""Checkpoints of every layout become Hugging Face folders, and those checkpoints for every layout."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_codec.conversion import ConvertConfig, convert
from megatron_codec.data import CodecDataset
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description
from tests.data_sources import photo_crops
from tests.distributed.launch import launch
from tests.public_model import sentencepiece_model, write_public_model
from tests.tiny import CODEC

pytestmark = pytest.mark.timeout(900)  # one start of processes runs through many layouts
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {"TP=1, PP=1": (1, {}), "TP=2": (2, TP), "PP=2": (2, PP), "TP=2, PP=2": (4, TP | PP)}
SHAPES = {
    "tiny": "--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4",
    # Heads 12 wide, two rows of padding, another base and epsilon.
    "odd": (
        "--num-layers 2 --hidden-size 72 --ffn-hidden-size 54 --num-attention-heads 6 "
        "--make-vocab-size-divisible-by 36 --rotary-base 5000 --norm-epsilon 1e-3"
    ),
}
# Written by interleaved stages, which only training has, and read by plain ones.
INTERLEAVED = {"num_virtual_stages_per_pipeline_rank": 2}
TRAINING = (
    "--seq-length 160 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-2 --min-lr 1e-2 "
    "--lr-warmup-iters 0 --eval-iters 0 --init-method-std 0.2"
)
FOREIGN = {"plain": {}, "grouped-query": {"num_key_value_heads": 2}, "padded": {"vocab_size": 384}}


@pytest.fixture(scope="module")
def ids(corpus) -> list[int]:
    """The first part of a held-out picture, BOS in front."""
    return CodecDataset.open(corpus.valid).document(0)[:150].tolist()


@pytest.fixture(scope="module")
def compared(corpus, ids, tmp_path_factory) -> dict[tuple[str, str, str], list[torch.Tensor]]:
    """By where a model came from ("ours" or "theirs"), shape and layout: logits [tokens, ids] of that layout
    and of transformers."""
    root = tmp_path_factory.mktemp("layouts")
    written: dict[tuple[str, str], Path] = {}
    for world_size in (1, 2, 4):
        lines = []
        for name, (size, layout) in LAYOUTS.items():
            for shape, flags in SHAPES.items():
                interleaved = INTERLEAVED if layout == PP and shape == "tiny" else {}
                if size == world_size:
                    folder = written[shape, name] = root / f"{shape} {name}"
                    options = [f"--{k.replace('_', '-')}={v}" for k, v in (layout | interleaved).items()]
                    lines.append(
                        [*flags.split(), *TRAINING.split(), *options, "--train-data-path", corpus.train]
                        + ["--save", str(folder)]
                    )
        launch("tests.distributed.jobs:train", world_size, command_lines=lines)

    streams = [CODEC.encode(crop) for crop in photo_crops(40, CODEC.image_size)]
    slow = sentencepiece_model(streams, 323)
    foreign = {
        name: write_public_model(root / name, slow, torch.float32, max_position_embeddings=160, **fields)
        for name, fields in FOREIGN.items()
    }
    theirs, cases = {}, []
    for (shape, name), folder in written.items():
        out, back = root / f"{folder.name} out", root / f"{folder.name} back"
        run(folder, "megatron", out, "hf")
        run(out, "hf", back, "megatron")
        theirs["ours", shape, name] = logits_of(out, ids)
        cases += [("ours", shape, name, folder), ("back", shape, name, back)]
    for shape, folder in foreign.items():
        run(folder, "hf", root / f"{shape} ours", "megatron")
        for name in LAYOUTS:
            theirs["theirs", shape, name] = logits_of(folder, ids)
            cases.append(("theirs", shape, name, root / f"{shape} ours"))
    found = {}
    for world_size in (1, 2, 4):
        chosen = [case for case in cases if LAYOUTS[case[2]][0] == world_size]
        [results, *_] = launch(
            "tests.distributed.jobs:logits",
            world_size,
            checkpoint_folders=[str(folder) for *_, folder in chosen],
            layouts=[LAYOUTS[name][1] for _, _, name, _ in chosen],
            ids=ids,
        )
        for (origin, shape, name, _), rows in zip(chosen, results, strict=True):
            reference = theirs["ours" if origin == "back" else origin, shape, name]
            found[origin, shape, name] = [torch.tensor(rows), reference]
    return found


def run(load: Path, source: str, save: Path, target: str) -> None:
    # Small shards, so that there are several.
    assert convert(ConvertConfig(source, target, load, save, max_shard_size=1e-4, image_size=32))


@torch.no_grad()
def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("origin", ["ours", "back"])
def test_a_checkpoint_has_the_same_logits_in_transformers_and_when_it_comes_back(
    origin, shape, layout, compared
):
    ours, theirs = compared[origin, shape, layout]
    assert ours.shape == theirs.shape and theirs.shape[1] == 322, "padding is gone"
    assert theirs.std() > 0.5, "logits that are far from zero"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FOREIGN)
def test_a_foreign_llama_has_the_same_logits_under_every_layout(shape, layout, compared):
    ours, theirs = compared["theirs", shape, layout]
    assert ours.shape[1] == 323
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs[:, :323], atol=1e-4, rtol=0)


def test_what_a_checkpoint_says_of_itself_comes_back(corpus, tmp_path):
    [[_]] = launch(
        "tests.distributed.jobs:train",
        1,
        command_lines=[
            [*SHAPES["odd"].split(), *TRAINING.split(), "--train-data-path", corpus.train]
            + ["--save", str(tmp_path / "ours")]
        ],
    )
    run(tmp_path / "ours", "megatron", tmp_path / "out", "hf")
    run(tmp_path / "out", "hf", tmp_path / "back", "megatron")
    before, after = (
        asdict(Description.read(checkpoint.latest(tmp_path / name))) for name in ("ours", "back")
    )
    assert before.pop("optimizer") and not after.pop("optimizer")
    assert after == before
