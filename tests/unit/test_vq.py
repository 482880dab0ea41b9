"""The VQ transformer's codec and the training of its network, beside diffusers' own forward pass."""

import json
import runpy
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from megatron_codec.baselines import vq_vae
from megatron_codec.baselines.vq_vae import RECORD, VqTraining, decides, is_trained, psnr, train_vq
from megatron_codec.codecs import DecodeError, codes, get_codec
from megatron_codec.codecs.vq import WEIGHTS, VqCodec
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops, write_photo_folder
from tests.forks import run_tool

ROOT = Path(__file__).parents[2]
PICTURES = np.stack([np.asarray(crop) for crop in photo_crops(60, 16)])
SHORT = VqTraining(num_codes=32, steps=60, batch_size=8, code_channels=8, lr=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vq") / "network"
    assert train_vq(PICTURES, SHORT, folder, progress=False) > 12
    return folder


@pytest.fixture(scope="module")
def codec(folder) -> VqCodec:
    return VqCodec.of(folder, 16)


def test_pictures_come_back_as_diffusers_makes_them(codec, folder, tmp_path):
    network = VQModel.from_pretrained(folder).eval()
    for pixels in PICTURES[:8]:
        stream = codec.encode(pixels)
        assert len(stream) == 2 * 4 * 4 and codec.check(stream).valid
        with torch.inference_mode():
            made = network(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1).sample[0]
        expected = ((made.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255)
        assert np.abs(np.asarray(codec.decode(stream)).astype(float) - expected).max() <= 1
    (tmp_path / "a.png").write_bytes(codec.to_file(stream))
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (16, 16, 3)
    assert get_codec(**codec.to_dict()) == codec


def test_a_network_with_normalization_by_codes_comes_back_too(tmp_path):
    """MoVQ's, where the decoder sees the codes in every layer."""
    torch.manual_seed(0)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        num_vq_embeddings=300,
        norm_type="spatial",
    ).eval()
    network.save_pretrained(tmp_path / "movq")
    codec = VqCodec.of(tmp_path / "movq", 16)
    assert (codec.side, codec.num_codes) == (8, 300)
    with torch.inference_mode():
        made = network(torch.from_numpy(PICTURES[0].copy()).permute(2, 0, 1)[None] / 127.5 - 1).sample[0]
    expected = ((made.permute(1, 2, 0).numpy() + 1) * 127.5).round().clip(0, 255)
    found = np.asarray(codec.decode(codec.encode(PICTURES[0]))).astype(float)
    assert np.abs(found - expected).max() <= 1


def test_a_prompt_is_rows_of_codes_and_what_is_lacking_is_grey(codec):
    stream = codec.encode(PICTURES[0])
    prompt = codec.prompt(stream, 0.6)
    assert prompt == stream[: 2 * 4 * 2]
    shown = np.asarray(codec.decode(prompt))
    assert (shown[8:] == 128).all() and not (shown[:8] == 128).all()
    # The network sees the whole grid, and lacking codes are those that are there once more.
    np.testing.assert_array_equal(shown[:8], np.asarray(codec.decode(prompt * 2))[:8])
    assert codec.check(prompt).reason == "ends after 8 of 16 codes"
    with pytest.raises(DecodeError):
        codec.decode(b"abcd")
    tokenizer = Tokenizer(codec.merges, codec.to_dict())
    assert tokenizer.encode(stream).tolist() == (256 + codes.from_stream(stream, 32)).tolist()


def test_training_learns(folder):
    torch.manual_seed(0)
    fresh = vq_vae._network(SHORT, 16).eval()
    assert psnr(VQModel.from_pretrained(folder).eval(), PICTURES) > psnr(fresh, PICTURES) + 2


def test_entries_begin_anew_where_pictures_are():
    torch.manual_seed(0)
    network = vq_vae._network(SHORT, 16)
    before = network.quantize.embedding.weight.detach().clone()
    latents = torch.randn(3, 8, 4, 4) + 5
    which = torch.arange(32) % 3 == 0
    vq_vae._revive(network, latents, which, np.random.default_rng(0))
    after = network.quantize.embedding.weight.detach()
    assert (after[~which] == before[~which]).all()
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (torch.cdist(after[which], rows).min(dim=1).values < 0.5).all()
    assert len(after[which].unique(dim=0)) == which.sum()


def test_a_run_that_was_stopped_takes_the_same_steps(folder, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def saved_and_stopped(self, *arguments):
        save(self, *arguments)
        raise Stopped

    save = vq_vae._State.save
    monkeypatch.setattr(vq_vae, "SAVE_EVERY", 50)
    monkeypatch.setattr(vq_vae._State, "save", saved_and_stopped)
    with pytest.raises(Stopped):
        train_vq(PICTURES, SHORT, tmp_path / "network", progress=False)
    assert not (tmp_path / "network").exists()
    with pytest.raises(UserError, match="was stopped and had other settings"):
        train_vq(PICTURES, replace(SHORT, lr=1e-4), tmp_path / "network", progress=False)
    with pytest.raises(UserError, match=r"stopped and had other settings: --input's pixels, SHA-256"):
        train_vq(PICTURES[::-1], SHORT, tmp_path / "network", progress=False)
    train_vq(PICTURES, SHORT, tmp_path / "network", progress=False)
    for name, weight in VQModel.from_pretrained(folder).state_dict().items():
        again = VQModel.from_pretrained(tmp_path / "network").state_dict()[name]
        assert torch.allclose(weight, again, atol=1e-4), name
    assert not (tmp_path / "network.partial").exists()


def test_a_stopped_run_that_did_not_say_its_pixels_goes_on(tmp_path):
    network = vq_vae._network(SHORT, 16)
    optimizer = torch.optim.AdamW(network.parameters())
    before = asdict(SHORT) | {"pictures": len(PICTURES)}
    vq_vae._State(tmp_path, before).save(network, optimizer, 100)
    state = vq_vae._State(tmp_path, decides(SHORT, PICTURES))
    assert state.load(network, optimizer) == 100
    with pytest.raises(UserError, match=r"--input's number of pictures 60 \(now 59\)"):
        vq_vae._State(tmp_path, decides(SHORT, PICTURES[1:])).load(network, optimizer)


def test_a_network_says_what_it_was_trained_on(folder, tmp_path):
    wanted = decides(SHORT, PICTURES)
    assert json.loads((folder / RECORD).read_text()) == wanted and is_trained(folder, wanted)
    with pytest.raises(UserError, match=r"with --num-codes 32 \(now 64\), --steps 60 \(now 9\); give"):
        is_trained(folder, asdict(replace(SHORT, num_codes=64, steps=9)))
    with pytest.raises(UserError, match=r"trained with --input's pixels, SHA-256 \w{12} \(now \w{12}\)"):
        is_trained(folder, decides(SHORT, 255 - PICTURES))
    # Networks of before are the same to the codec, and are not compared with anything.
    shutil.copytree(folder, tmp_path / "before")
    (tmp_path / "before" / RECORD).unlink()
    assert is_trained(tmp_path / "before", asdict(replace(SHORT, steps=9)))
    assert VqCodec.of(tmp_path / "before", 16).sha256 == VqCodec.of(folder, 16).sha256
    (tmp_path / "before" / RECORD).write_text("{")
    with pytest.raises(UserError, match=r"training\.json: cannot be read"):
        is_trained(tmp_path / "before", wanted)
    (tmp_path / "empty").mkdir()
    assert not is_trained(tmp_path / "empty", wanted) and not is_trained(tmp_path / "absent", wanted)
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match="exists already and holds no network; remove it"):
        is_trained(tmp_path / "empty", wanted)


def test_the_same_command_trains_once_and_others_are_refused(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "train_vq.py"))["main"]
    np.save(tmp_path / "a.npy", PICTURES)
    np.save(tmp_path / "b.npy", PICTURES[:, ::-1])

    def told(pictures="a.npy", size=16, output=tmp_path / "vq", **flags):
        arguments = ["train_vq.py", "--input", tmp_path / pictures, "--image-size", size, "--output", output]
        for name, value in ({"num-codes": 32, "steps": 2, "batch-size": 2} | flags).items():
            arguments += [f"--{name}", value]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        main()
        return capsys.readouterr().out

    (tmp_path / "vq").mkdir()  # an empty folder is as good as none
    assert "dB (PSNR)" in told()
    (tmp_path / "vq.json").unlink()
    assert "with these settings and pictures, and not trained again" in told()
    assert Tokenizer.load(tmp_path / "vq.json").codec == VqCodec.of(tmp_path / "vq", 16).to_dict()
    for other, message in (
        ({"num-codes": 64}, r"--num-codes 32 \(now 64\); give another --output, or remove the folder"),
        ({"steps": 3}, r"--steps 2 \(now 3\)"),
        ({"size": 32}, r"--image-size 16 \(now 32\)"),
        ({"pictures": "b.npy"}, r"--input's pixels, SHA-256 "),
        ({"num-samples": 50}, r"--input's number of pictures 60 \(now 50\)"),
    ):
        with pytest.raises(UserError, match=rf"--output .*vq: holds a network .*trained with {message}"):
            told(**other)
    (tmp_path / "vq" / RECORD).unlink()
    assert "its settings and pictures are not known" in told(steps=3)


