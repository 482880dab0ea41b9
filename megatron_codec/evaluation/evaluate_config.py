"""The command line of tools/evaluate.py, and what it comes to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.codecs import ImageCodec, JpegCodec
from megatron_codec.codecs.images import Geometry, Method, Resample
from megatron_codec.errors import UserError, collecting, out_of_range, raise_all
from megatron_codec.evaluation.completers import Completer, FolderCompleter, Reference, ReferenceCompleter
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter
from megatron_codec.evaluation.features import Extractor, find_extractor
from megatron_codec.evaluation.originals import check_ratios
from megatron_codec.inference import EngineConfig, Sampling
from megatron_codec.preprocessing import Selection


@dataclass(frozen=True)
class EvaluateConfig:
    """Compares completed pictures with real ones and writes a report."""

    data: tuple[Path, ...]
    """Real pictures that the model has not seen: what --input of tools/preprocess_jpeg.py takes."""
    output: Path
    """Folder for report.md, report.html, results.json, sheets, and all that is kept for going on."""
    load: Path | None = None
    """Folder of checkpoints, the --save of tools/pretrain.py."""
    pictures: tuple[Path, ...] = ()
    """Folders of pictures that other programs completed: FOLDER/RATIO/*.png or FOLDER/RATIO/SEED/*.png, in
    the order of the originals."""
    references: tuple[Reference, ...] = ("original", "codec", "blurred", "noise")
    """Rows that the others can be read against."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of a picture that the prompt gives; 0 for pictures from nothing."""
    num_samples: int = 200
    """Real pictures, spread over all of --data, and completions of each seed."""
    seeds: int = 3
    """How many seeds; tables have the mean and the deviation."""
    seed: int = 0
    """The first of them; the others follow."""
    top_k: tuple[int, ...] = (0,)
    """Sample among the k likeliest tokens, 0 for all; several are swept."""
    top_p: tuple[float, ...] = (1.0,)
    """Of these, among the likeliest that together reach this probability; several are swept."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    constrain: bool = True
    """Let only tokens follow that can become a whole, valid file (docs/grammar.md)."""
    subset: Literal["all", "train", "test"] = "all"
    """Which of --data, as in preprocessing: "test" with its --hold-out takes the held-out ones."""
    hold_out: float = 0.0
    """Share held out for the subset "test"; a hash of the name decides."""
    geometry: Method = "crop"
    """How pictures become square, as in preprocessing."""
    resample: Resample = "bicubic"
    """Filter for resizing."""
    crop_seed: int = 0
    """Of random crops, --seed of preprocessing."""
    min_crop: float = 1.0
    """Least side of a random crop, as a share of the picture's shorter side."""
    image_size: int | None = None
    """Side of the pictures without --load; by default 256. A checkpoint has its own."""
    quality: int | None = None
    """JPEG quality without --load; by default 25. A checkpoint has its own."""
    inception: Path | None = None
    """The Inception weights of FID, inception-2015-12-05.pt, wherever they are. Without them distances are
    taken from EfficientNet-Lite0 and are not called FID."""
    neighbours: int = 3
    """Of precision and recall."""
    sheet_rows: int = 8
    """Originals on the contact sheets."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    """What computes the completions."""


@dataclass(frozen=True)
class Plan:
    """A command line that holds.

    Attributes:
        codec: of the checkpoint, or of --image-size and --quality.
        completers: a row of the tables each.
        selection, geometry: which pictures, and how they become square.
    """

    checkpoint: Checkpoint | None
    codec: ImageCodec
    completers: list[Completer]
    selection: Selection
    geometry: Geometry
    extractor: Extractor


def check(config: EvaluateConfig, extractor: Extractor | None = None) -> Plan:
    """What a command line comes to.

    Args:
        extractor: instead of what `--inception` says.

    Raises:
        UserError: all its faults at once, before pictures are read or an engine is made.
    """
    faults: list[UserError] = []
    faults += out_of_range(config, 1, "num_samples", "seeds", "neighbours", "sheet_rows")
    least = max(2, config.neighbours + 1)
    if 1 <= config.num_samples < least:
        rule = f"must be at least {least}: a covariance and {config.neighbours} neighbours of each need them"
        faults.append(UserError(f"--num-samples {config.num_samples}", rule, "use 200 or more"))
    if config.output.exists() and not config.output.is_dir():
        faults.append(UserError(f"--output {config.output}", "is a file", "name a folder"))
    if not config.ratios:
        faults.append(UserError("--ratios", "must name at least one", "use 0 for pictures from nothing"))
    if config.load and (config.image_size, config.quality) != (None, None):
        rule = "have no meaning beside --load, whose checkpoint has its own"
        faults.append(UserError("--image-size and --quality", rule, "leave them out"))
    completers: list[Completer] = []
    checkpoint = None
    with collecting(faults):
        checkpoint = Checkpoint(config.load, config.engine) if config.load else None
    for top_k in config.top_k:
        for top_p in config.top_p:
            with collecting(faults):
                sampling = Sampling(
                    config.temperature,
                    top_k,
                    top_p,
                    seed=config.seed,
                    constrain=config.constrain,
                    heal_prompt=True,
                )
                completers += [EngineCompleter(checkpoint, sampling)] if checkpoint else []
    for folder in config.pictures:
        with collecting(faults):
            completers.append(FolderCompleter(folder))
    with collecting(faults):
        completers += [ReferenceCompleter(kind) for kind in config.references]
    names = [completer.name for completer in completers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(
            UserError(f"'{name}'", "stands twice among the rows", "leave one out or rename a folder")
        )
    if not names and not faults:
        faults.append(
            UserError("nothing to evaluate", "there is neither --load nor --pictures nor a reference")
        )
    selection = geometry = codec = None
    with collecting(faults):
        selection = Selection(config.data, config.subset, config.hold_out, max(1, config.num_samples))
    with collecting(faults):
        geometry = Geometry(config.geometry, config.resample, config.crop_seed, config.min_crop)
    with collecting(faults):
        size, quality = config.image_size, config.quality
        codec = JpegCodec(256 if size is None else size, 25 if quality is None else quality)
        codec = checkpoint.codec if checkpoint else codec
        faults += check_ratios(codec, config.ratios)
    with collecting(faults):
        extractor = extractor or find_extractor(config.inception)
    raise_all(faults)
    assert selection and geometry and codec and extractor
    return Plan(checkpoint, codec, completers, selection, geometry, extractor)
