"""Trains the network of a VQ transformer, and writes the tokenizer in which each of its codes is one token.

    python tools/train_vq.py --input photos --image-size 32 --num-codes 512 --output vq
    python tools/preprocess_images.py --input photos --tokenizer vq.json --output-prefix data/train

Stopped at any moment, the same command goes on where it was; when it has ended, it trains nothing. Other
settings or pictures for a network that is there are refused.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import tyro

from megatron_codec.baselines.vq_vae import RECORD, VqTraining, decides, is_trained, train_vq
from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.vq import VqCodec
from megatron_codec.errors import UserError, run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.preprocessing.flags import PictureInputFlags
from megatron_codec.preprocessing.palette import RawPixels
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments(PictureInputFlags):
    """Trains a VQ-VAE on pictures, and writes its folder and, beside it, the tokenizer FOLDER.json."""

    output: Path
    """The folder to write; its tokenizer is FOLDER.json, and names the folder as it is given here."""
    image_size: int = 32
    """Side of the square pictures in pixels, a multiple of the downsampling."""
    num_samples: int = 20000
    """Train on so many pictures at most, evenly spread over the input; they are held in memory."""
    num_codes: int = VqTraining.num_codes
    """Entries of the codebook."""
    downsample: int = VqTraining.downsample
    """By how much a side shrinks, a power of two: 32 pixels by 4 give 8x8 codes."""
    channels: int = VqTraining.channels
    """Of the first convolutions, a multiple of 32."""
    code_channels: int = VqTraining.code_channels
    """Numbers of a codebook entry."""
    steps: int = VqTraining.steps
    """Steps of training."""
    batch_size: int = VqTraining.batch_size
    """Pictures of a step."""
    lr: float = VqTraining.lr
    """Highest learning rate."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    names = ("num_codes", "downsample", "channels", "code_channels", "steps", "batch_size", "lr", "seed")
    training = VqTraining(**{name: getattr(arguments, name) for name in names})
    size = arguments.image_size
    if size < 1 or size % training.downsample:
        raise UserError(f"--image-size {size}", f"must be a multiple of --downsample {training.downsample}")
    output = arguments.output
    if is_trained(output, asdict(training) | {"image_size": size}) and not (output / RECORD).exists():
        print(
            f"{output} is there already and not trained again; it has no {RECORD}, so its settings and "
            f"pictures are not known and not compared with those given"
        )
    else:
        streams = iterate_streams(
            arguments.input,
            arguments.encoder_of(cast(ImageCodec, RawPixels(size))),
            subset=arguments.subset,
            hold_out=arguments.hold_out,
            limit=arguments.num_samples,
        )
        pictures = np.stack([np.frombuffer(stream, np.uint8).reshape(size, size, 3) for stream in streams])
        if is_trained(output, decides(training, pictures)):
            print(f"{output} is there already, with these settings and pictures, and not trained again")
        else:
            try:
                told = train_vq(pictures, training, output)
            except KeyboardInterrupt:
                print(f"stopped; the same command goes on with {output}", file=sys.stderr)
                raise
            print(f"{told:.2f} dB (PSNR) on held-out pictures")
    codec = VqCodec.of(output, size)
    path = output.with_name(f"{output.name}.json")
    Tokenizer(codec.merges, codec.to_dict()).save(path)
    print(f"{codec.side}x{codec.side} codes of {codec.num_codes} a picture; the tokenizer is {path}")


if __name__ == "__main__":
    run_tool(main)
