"""What a checkpoint becomes: a folder that transformers loads, and the tool that makes it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_codec.codecs import AvcCodec
from megatron_codec.config import ModelConfig
from megatron_codec.conversion import ConvertConfig, convert, distributed, shards
from megatron_codec.conversion import check as proof
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError
from megatron_codec.flags import parse_pretrain
from megatron_codec.inference import Engine
from megatron_codec.model.hf import shape_of
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.exchange import to_text
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description
from megatron_codec.training.pretrain import pretrain
from tests.data_sources import photo_crops
from tests.distributed.launch import launch
from tests.forks import run_tool
from tests.tiny import CODEC, STEPS
from tests.unconstrained import Sampling
from tests.videos import moving, write_video


@pytest.fixture(scope="module")
def out(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "out"
    assert convert(ConvertConfig("megatron", "hf", trained.folder, folder))
    return folder


@pytest.fixture(scope="module")
def streams() -> list[bytes]:
    return [CODEC.encode(crop) for crop in photo_crops(30, CODEC.image_size)]


def test_the_tokenizer_gives_our_ids_with_bos_and_without_eos(corpus, out, streams):
    ours, theirs = Tokenizer.load(corpus.tokenizer), AutoTokenizer.from_pretrained(out)
    assert theirs.is_fast
    for stream in [*streams, b"", bytes(range(256))]:
        ids = ours.encode_to_list(stream)
        assert theirs(to_text(stream))["input_ids"] == [ours.bos, *ids]
        assert theirs(to_text(stream) + "</s>", add_special_tokens=False)["input_ids"] == [*ids, ours.eos]
        assert theirs.decode([ours.bos, *ids, ours.eos], skip_special_tokens=True) == to_text(stream)
    assert theirs.model_max_length == 160
    assert set(theirs(to_text(streams[0]))) == {"input_ids", "attention_mask"}
    assert len(theirs) == ours.num_tokens


def test_greedy_choices_are_those_of_the_engine(trained, out, streams):
    """With transformers' own defaults for this folder, but for sampling and length."""
    engine = Engine.load(trained.folder)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    prompts = [
        engine.prompt_ids(stream, ratio) for stream, ratio in zip(streams, (0, 0.3, 0.5), strict=False)
    ]
    for sample in engine.generate(prompts, Sampling(temperature=0, max_tokens=30)):
        ids = torch.tensor([sample.prompt_ids])
        made = theirs.generate(ids, do_sample=False, max_length=len(sample.prompt_ids) + 30)
        assert made[0].tolist() == sample.prompt_ids + sample.token_ids


def test_config_json_has_what_vllm_and_older_transformers_ask_for(out):
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["model_type"] == "llama"
    assert fields["torch_dtype"] == "float32" and fields["rope_theta"] == 10000.0
    assert fields["vocab_size"] == 322 and (fields["bos_token_id"], fields["eos_token_id"]) == (320, 321)
    assert fields["num_key_value_heads"] == fields["num_attention_heads"] == 4
    assert fields["max_position_embeddings"] == 160


