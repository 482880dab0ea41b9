"""The paper's 7B shape with random weights, converted both ways and sampled, within bounded memory.

    python -m pytest -m slow -s tests/end_to_end/test_conversion_7b.py

It takes 45 GB of disk and prints time and peak memory of each step.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from megatron_codec.codecs import JpegCodec
from tests.data_sources import photo_crops
from tests.forks import ROOT
from tests.public_model import LLAMA_TOKENIZER, sentencepiece_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LAYERS, HIDDEN, FFN, HEADS, IDS = 32, 4096, 11008, 32, 323
LIMIT = 6 * 2**30  # bytes of resident memory for a conversion
DISK = 45e9
# To sample, as measured, with some to spare. The engine has the weights twice while it packs them.
MEMORY = {"transformers": 14.5e9, "ours": 20e9}
GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
prompt = tokenizer(chr(0x28ff) + chr(0x28d8), return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=16, min_new_tokens=16, pad_token_id=0)[0]
json.dump(ids[prompt["input_ids"].shape[1]:].tolist(), open(sys.argv[2], "w"))
"""


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


def random_tensors() -> Iterator[dict[str, torch.Tensor]]:
    """The weights, layer by layer, under transformers' names."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    for number in range(LAYERS):
        yield {
            f"model.layers.{number}.{name}": tensor
            for name, tensor in {
                "self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
                "self_attn.k_proj.weight": matrix(HIDDEN, HIDDEN),
                "self_attn.v_proj.weight": matrix(HIDDEN, HIDDEN),
                "self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
                "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
                "mlp.up_proj.weight": matrix(FFN, HIDDEN),
                "mlp.down_proj.weight": matrix(HIDDEN, FFN),
                "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
                "post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }.items()
        }
    yield {
        "model.embed_tokens.weight": matrix(IDS, HIDDEN),
        "lm_head.weight": matrix(IDS, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }


def write_model(folder: Path) -> None:
    """Of the public model's kind, in a shard for each layer."""
    folder.mkdir()
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=12288,
        rms_norm_eps=1e-5,
        vocab_size=IDS,
    ).save_pretrained(folder)
    files = {}
    for number, tensors in enumerate(random_tensors()):
        file = f"model-{number}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    streams = [JpegCodec().encode(crop) for crop in photo_crops(20)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(streams, IDS))
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA_TOKENIZER))


def run(step: str, *command: object) -> int:
    """Runs Python; prints and returns the peak of its resident memory, in bytes."""
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        # Where memory runs out, this is what has to go, not what else the machine is doing.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        while process.poll() is None:
            time.sleep(0.1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):  # the kernel's own record of the peak
                    peak = int(line.split()[1]) * 1024
        output.seek(0)
        assert process.returncode == 0, f"{step}: {output.read()[-4000:]}"
    print(f"| {step} | {time.monotonic() - started:.0f} | {peak / 2**30:.2f} |", flush=True)
    return peak


def available_memory() -> int:
    """Bytes that a process can have before the machine swaps."""
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


def test_7b_is_converted_both_ways_within_6_gib_and_sampled(folder):
    write_model(folder / "theirs")
    print("\n| step | seconds | peak resident memory, GiB |\n|---|---|---|", flush=True)
    kinds = {"theirs": "hf", "ours": "megatron", "again": "hf"}
    for load, save in (("theirs", "ours"), ("ours", "again")):
        peak = run(
            f"{kinds[load]} to {kinds[save]}", "tools/convert_checkpoint.py", "--from", kinds[load],
            "--to", kinds[save], "--load", folder / load, "--save", folder / save,
        )  # fmt: skip
        assert 0 < peak < LIMIT
    index = json.loads((folder / "again/model.safetensors.index.json").read_text())["weight_map"]
    for tensors in random_tensors():
        for name, tensor in tensors.items():
            with safe_open(folder / "again" / index[name], "pt") as made:
                assert torch.equal(made.get_tensor(name), tensor), name

    if available_memory() < MEMORY["transformers"]:
        pytest.skip(f"converted, not sampled: needs {MEMORY['transformers'] / 1e9:.0f} GB of free memory")
    run("16 tokens by transformers", "-c", GENERATE, folder / "again", folder / "tokens.json")
    assert len(json.loads((folder / "tokens.json").read_text())) == 16
    shutil.rmtree(folder / "again")
    if available_memory() < MEMORY["ours"]:
        pytest.skip(f"not sampled by tools/generate.py: needs {MEMORY['ours'] / 1e9:.0f} GB of free memory")
    run(
        "16 tokens by tools/generate.py, bf16", "tools/generate.py", "--load", folder / "ours",
        "--num-samples", 1, "--max-tokens", 16, "--cache-tokens", 256, "--output", folder / "samples",
    )  # fmt: skip
    [sample] = json.loads((folder / "samples/samples.json").read_text())["files"]
    assert sample["new_tokens"] == 16
