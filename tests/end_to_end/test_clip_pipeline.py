"""The way of clips through the tools, as in examples/pretrain_avclm_tiny.sh: videos in, clips out."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import AvcCodec
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import real_video
from tests.forks import run_tool

ROOT = Path(__file__).parents[2]
CODEC = AvcCodec(frames=6, width=48, height=32)
CLIPS = ["--size", "48x32", "--frames", "6", "--clips-per-video", "0", "--stride", "0.334"]
MODEL = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 2".split()


def tool(name: str, *arguments: object) -> str:
    """Runs tools/NAME.py as a user would, and returns what it printed."""
    done = run_tool(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    videos = [real_video("bikes.mp4"), real_video("bigbuckbunny.mp4")]
    tool("train_tokenizer", "--codec", "avc", "--input", *videos, *CLIPS, "--output", run / "tokenizer.json")
    vocabulary = ["--tokenizer", run / "tokenizer.json"]
    tool("preprocess_avc", "--input", *videos, *CLIPS, *vocabulary, "--output-prefix", run / "train")
    tool(
        *("pretrain", *MODEL, "--seq-length", 512, "--bf16", "--micro-batch-size", 2, "--lr", 3e-3),
        *("--global-batch-size", 2, "--train-iters", 10, "--data-path", run / "train", "--split", "90,10,0"),
        *("--save", run / "checkpoint", "--eval-iters", 1),
    )
    tool(
        *("generate", "--load", run / "checkpoint", "--prompt-video", real_video("carphone_pristine.mp4")),
        *("--prompt-frames", 4, "--num-samples", 2, "--max-tokens", 60, "--output", run / "completions"),
    )
    return run


def test_completed_clips_play_and_begin_as_their_prompt(run):
    original = CODEC.encode(real_video("carphone_pristine.mp4"))
    prompt = CODEC.decode(original)[:4]
    summary = json.loads((run / "completions" / "samples.json").read_text())
    assert [sample["file"] for sample in summary["files"]] == [
        "carphone_pristine-000.mp4",
        "carphone_pristine-001.mp4",
    ]
    for sample in summary["files"]:
        content = (run / "completions" / sample["file"]).read_bytes()
        with av.open(io.BytesIO(content)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert 0 < sample["share_made_up"] <= 2 / 6  # 60 tokens of a model that knows nothing: hardly a frame
        assert len(frames) == 6 and frames[0].shape == (32, 48, 3)
        # A sample with damage is encoded once more.
        assert np.abs(np.stack(frames[:3]).astype(int) - prompt[:3]).mean() < 10
    with Image.open(run / "completions" / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 48 and sheet.height > 3 * 32


def test_the_tokenizer_has_the_papers_size(run):
    assert Tokenizer.load(run / "tokenizer.json").vocab_size == 1024