def test_the_script_beside_it_makes_a_picture_without_our_package(out, tmp_path):
    """In a process that cannot import megatron_codec: from another folder, and the path emptied of it."""
    code = (
        "import runpy, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert not name.startswith('megatron_codec'), name\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.argv = ['make_picture.py', {str(tmp_path / 'picture.jpg')!r}, '5']\n"
        f"runpy.run_path({str(out / 'make_picture.py')!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    file = (tmp_path / "picture.jpg").read_bytes()
    assert file.startswith(CODEC.file_head) and file.endswith(b"\xff\xd9")
    picture = Image.open(tmp_path / "picture.jpg")
    assert picture.size == (32, 32) and np.asarray(picture).std() > 1
    code = (out / "make_picture.py").read_text().partition("def main")[2]
    assert len(code.splitlines()) <= 20


def test_the_card_says_what_the_model_is(out, trained):
    card = (out / "README.md").read_text()
    for part in ("| context | 160 tokens |", "image_size 32, quality 25", "64 merges, BOS 320, EOS 321"):
        assert part in card
    assert f"{STEPS} steps, {8 * STEPS} sequences of up to 160 tokens" in card


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_weights_can_be_of_another_type(name, trained, out, tmp_path):
    """Kept, chosen, and kept on the way back."""
    dtype = getattr(torch, name)
    convert(ConvertConfig("megatron", "hf", trained.folder, tmp_path / "out", dtype=name))
    convert(ConvertConfig("hf", "megatron", tmp_path / "out", tmp_path / "back"))
    convert(ConvertConfig("megatron", "hf", tmp_path / "back", tmp_path / "again"))
    assert Description.read(checkpoint.latest(tmp_path / "back")).bf16 == (name == "bfloat16")
    for folder in ("out", "again"):
        with (
            safe_open(tmp_path / folder / "model.safetensors", "pt") as made,
            safe_open(out / "model.safetensors", "pt") as kept,
        ):
            assert set(made.keys()) == set(kept.keys())
            for key in made.keys():  # noqa: SIM118
                assert made.get_tensor(key).dtype == dtype
                assert torch.equal(made.get_tensor(key), kept.get_tensor(key).to(dtype)), key


def test_shards_are_no_larger_than_asked_and_hold_everything(trained, out, tmp_path):
    convert(ConvertConfig("megatron", "hf", trained.folder, tmp_path / "out", max_shard_size=1e-4))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    found = {}
    for file in files:
        with safe_open(file, "pt") as made:
            tensors = {key: made.get_tensor(key) for key in made.keys()}  # noqa: SIM118
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 1e-4 * 2**30 or len(tensors) == 1
        found |= tensors
    assert sum(tensor.nbytes for tensor in found.values()) == index["metadata"]["total_size"]
    with safe_open(out / "model.safetensors", "pt") as whole:
        assert all(torch.equal(whole.get_tensor(key), tensor) for key, tensor in found.items())
        assert set(whole.keys()) == set(found)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 64


def test_training_goes_on_from_weights_only_where_it_is_told_to(corpus, trained, out, tmp_path):
    assert convert(ConvertConfig("hf", "megatron", out, tmp_path / "back"))
    line = [*corpus.flags, "--load", str(tmp_path / "back"), "--train-iters", "21"]
    with pytest.raises(UserError, match="has weights and no optimizer state: it was converted; add --finet"):
        pretrain(parse_pretrain(line))
    # A learning rate of zero shows the loss of the weights themselves.
    zero = ["--finetune", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0", "--train-iters", "1"]
    folders = (tmp_path / "back", trained.folder)
    lines = [[*corpus.flags, *zero, "--load", str(folder)] for folder in folders]
    [[converted, original]] = launch("tests.distributed.jobs:train", 1, command_lines=lines)
    # In which the rows have a part that stand for no id.
    assert converted["validation_loss"] == pytest.approx(original["validation_loss"], abs=1e-6)


def test_the_tool_prints_proof(trained, corpus, tmp_path):
    out = tmp_path / "out"
    check = ["--check", corpus.pictures, "--check-samples", 3]
    done = run_tool(
        "convert_checkpoint",
        "--from",
        "megatron",
        "--to",
        "hf",
        "--load",
        trained.folder,
        "--save",
        out,
        *check,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "weights read again: the same sha256" in said
    assert "ids of 3 documents" in said and "by transformers: the same as ours" in said
    assert "largest difference" in said and "model.safetensors" in said
    # It is no proof if it cannot fail: another model under the same name.
    folder = out / "model.safetensors"
    with safe_open(folder, "pt") as whole:
        tensors = {key: whole.get_tensor(key) for key in whole.keys()}  # noqa: SIM118
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, folder, metadata={"format": "pt"})
    sides = [proof.Side("megatron", checkpoint.latest(trained.folder)), proof.Side("hf", out)]
    tokenizer = Tokenizer.load(corpus.tokenizer)
    chosen = proof.documents([corpus.pictures], 2, CODEC, tokenizer)
    assert not proof.check(sides, chosen, tokenizer, 160, torch.float32)


def test_a_model_of_clips_goes_both_ways(tmp_path, capsys):
    codec = AvcCodec(frames=2, width=64, height=48)
    write_video(tmp_path / "clip.mp4", moving(8))
    stream = codec.encode(tmp_path / "clip.mp4")
    tokenizer = Tokenizer.train([stream] * 2, 300, codec=codec.to_dict())
    model = ModelConfig(2, 32, 48, 2, seq_length=512)
    generator = torch.Generator().manual_seed(0)

    def weights(weight):
        shape = shape_of(weight.row.shape, model, tokenizer.num_tokens)
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / 5

    description = Description(model, tokenizer.to_dict(), codec.to_dict(), "", 7, 56, bf16=False)
    (tmp_path / "ours/iter_0000007").mkdir(parents=True)
    (tmp_path / "ours" / checkpoint.LATEST).write_text("7")
    distributed.write(tmp_path / "ours/iter_0000007", description, weights, lambda _: torch.empty(0, 32), 302)
    check = (tmp_path / "clip.mp4",)
    assert convert(ConvertConfig("megatron", "hf", tmp_path / "ours", tmp_path / "out", check=check))
    assert convert(ConvertConfig("hf", "megatron", tmp_path / "out", tmp_path / "back", check=check))
    ids = len(tokenizer.encode(stream))
    assert capsys.readouterr().out.count(f"{ids} ids of 1 documents") == 2
    assert "| codec | avc: frames 2" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/make_picture.py").exists()


def test_documents_of_the_check_are_those_of_a_dataset(corpus):
    tokenizer = Tokenizer.load(corpus.tokenizer)
    dataset = CodecDataset.open(corpus.valid)
    known = {tuple(dataset.document(i).tolist()) for i in range(dataset.num_documents)}
    chosen = proof.documents([corpus.pictures], 5, CODEC, tokenizer)
    assert len(chosen) == 5 and all(tuple(ids) in known for _, ids in chosen)
