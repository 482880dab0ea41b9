"""What cannot be converted is refused by its name, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HuggingFace
from tokenizers.models import BPE

from megatron_codec.codecs import JpegCodec
from megatron_codec.conversion import ConvertConfig, convert
from megatron_codec.errors import UserError, UserErrors
from tests.data_sources import photo_crops
from tests.forks import run_tool
from tests.public_model import sentencepiece_model, write_public_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    streams = [JpegCodec().encode(crop) for crop in photo_crops(10)]
    slow = sentencepiece_model(streams, 290)
    return write_public_model(tmp_path_factory.mktemp("public"), slow, torch.float32, **SHAPE)


@pytest.fixture(scope="module")
def whole(public, trained, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind that is converted without complaint."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(ConvertConfig("megatron", "hf", trained.folder, out))
    return {"public": public, "ours": out, "checkpoint": trained.folder}


def config(**fields: object) -> Callable[[Path], None]:
    """Changes fields of config.json; None leaves one out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        kept = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of all shards together, which become one file."""

    def rewrite(folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        change(found)
        for file in files:
            file.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(found, folder / "model.safetensors")

    return rewrite


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def text_tokenizer(folder: Path) -> None:
    """A tokenizer of letters."""
    (folder / "tokenizer.model").unlink()
    letters = {character: id for id, character in enumerate("abcdefgh")} | {"<s>": 8, "</s>": 9}
    HuggingFace(BPE(vocab=letters, merges=[])).save(str(folder / "tokenizer.json"))


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def cut(pattern: str) -> Callable[[Path], None]:
    """Leaves the first half of a file."""

    def change(folder: Path) -> None:
        path = min(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


KEY = "model.layers.1.mlp.up_proj.weight"
SCALING = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
PUBLIC: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda folder: first_shard(folder).unlink(),
        r"lacks 1 of \d+ shards: model-00001-of-\d+.safetensors; copy the folder again",
    ),
    "damaged shard": (
        cut("model-*.safetensors"), r"model-00001-of-\d+.safetensors: cannot be read as safetensors",
    ),
    "damaged index": (write("model.safetensors.index.json", "{"), "is no index of shards"),
    "no weights": (
        lambda folder: [file.unlink() for file in folder.glob("model*")],
        "has no model.safetensors and no model.safetensors.index.json; save the model with transformers",
    ),
    "pickled weights": (
        lambda folder: [
            [file.unlink() for file in folder.glob("model*")],
            (folder / "pytorch_model.bin").write_bytes(b""),
        ],
        "only pytorch_model.bin; save the model with transformers",
    ),
    "missing tensor": (
        tensors(lambda found: found.pop(KEY)), rf"lacks 1 of \d+ tensors, first {KEY}",
    ),
    "unknown tensor": (
        tensors(lambda found: found.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)})),
        r"has 1 tensors that a plain Llama has not, first model.layers.0.mlp.up_proj.bias",
    ),
    "wrong shape": (
        tensors(lambda found: found.update({KEY: torch.ones(48, 31)})),
        rf"{KEY}: has the shape \[48, 31\]; by config.json it is \[48, 32\]",
    ),
    "integer weights": (
        tensors(lambda found: found.update({KEY: torch.ones(48, 32, dtype=torch.int8)})),
        rf"{KEY}: is of type I8; must be one of F32, BF16, F16",
    ),
    "another shape in config.json": (config(intermediate_size=64), r"by config.json it is \[64, 32\]"),
    "tied embeddings": (config(tie_word_embeddings=True), "tie_word_embeddings True: tied embeddings are"),
    "rope scaling": (config(rope_parameters=SCALING), "rope scaling of type llama3: is not supported"),
    "rope scaling as it was said before": (
        config(rope_parameters=None, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope scaling of type linear: is not supported",
    ),
    "partial rotation": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5: must be 1"),
    "odd base": (config(rope_parameters={"rope_theta": 0.5}), "rope_theta 0.5: must be a whole number"),
    "another architecture": (
        config(architectures=["MistralForCausalLM"], model_type="mistral"),
        "architecture MistralForCausalLM of model_type mistral: must be LlamaForCausalLM of model_type llama",
    ),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "architecture LlamaForSequenceClassification of model_type llama: must be",
    ),
    "biases": (config(attention_bias=True, mlp_bias=True), "attention_bias True: biases in attention"),
    "activation": (config(hidden_act="gelu"), "hidden_act gelu: another activation"),
    "quantized": (
        config(quantization_config={"quant_method": "gptq"}), "quantization_config gptq: quantized weights",
    ),
    "wide heads": (config(head_dim=64), "head_dim 64: must be hidden_size / num_attention_heads = 16"),
    "odd groups": (config(num_key_value_heads=3), "num_key_value_heads 3: must divide num_attention_heads 2"),
    "no size": (config(hidden_size=None), "hidden_size None: must be a positive number"),
    "size of zero": (config(num_hidden_layers=0), "num_hidden_layers 0: must be a positive number"),
    "heads that do not divide": (config(num_attention_heads=5), "multiple of --num-attention-heads 5"),
    "damaged config.json": (write("config.json", "[]"), r"has no readable config.json \(it is no object\)"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        r"has no tokenizer \(tokenizer.model or tokenizer.json\)",
    ),
    "a tokenizer that is not over bytes": (
        text_tokenizer,
        r"'\u2800': is missing; there must be U\+2800 to U\+28FF.*; only tokenizers over bytes",
    ),
    "damaged tokenizer": (cut("tokenizer.model"), "tokenizer.model: is no SentencePiece model"),
    "damaged settings": (write("tokenizer_config.json", "{"), "tokenizer_config.json: cannot be read"),
    "more ids than rows": (
        config(vocab_size=280), "a tokenizer of 290 ids: must not have more than the 280 rows",
    ),
}  # fmt: skip
OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited config.json": (
        config(rms_norm_eps=1e-6, num_hidden_layers=3),
        "differs from megatron_codec.json in num_layers, norm_epsilon",
    ),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"dropout": null', '"dropout": 0.5')
        ),
        "dropout 0.5: is not supported",
    ),
    "a tokenizer of other ids": (
        lambda folder: (path := folder / "tokenizer.json").write_text(
            path.read_text()
            .replace('"\\u2801": 1,', '"\\u2801": 2,')
            .replace('"\\u2802": 2,', '"\\u2802": 1,')
        ),
        "gives other ids than the tokenizer",
    ),
    "damaged description": (write("megatron_codec.json", "{}"), "is not the description of a checkpoint"),
    "damaged padding": (cut("padding.st"), "padding.st: cannot be read as safetensors"),
    "padding of another shape": (
        lambda folder: save_file({"embedding.word_embeddings.weight": torch.ones(3)}, folder / "padding.st"),
        r"padding.st: embedding.word_embeddings.weight: has the shape \[3\]",
    ),
}
CHECKPOINT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").unlink(),
        "no checkpoint",
    ),
    "no tensors": (lambda folder: min(folder.glob("iter*12/*.distcp")).unlink(), "cannot be read"),
    "damaged tensors": (cut("iter*12/*.distcp"), "cannot be read"),
    "damaged list of tensors": (cut("iter*12/.metadata"), "cannot be read"),
    "another shape in model.json": (
        lambda folder: (path := min(folder.glob("iter*12/model.json"))).write_text(
            path.read_text().replace('"ffn_hidden_size": 160', '"ffn_hidden_size": 128')
        ),
        r"mlp.linear_fc1.weight: has the shape \[4, 320, 64\]; by model.json it is \[4, 256, 64\]",
    ),
}
CASES = [
    (kind, name, *case)
    for kind, cases in (("public", PUBLIC), ("ours", OURS), ("checkpoint", CHECKPOINT))
    for name, case in cases.items()
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [(kind, change, message) for kind, _, change, message in CASES],
    ids=[f"{kind}: {name}" for kind, name, _, _ in CASES],
)
def test_it_is_refused_by_name_and_nothing_is_left(kind, change, message, whole, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(whole[kind], broken)
    change(broken)
    source = "megatron" if kind == "checkpoint" else "hf"
    target = "hf" if kind == "checkpoint" else "megatron"
    with pytest.raises(UserError, match=message) as caught:
        convert(ConvertConfig(source, target, broken, tmp_path / "made"))
    faults = caught.value.faults if isinstance(caught.value, UserErrors) else [caught.value]
    assert all(fault.remedy for fault in faults)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_several_faults_are_told_at_once(public, tmp_path):
    shutil.copytree(public, tmp_path / "broken")
    config(tie_word_embeddings=True, attention_bias=True, rope_parameters=SCALING, head_dim=64)(
        tmp_path / "broken"
    )
    with pytest.raises(UserErrors) as caught:
        convert(ConvertConfig("hf", "megatron", tmp_path / "broken", tmp_path / "made"))
    assert len(caught.value.faults) == 4


def test_every_folder_is_fine_before_it_is_broken(whole, tmp_path):
    for name, kind, target in (
        ("public", "hf", "megatron"), ("ours", "hf", "megatron"), ("checkpoint", "megatron", "hf"),
        ("public", "hf", "hf"), ("checkpoint", "megatron", "megatron"),
    ):  # fmt: skip
        assert convert(ConvertConfig(kind, target, whole[name], tmp_path / f"{name} {target}"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_shard_size": 0.0}, "--max-shard-size 0.0: must be above 0"),
        ({"check_samples": 0}, "--check-samples 0: must be above 0"),
        ({"image_size": 250}, "image size 250: must be a multiple of 16"),
        ({"load": Path("/nowhere")}, "--load /nowhere: has no readable config.json"),
    ],
)
def test_flags_out_of_range_are_refused(flags, message, public, tmp_path):
    settings = {"source": "hf", "target": "megatron", "load": public, "save": tmp_path / "made"}
    with pytest.raises(UserError, match=message):
        convert(ConvertConfig(**(settings | flags)))


def test_an_output_that_exists_is_left_alone(public, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--save .*made: exists already; name another folder"):
        convert(ConvertConfig("hf", "megatron", public, tmp_path / "made"))
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["notes.txt"]


def test_too_little_room_is_told_before_anything_is_written(public, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(UserError, match=r"needs 0.0 GB, and 0.0 GB are free"):
        convert(ConvertConfig("hf", "megatron", public, tmp_path / "made"))
    assert not list(tmp_path.iterdir())


def test_older_buffers_are_ignored(public, tmp_path):
    shutil.copytree(public, tmp_path / "old")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda found: found.update({name: torch.ones(8)}))(tmp_path / "old")
    with safe_open(tmp_path / "old/model.safetensors", "pt") as file:
        assert name in file.keys()  # noqa: SIM118
    assert convert(ConvertConfig("hf", "megatron", tmp_path / "old", tmp_path / "made"))


def test_the_tool_ends_with_status_2_and_one_message(public, tmp_path):
    shutil.copytree(public, tmp_path / "broken")
    first_shard(tmp_path / "broken").unlink()
    folders = ["--load", tmp_path / "broken", "--save", tmp_path / "made"]
    done = run_tool("convert_checkpoint", "--from", "hf", "--to", "megatron", *folders)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --load ") and "shards" in done.stderr
