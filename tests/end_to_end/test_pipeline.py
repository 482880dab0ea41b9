"""The whole way of the data through the tools, as in the quickstart: photos in, pictures and a report out."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.data import CodecDataset
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops
from tests.forks import run_tool

ROOT = Path(__file__).parents[2]
CODEC = ["--image-size", "32", "--remove-head"]
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 160".split()
)


def tool(name: str, *arguments: object) -> str:
    """Runs tools/NAME.py as a user would, and returns what it printed."""
    done = run_tool(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder, as examples/quickstart.sh lays it out, with one broken picture among the photos."""
    photos, run = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("run")
    for number, crop in enumerate(photo_crops(120, 48)):
        crop.save(photos / f"photo-{number}.png")
    (photos / "broken.jpg").write_bytes((photos / "photo-0.png").read_bytes()[:300])
    split = ["--input", photos, "--hold-out", 0.2, *CODEC]
    vocabulary = run / "tokenizer.json"
    tool("train_tokenizer", *split, "--subset", "train", "--vocab-size", 300, "--output", vocabulary)
    for subset in ("train", "test"):
        prefix = run / "data" / subset
        tool(
            "preprocess_jpeg", *split, "--subset", subset, "--tokenizer", vocabulary,
            "--output-prefix", prefix,
        )  # fmt: skip
    tool(
        "pretrain", *MODEL, "--bf16", "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 30,
        "--lr", 3e-3, "--min-lr", 3e-4, "--log-interval", 5, "--eval-iters", 2,
        "--train-data-path", run / "data/train", "--valid-data-path", run / "data/test",
        "--save", run / "checkpoint", "--load", run / "checkpoint", "--tensorboard-dir", run / "tensorboard",
    )  # fmt: skip
    tool("generate", "--load", run / "checkpoint", "--num-samples", 5, "--output", run / "samples")
    tool(
        "generate", "--load", run / "checkpoint", "--prompt-data-path", run / "data/test", "--num-prompts", 2,
        "--num-samples", 2, "--top-k", 40, "--top-p", 0.9, "--output", run / "completions",
    )  # fmt: skip
    tool("report", "--run", run)
    return run


def test_every_sampled_file_opens(run):
    files = sorted(run.glob("samples/*.jpg")) + sorted(run.glob("completions/*.jpg"))
    assert len(files) == 5 + 4
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert picture.size == (32, 32)


def test_completions_begin_with_their_prompt(run):
    codec = JpegCodec(image_size=32, remove_head=True)
    dataset = CodecDataset.open(run / "data/test")
    for number in range(2):
        tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
        stream = tokenizer.decode(dataset.document(number)[1:-1])
        prompt = codec.prompt(stream, 0.5)
        for file in run.glob(f"completions/document-{number}-*.jpg"):
            assert file.read_bytes()[len(codec.file_head) :].startswith(prompt)


def test_report_holds_what_the_run_wrote(run):
    numbers = json.loads((run / "report.json").read_text())
    text = (run / "report.md").read_text()
    assert numbers["share_that_decodes"] == 1.0
    assert numbers["train_pictures"] + numbers["test_pictures"] == 120, "all but the broken one"
    assert f"{numbers['held_out_nats_per_token']:.3f}" in text
    # Thirty steps are enough to know which bytes are frequent, so the loss is not that of a fresh model.
    assert numbers["train_nats_per_token"] < 5.6
    for picture in ("loss.png", "samples.png"):
        with Image.open(run / picture) as image:
            image.load()
    assert list((run / "tensorboard").glob("events.*"))


def test_broken_picture_is_named_in_the_manifest(run):
    manifests = [CodecDataset.open(run / "data" / name).manifest for name in ("train", "test")]
    skipped = [entry for manifest in manifests for entry in manifest.skipped["first"]]
    assert [Path(entry["name"]).name for entry in skipped] == ["broken.jpg"]


def test_a_finished_run_is_not_trained_again(run):
    said = tool(
        "pretrain", *MODEL, "--bf16", "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 30,
        "--lr", 3e-3, "--min-lr", 3e-4, "--train-data-path", run / "data/train",
        "--save", run / "checkpoint", "--load", run / "checkpoint",
    )  # fmt: skip
    assert "already" in said
