"""Originals and prompts as files, for programs that complete pictures without this one.

FOLDER/originals/00000.png ...          the real pictures, at the size that is compared
FOLDER/names.csv                        which number is which picture of --data
FOLDER/CODEC/RATIO/prompts/00000.png    what a prompt of the codec decides; the rest is grey
FOLDER/CODEC/RATIO/given.png            which pixels that is, in white

What a program makes of number 00000 at RATIO is --pictures' FOLDER/RATIO/00000.png.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from megatron_codec.codecs import ImageCodec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.originals import Originals
from megatron_codec.files import whole_folder


def export(
    folder: Path, originals: Originals, codecs: Mapping[str, ImageCodec], ratios: Sequence[float]
) -> None:
    """Writes the folder, whole.

    Args:
        codecs: whose prompts are given, by what they are called.

    Raises:
        UserError: it is there.
    """
    if folder.exists():
        raise UserError(f"{folder}", "is there", "remove it, or give another --output")
    with whole_folder(folder) as whole:
        (whole / "originals").mkdir()
        with open(whole / "names.csv", "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["number", "name"])
            rows.writerows((f"{number:05d}", name) for number, name in enumerate(originals.names))
        for number, pixels in enumerate(originals.pictures):
            Image.fromarray(pixels).save(whole / "originals" / f"{number:05d}.png")
        for label, codec in codecs.items():
            for ratio in filter(None, ratios):
                of_ratio = whole / label.replace("/", "-") / f"{ratio:g}"
                (of_ratio / "prompts").mkdir(parents=True)
                Image.fromarray(originals.given(codec, ratio)).save(of_ratio / "given.png")
                for number in range(len(originals)):
                    originals.prompt(codec, number, ratio).save(of_ratio / "prompts" / f"{number:05d}.png")
