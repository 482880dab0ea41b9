"""Training of the network of a VQ transformer: a VQ-VAE (van den Oord et al., "Neural Discrete Representation
Learning", 2017), `VQModel` of the library diffusers.

Its quantizer leaves two things to whoever trains it: entries begin at what the first pictures give, not near
zero; and entries that no picture chose for a while begin anew at what some picture gives (as in Dhariwal et
al., "Jukebox", 2020, section 3.1).
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from megatron_codec.errors import UserError, raise_all
from megatron_codec.files import whole_file, whole_folder, write_json

REVIVE_EVERY = 100  # steps after which entries that were not chosen since begin anew
SAVE_EVERY = 500
HELD_OUT = 0.05  # of the pictures, at most a thousand, for the error that is told
RECORD = "training.json"  # beside the network: what decided it


@dataclass(frozen=True)
class VqTraining:
    """How a network is shaped and trained.

    Args:
        num_codes: entries of the codebook.
        downsample: by how much a side shrinks, a power of two.
        channels: of the first convolutions, a multiple of 32; twice as many where the grid is smallest.
        code_channels: numbers of an entry.
        steps, batch_size, lr, seed: of AdamW, with a tenth of the rate in the end (cosine).
    """

    num_codes: int = 512
    downsample: int = 4
    channels: int = 32
    code_channels: int = 16
    steps: int = 5000
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if self.downsample < 1 or self.downsample & (self.downsample - 1):
            faults.append(UserError(f"--downsample {self.downsample}", "must be a power of two"))
        if self.channels < 32 or self.channels % 32:
            faults.append(UserError(f"--channels {self.channels}", "must be a multiple of 32"))
        for name in ("num_codes", "code_channels", "steps", "batch_size"):
            least = 2 if name == "num_codes" else 1
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                faults.append(UserError(f"--{flag} {getattr(self, name)}", f"must be at least {least}"))
        if not 0 < self.lr < 1:
            faults.append(UserError(f"--lr {self.lr}", "must lie between 0 and 1"))
        raise_all(faults)


def decides(training: VqTraining, pictures: np.ndarray) -> dict[str, Any]:
    """What a network follows from, JSON values: the settings and the pixels of pictures, uint8
    [n, size, size, 3]. It lies beside the network as `training.json`."""
    pixels = hashlib.sha256(np.ascontiguousarray(pictures).data).hexdigest()
    found = {"image_size": pictures.shape[1], "pictures": len(pictures), "pixels_sha256": pixels}
    return asdict(training) | found


def is_trained(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds a network already; False where there is none or an empty one.

    Args:
        wanted: of `decides`, as much as is known. A network without `training.json` is not compared with it.

    Raises:
        UserError: the network was trained otherwise, or the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "config.json").is_file():
        rule = "exists already and holds no network"
        raise UserError(f"--output {folder}", rule, "remove it or choose another")
    record = folder / RECORD
    if record.exists():
        try:
            others = _others(json.loads(record.read_text(encoding="utf-8")), wanted)
        except (OSError, ValueError, TypeError) as error:
            remedy = f"give another --output, or remove {folder} to train anew"
            raise UserError(f"{record}", f"cannot be read: {error}", remedy) from error
        if others:
            raise UserError(
                f"--output {folder}",
                f"holds a network that was trained with {others}",
                "give another --output, or remove the folder to train anew",
            )
    return True


def train_vq(pictures: np.ndarray, training: VqTraining, folder: Path, progress: bool = True) -> float:
    """Trains a network and writes it to `folder`, whole, with `training.json` beside it; returns the PSNR in
    dB on held-out pictures.

    Stopped at any moment, the same call goes on from the last 500 steps; what was not finished lies in
    FOLDER.partial until then.

    Args:
        pictures: uint8 [n, size, size, 3].

    Raises UserError for too few pictures, a size that the network cannot halve so often, a folder that has
    something in it, and a run that was stopped and had other settings or pictures.
    """
    held_out = max(1, min(1000, int(len(pictures) * HELD_OUT)))
    size = pictures.shape[1] if pictures.ndim == 4 else 0
    if len(pictures) - held_out < 1:
        raise UserError(f"{len(pictures)} pictures", "must be at least 2, one of them held out")
    if size % training.downsample:
        rule = f"must be a multiple of --downsample {training.downsample}"
        raise UserError(f"--image-size {size}", rule)
    decided = decides(training, pictures)
    if is_trained(folder, decided):
        raise UserError(f"{folder}", "exists already", "remove it or choose another")
    torch.manual_seed(training.seed)
    model = _network(training, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state = _State(folder.with_name(f"{folder.name}.partial"), decided)
    step = state.load(model, optimizer)
    test, train = pictures[:held_out], pictures[held_out:]
    used = torch.zeros(training.num_codes, dtype=torch.bool)
    # Steps follow from their number alone, so that a run that was stopped takes the same ones.
    with tqdm(total=training.steps, initial=step, desc="VQ-VAE", unit="step", disable=not progress) as bar:
        while step < training.steps:
            rng = np.random.default_rng((training.seed, step))
            batch = _values(train[rng.integers(0, len(train), training.batch_size)])
            latents = model.encode(batch).latents
            if step == 0:
                _revive(model, latents, torch.ones_like(used), rng)
            entries, commitment, (_, _, indices) = model.quantize(latents)
            used[indices.reshape(-1)] = True
            made = model.decode(entries, force_not_quantize=True).sample
            error = functional.mse_loss(made, batch)
            loss = error + commitment
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = training.lr * (0.55 + 0.45 * np.cos(np.pi * step / training.steps))
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            optimizer.step()
            step += 1
            if step % REVIVE_EVERY == 0:
                bar.set_postfix(error=f"{error.item():.4f}", codes=int(used.sum()))
                if step < training.steps * 0.8:  # the last fifth settles
                    _revive(model, latents, ~used, rng)
                used[:] = False
            bar.update()
            if step % SAVE_EVERY == 0:
                state.save(model, optimizer, step)
    with whole_folder(folder) as place:
        model.save_pretrained(place)
        write_json(place / RECORD, decided)
    state.remove()
    return psnr(model.eval(), test)


@torch.inference_mode()
def psnr(model: Any, pictures: np.ndarray) -> float:
    """Peak signal to noise in dB of pictures, uint8 [n, size, size, 3], that went through a network."""
    total = 0.0
    for start in range(0, len(pictures), 100):
        batch = _values(pictures[start : start + 100])
        made = ((model(batch).sample + 1) * 127.5).round().clamp(0, 255)
        total += ((made - (batch + 1) * 127.5) ** 2).mean().item() * len(batch)
    return float(10 * np.log10(255**2 / max(total / len(pictures), 1e-10)))


def _network(training: VqTraining, size: int) -> Any:
    try:
        from diffusers.models.autoencoders.vq_model import VQModel
    except ImportError as error:
        remedy = "pip install 'megatron_codec[eval]'"
        raise UserError("diffusers", "is needed to train a VQ-VAE and not installed", remedy) from error
    levels = training.downsample.bit_length()
    widths = [training.channels] * (levels - 1) + [2 * training.channels]
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        latent_channels=training.code_channels,
        sample_size=size,
        num_vq_embeddings=training.num_codes,
        vq_embed_dim=training.code_channels,
    )


def _values(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def _revive(model: Any, latents: Tensor, which: Tensor, rng: np.random.Generator) -> None:
    rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    chosen = torch.from_numpy(rng.integers(0, len(rows), int(which.sum())))
    entries = rows[chosen]
    # Two that begin at the same place would have the same neighbours for ever.
    noise = torch.from_numpy(rng.standard_normal(tuple(entries.shape), np.float32))
    model.quantize.embedding.weight[which] = entries + 0.01 * rows.std() * noise


def _others(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which of what is wanted was otherwise, by flags; what `made` does not say is not compared."""
    names = {"pictures": "--input's number of pictures", "pixels_sha256": "--input's pixels, SHA-256"}
    return ", ".join(
        f"{names.get(name, '--' + name.replace('_', '-'))} {str(made[name])[:12]} (now {str(value)[:12]})"
        for name, value in wanted.items()
        if name in made and made[name] != value
    )


class _State:
    """What a run that was stopped goes on from.

    Args:
        decided: see `decides`.
    """

    def __init__(self, folder: Path, decided: dict[str, Any]):
        self.folder, self.decided = folder, decided

    def load(self, model: Any, optimizer: torch.optim.Optimizer) -> int:
        """Puts back what was saved; the number of steps it had."""
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        if others := _others(json.loads(saved["described"]), self.decided):
            rule = f"holds a run that was stopped and had other settings: {others}"
            raise UserError(f"{self.folder}", rule, "give the same ones, or remove it to begin again")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"]

    def save(self, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Between intervals of `REVIVE_EVERY`, so that which entries were used need not be kept."""
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        with whole_file(self.folder / "state.pt") as stream:
            torch.save(content | {"described": json.dumps(self.decided)}, stream)

    def remove(self) -> None:
        """Takes the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not os.path.exists(self.folder / "state.pt")
