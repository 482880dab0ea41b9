"""Flags that all tools which read pictures have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry, Method, Resample
from megatron_codec.errors import UserError
from megatron_codec.preprocessing.decoders import MAX_PIXELS, Decoder, PillowDecoder
from megatron_codec.preprocessing.pictures import PictureEncoder


@dataclass(frozen=True, kw_only=True)
class PictureFlags:
    """Which pictures are read, and how they become streams."""

    input: tuple[Path, ...]
    """Folders (searched recursively), pictures, lists (.txt, a path a line), tar files, arrays (idx, .npy,
    .npz)."""
    image_size: int = 256
    """Side of the square pictures in pixels, a multiple of 16."""
    quality: int = 25
    """JPEG quality, 1 to 100."""
    remove_head: bool = False
    """Leave out the constant head of every stream as well; worth it for small pictures."""
    geometry: Method = "crop"
    """crop: resize the largest centred square. random-crop: a square at a random place. pad: shrink to fit,
    never enlarge, centre on black."""
    resample: Resample = "bicubic"
    """Filter for resizing."""
    seed: int = 0
    """Of the random crops; with a picture's name it decides its crop."""
    min_crop: float = 1.0
    """Least side of a random crop, as a share of the picture's shorter side."""
    scaled_decode: bool = True
    """Let libjpeg decode JPEG files at 1/2, 1/4 or 1/8 of their size where that leaves enough pixels."""
    max_pixels: int = MAX_PIXELS
    """Skip pictures with more pixels than this, in width times height."""
    decoder: Literal["pillow", "dali"] = "pillow"
    """pillow, or NVIDIA DALI (pip install 'megatron_codec[dali]') for JPEG files, which decodes them
    whole."""
    dali_device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes."""
    subset: Literal["all", "train", "test"] = "all"
    """Which pictures: all, all but the held-out ones, or the held-out ones."""
    hold_out: float = 0.0
    """Share of the pictures held out for the subset "test"; a hash of the picture's name decides."""

    def encoder(self) -> PictureEncoder:
        """What these flags say of how pictures become streams. Raises UserError for a value that is
        refused."""
        codec = JpegCodec(self.image_size, self.quality, self.remove_head)
        geometry = Geometry(self.geometry, self.resample, self.seed, self.min_crop)
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels {self.max_pixels}", "must be at least 1")
        decoder: Decoder = PillowDecoder(self.max_pixels, self.scaled_decode)
        if self.decoder == "dali":
            from megatron_codec.preprocessing.dali import DaliDecoder

            decoder = DaliDecoder(self.dali_device, self.max_pixels)
        return PictureEncoder(codec, geometry, decoder)
