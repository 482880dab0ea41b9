"""A model of the public one's kind, converted: our tools do with it what transformers does."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_codec.codecs import JpegCodec
from megatron_codec.conversion import ConvertConfig, convert
from megatron_codec.conversion.distributed import Checkpoint
from megatron_codec.inference import Engine, EngineConfig
from megatron_codec.inference.generate import GenerateConfig, generate
from megatron_codec.model.hf import weights_of
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.exchange import to_text
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description
from tests.data_sources import photo_crops
from tests.public_model import LLAMA_TOKENIZER, sentencepiece_model, write_public_model
from tests.unconstrained import Sampling

NEW_TOKENS = 40
CODEC = JpegCodec(image_size=256, quality=25)


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    return photo_crops(40)


# SentencePiece begins a text with a sign for a space unless it is told not to.
@pytest.fixture(scope="module", params=[False, True], ids=["", "dummy prefix"])
def public(request, crops, tmp_path_factory) -> Path:
    streams = [CODEC.encode(crop) for crop in crops]
    slow = sentencepiece_model(streams, 323, add_dummy_prefix=request.param)
    return write_public_model(tmp_path_factory.mktemp("public"), slow)


@pytest.fixture(scope="module")
def ours(public, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "checkpoint"
    assert convert(ConvertConfig("hf", "megatron", public, folder))
    return folder


@pytest.fixture(scope="module")
def theirs(public):
    return AutoModelForCausalLM.from_pretrained(public, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def slow_tokenizer(public):
    return AutoTokenizer.from_pretrained(public, use_fast=False)


def cut_after_row(text: str, rows: int) -> str:
    """Up to the n-th RST7, as the paper's script cuts a prompt."""
    ends = [match.end() for match in re.finditer("\u28ff\u28d7", text)]
    return text[: ends[rows - 1]]


def greedy(theirs, ids: list[int], never: list[int]) -> list[int]:
    made = theirs.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=never,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(ids) :].tolist()


def test_prompts_and_greedy_choices_are_those_of_transformers(ours, theirs, slow_tokenizer, crops):
    engine = Engine.load(ours, EngineConfig(cache_tokens=13000))
    tokenizer = engine.tokenizer
    assert (tokenizer.bos, tokenizer.eos) == (slow_tokenizer.bos_token_id, slow_tokenizer.eos_token_id)
    assert engine.codec == CODEC
    seen = set()
    for crop, ratio in zip(crops[::9], (0.25, 0.5, 0.75, 0.1, 0.9), strict=True):
        stream = CODEC.encode(crop)
        text = cut_after_row(to_text(stream), int(32 * ratio))
        expected = [slow_tokenizer.bos_token_id, *slow_tokenizer(text, add_special_tokens=False)["input_ids"]]
        prompt = engine.prompt_ids(stream, ratio)
        assert prompt == expected
        [sample] = engine.generate([prompt], Sampling(temperature=0, max_tokens=NEW_TOKENS))
        assert sample.token_ids == greedy(theirs, prompt, [tokenizer.bos, 0])
        seen |= set(sample.token_ids)
    assert len(seen) > 20, "choices that could differ"


def test_pictures_are_those_of_transformers(public, ours, theirs, slow_tokenizer, crops, tmp_path):
    """Through tools/generate.py's own function; their picture is put together as the paper's script does."""
    crops[3].save(tmp_path / "photo.png")
    settings = {
        "num_samples": 1,
        "constrain": False,
        "prompt_image": (tmp_path / "photo.png",),
        "prompt_ratio": 0.5,
    }
    generate(
        GenerateConfig(load=ours, output=tmp_path / "made", temperature=0, max_tokens=NEW_TOKENS, **settings)
    )
    [made] = (tmp_path / "made").glob("photo-*")
    text = cut_after_row(to_text(CODEC.encode(crops[3])), 16)
    ids = [slow_tokenizer.bos_token_id, *slow_tokenizer(text, add_special_tokens=False)["input_ids"]]
    new = greedy(theirs, ids, [slow_tokenizer.bos_token_id, 0])
    characters = slow_tokenizer.decode(ids + new, skip_special_tokens=True).strip()
    stream = bytes(ord(character) - 0x2800 for character in characters)
    # What the scan cannot hold ends it, in ours as in any decoder.
    end = re.search(rb"\xff[^\x00\xff\xd0-\xd7]", stream[len(CODEC.head) :])
    stream = stream[: len(CODEC.head) + end.start()] if end else stream
    file = stream[:2] + CODEC.tables[2:-2] + stream[2:] + b"\xff\xd9"
    (tmp_path / "theirs.jpg").write_bytes(file)
    pictures = [np.asarray(Image.open(path)) for path in (made, tmp_path / "theirs.jpg")]
    assert np.array_equal(*pictures)
    assert pictures[0][:128].std() > 10, "the upper half of a photograph"