def test_the_documents_snippet_makes_a_tokenizer_of_a_folder(folder, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "baselines.md").read_text()
    start = text.index("    from megatron_codec.codecs.vq")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "folder")
    exec(textwrap.dedent(text[start : text.index("The weights are", start)]), {})
    assert Tokenizer.load(Path("vq.json")).codec == VqCodec.of("folder", 256).to_dict()


def test_what_does_not_fit_is_refused(codec, folder, tmp_path):
    with pytest.raises(UserError, match="image size 18: must be a multiple of 4"):
        VqCodec.of(folder, 18)
    with pytest.raises(UserError, match="holds no VQModel"):
        VqCodec.of(tmp_path, 16)
    with pytest.raises(UserError, match="must be a multiple of the side"):
        VqCodec(10, 4)
    shutil.copytree(folder, tmp_path / "copy")
    moved = replace(codec, folder=str(tmp_path / "copy"))
    assert moved.encode(PICTURES[0]) == codec.encode(PICTURES[0])
    content = bytearray((tmp_path / "copy" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="is another file than the codec was made with"):
        replace(moved).encode(PICTURES[0])
    with pytest.raises(UserError, match="copy it there"):
        replace(codec, folder=str(tmp_path / "nowhere")).encode(PICTURES[0])
    for change in ({"downsample": 3}, {"channels": 40}, {"num_codes": 1}, {"lr": 0.0}, {"steps": 0}):
        with pytest.raises(UserError, match="must"):
            replace(SHORT, **change)
    with pytest.raises(UserError, match="1 pictures: must be at least 2"):
        train_vq(PICTURES[:1], SHORT, tmp_path / "n")
    with pytest.raises(UserError, match="exists already"):
        train_vq(PICTURES, SHORT, folder)


def test_from_pictures_to_a_dataset(tmp_path, tmp_path_factory):
    photos = write_photo_folder(tmp_path_factory.mktemp("photos"))

    def tool(name, *arguments):
        done = run_tool(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    arguments = ["--input", photos, "--image-size", 16, "--num-codes", 32, "--output", tmp_path / "vq"]
    told = tool("train_vq", *arguments, "--steps", 20, "--batch-size", 4)
    assert "dB (PSNR)" in told and "4x4 codes of 32 a picture" in told
    told = tool(
        "preprocess_images", "--input", photos, "--tokenizer", tmp_path / "vq.json", "--workers", 1,
        "--output-prefix", tmp_path / "p",
    )  # fmt: skip
    assert "18.0 a document" in told