def test_what_is_written_says_where_it_came_from(public, ours, capsys, tmp_path):
    description = Description.read(checkpoint.latest(ours))
    assert not description.optimizer and not description.bf16 and description.iteration == 0
    assert description.codec == CODEC.to_dict()
    assert description.model.seq_length == 12288
    assert Tokenizer.load(ours / "tokenizer.json").hash == description.tokenizer["hash"]
    convert(ConvertConfig("hf", "megatron", public, tmp_path / "again"))
    said = capsys.readouterr().out
    for part in (
        "assumed are those of the JPEG-LM paper: 256 x 256 pixels, quality 25",
        "ids are kept: 323 of them, BOS 1, EOS 2",
        "weights in float16 become float32, exactly",
        "in its own tokenizer and in ours",
    ):
        assert part in said, said


def test_it_goes_on_to_a_folder_of_our_making(public, theirs, ours, crops, tmp_path):
    """With a fast tokenizer of the same ids, and the rows of every id."""
    assert convert(ConvertConfig("megatron", "hf", ours, tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.is_fast
    slow = AutoTokenizer.from_pretrained(public, use_fast=False)
    text = to_text(CODEC.encode(crops[0]))
    assert tokenizer(text)["input_ids"] == slow(text)["input_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.generation_config.suppress_tokens == [1, 0]


def test_special_tokens_are_found_by_their_role(crops, tmp_path, capsys):
    """Here they are added behind the model's own pieces, under other names, and <s> is a piece of no use."""
    slow = sentencepiece_model([CODEC.encode(crop) for crop in crops[:10]], 300)
    write_public_model(tmp_path / "public", slow, vocab_size=302)
    added = {"<end>": 300, "<begin>": 301}
    (tmp_path / "public/added_tokens.json").write_text(json.dumps(added))
    roles = LLAMA_TOKENIZER | {"bos_token": "<begin>", "eos_token": "<end>"}
    (tmp_path / "public/tokenizer_config.json").write_text(json.dumps(roles))
    assert convert(ConvertConfig("hf", "megatron", tmp_path / "public", tmp_path / "ours"))
    tokenizer = Tokenizer.load(tmp_path / "ours/tokenizer.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.num_tokens) == (301, 300, 302)
    assert tokenizer.unused == [0, 1, 2]
    assert "BOS 301, EOS 300, 3 without a use" in capsys.readouterr().out


def test_rows_of_no_id_become_padding(crops, tmp_path, capsys):
    """And leave the weights of a folder of our making, but come back from it."""
    slow = sentencepiece_model([CODEC.encode(crop) for crop in crops[:10]], 300)
    write_public_model(tmp_path / "public", slow, torch.float32, vocab_size=320)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "public")
    paths = [tmp_path / name for name in ("public", "ours", "out", "back")]
    kinds = ["hf", "megatron", "hf", "megatron"]
    for i in range(3):
        assert convert(ConvertConfig(kinds[i], kinds[i + 1], paths[i], paths[i + 1]))
    assert "20 rows of embedding and output layer belong to no id" in capsys.readouterr().out
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out.lm_head.weight.shape == (300, 64)
    for path in (tmp_path / "ours", tmp_path / "back"):
        start = checkpoint.latest(path)
        weights = Checkpoint(start, Description.read(start).model, 300)
        first, *_, last = weights_of(weights.model)
        for weight, rows in ((first, theirs.model.embed_tokens.weight), (last, theirs.lm_head.weight)):
            assert torch.equal(weights.read(weight), rows[:300])
            assert torch.equal(weights.padding(weight)[:20], rows[300:])
            assert not weights.padding(weight)[20:].any()  # of 384 rows


def test_a_fast_tokenizer_that_was_made_of_the_slow_one_is_read_too(public, ours, tmp_path):
    """As transformers saves it."""
    for file in public.iterdir():
        if not file.name.startswith("token"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    AutoTokenizer.from_pretrained(public).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    assert convert(ConvertConfig("hf", "megatron", tmp_path, tmp_path / "ours"))
    expected = Tokenizer.load(ours / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "ours/tokenizer.json").hash == expected.hash
