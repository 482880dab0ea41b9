"""The command line of tools/evaluate.py, and what it comes to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.codecs import ImageCodec, JpegCodec
from megatron_codec.codecs.images import Geometry, Method, Resample
from megatron_codec.errors import UserError, collecting, out_of_range, raise_all
from megatron_codec.evaluation.classes import Classes
from megatron_codec.evaluation.completers import Completer, FolderCompleter, Reference, ReferenceCompleter
from megatron_codec.evaluation.diffusers_completer import DiffusersCompleter
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter
from megatron_codec.evaluation.features import Extractor, find_extractor
from megatron_codec.evaluation.originals import check_ratios
from megatron_codec.evaluation.server_completer import RunningServer, ServerCompleter
from megatron_codec.evaluation.upscaling import Upscaler
from megatron_codec.inference import EngineConfig, Sampling
from megatron_codec.preprocessing import Selection
from megatron_codec.preprocessing.flags import picture_codec


@dataclass(frozen=True)
class EvaluateConfig:
    """Compares completed pictures with real ones and writes a report."""

    data: tuple[Path, ...]
    """Real pictures that the model has not seen: what --input of tools/preprocess_jpeg.py takes."""
    output: Path = Path("evaluation")
    """Folder for report.md, report.html, results.json, sheets, and all that is kept for going on."""
    load: tuple[Path, ...] = ()
    """Folders of checkpoints, the --save of tools/pretrain.py each; of any codecs of pictures."""
    server: tuple[str, ...] = ()
    """Addresses of running servers of ours, such as http://localhost:5000; a key is taken from
    MEGATRON_CODEC_API_KEY."""
    diffusers: tuple[Path, ...] = ()
    """Folders of pipelines of diffusers: Stable Diffusion (inpainting) or VQ-Diffusion."""
    diffusion_steps: int = 50
    """Of denoising, of these."""
    pictures: tuple[Path, ...] = ()
    """Folders of pictures that other programs completed: FOLDER/RATIO/*.png or FOLDER/RATIO/SEED/*.png, in
    the order of the originals, as --export writes them."""
    export: bool = False
    """Write the originals, their prompts and which pixels these give into OUTPUT/export, and end."""
    codecs: tuple[Path, ...] = ()
    """Tokenizers of other codecs, the originals through which are compared too; they need no model."""
    references: tuple[Reference, ...] = ("original", "others", "codec", "blurred", "noise")
    """Rows that the others can be read against. "others" are as many real pictures again, if there are."""
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
    """Side of the pictures; by default the largest of the models, and without --load and --server 256."""
    quality: int | None = None
    """JPEG quality without --load and --server; by default 25. A model has its own."""
    upscale: str = "bicubic"
    """How smaller pictures come to that size: nearest, bicubic, lanczos, or the folder of an
    LDMSuperResolutionPipeline of diffusers."""
    half_size: bool = False
    """Put the real pictures at half size into the middle of black ones, and take distances of that part."""
    inception: Path | None = None
    """The Inception weights of FID, inception-2015-12-05.pt, wherever they are. Without them distances are
    taken from EfficientNet-Lite0 and are not called FID."""
    neighbours: int = 3
    """Of precision and recall."""
    classes: str | None = None
    """For distances by class: "folders", or a CSV file with the header name,class. A name is that of the file
    with its folders below --data, or FILE[NUMBER] in a file of arrays."""
    class_counts: Path | None = None
    """CSV file with the header class,count: how often each class occurs in what was trained on."""
    sheet_rows: int = 8
    """Originals on the contact sheets."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    """What computes the completions."""

    @property
    def least_pictures(self) -> int:
        """Without these there are no distances: a covariance, and neighbours of each."""
        return max(2, self.neighbours + 1)


@dataclass(frozen=True)
class Plan:
    """A command line that holds.

    Attributes:
        checkpoints: of --load.
        codecs: whose prompts are given: of the models, or of --image-size and --quality, different ones by
            what they are called.
        image_size: of the pictures that are compared.
        completers: a row of the tables each.
        selection, geometry: which pictures, and how they become square.
        classes: of --classes.
    """

    checkpoints: list[Checkpoint]
    codecs: dict[str, ImageCodec]
    image_size: int
    completers: list[Completer]
    selection: Selection
    geometry: Geometry
    extractor: Extractor
    classes: Classes | None


def check(config: EvaluateConfig, extractor: Extractor | None = None) -> Plan:
    """What a command line comes to.

    Args:
        extractor: instead of what `--inception` says.

    Raises:
        UserError: all its faults at once, before pictures are read or an engine is made.
    """
    faults: list[UserError] = []
    faults += out_of_range(config, 1, "num_samples", "seeds", "neighbours", "sheet_rows", "diffusion_steps")
    least = config.least_pictures
    if 1 <= config.num_samples < least:
        rule = f"must be at least {least}: a covariance and {config.neighbours} neighbours of each need them"
        faults.append(UserError(f"--num-samples {config.num_samples}", rule, "use 200 or more"))
    if config.output.exists() and not config.output.is_dir():
        faults.append(UserError(f"--output {config.output}", "is a file", "name a folder"))
    if not config.ratios:
        faults.append(UserError("--ratios", "must name at least one", "use 0 for pictures from nothing"))
    if (config.load or config.server) and config.quality is not None:
        rule = "has no meaning beside --load and --server, whose models have their own"
        faults.append(UserError("--quality", rule, "leave it out"))
    checkpoints: list[Checkpoint] = []
    for folder, name in zip(config.load, model_names(config.load), strict=True):
        with collecting(faults):
            checkpoints.append(Checkpoint(folder, config.engine, name))
    servers: list[RunningServer] = []
    for url in config.server:
        with collecting(faults):
            servers.append(RunningServer(url))
    models = [*checkpoints, *servers]
    codecs: list[ImageCodec] = [model.codec for model in models]
    with collecting(faults):
        if not config.load and not config.server:
            quality = 25 if config.quality is None else config.quality
            codecs = [JpegCodec(256 if config.image_size is None else config.image_size, quality)]
    own = len(codecs)
    for tokenizer in config.codecs:
        with collecting(faults):
            codecs.append(picture_codec("--codecs", tokenizer))
    image_size = config.image_size or max((codec.image_size for codec in codecs), default=0)
    for number, codec in enumerate(codecs):
        if codec.image_size > image_size:
            rule = f"must not be below the {codec.image_size} pixels of a picture of {codec.name}"
            faults.append(UserError(f"--image-size {image_size}", rule, "leave it out"))
        if number < own:
            faults += check_ratios(codec, config.ratios, config.half_size)
    upscaler = Upscaler()
    with collecting(faults):
        upscaler = Upscaler(config.upscale)
    samplings: list[Sampling] = []
    for top_k in config.top_k:
        for top_p in config.top_p:
            with collecting(faults):
                samplings.append(
                    Sampling(
                        config.temperature,
                        top_k,
                        top_p,
                        seed=config.seed,
                        constrain=config.constrain,
                        heal_prompt=True,
                    )
                )
    completers: list[Completer] = []
    for checkpoint in checkpoints:
        completers += [EngineCompleter(checkpoint, sampling, upscaler) for sampling in samplings]
    for server in servers:
        completers += [ServerCompleter(server, sampling, upscaler) for sampling in samplings]
    for folder in config.diffusers if codecs else ():
        with collecting(faults):
            completers.append(DiffusersCompleter(folder, config.diffusion_steps, codecs[0]))
    for folder in config.pictures:
        with collecting(faults):
            completers.append(FolderCompleter(folder))
    labelled = _labels(codecs, [model.name for model in models] or ["the flags"], config.codecs)
    prompted = {label: codec for label, codec in labelled.items() if codec in codecs[:own]}
    for kind in config.references:
        with collecting(faults):
            of = labelled if kind == "codec" else dict(list(labelled.items())[:1])
            completers += [ReferenceCompleter(kind, codec, label, upscaler) for label, codec in of.items()]
            if kind == "others":
                completers += [
                    ReferenceCompleter(kind, codec, label, upscaler, through=True)
                    for label, codec in labelled.items()
                ]
    names = [completer.name for completer in completers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(UserError(f"'{name}'", "stands twice among the rows", "leave one out or rename one"))
    if not names and not faults:
        faults.append(UserError("nothing to evaluate", "there is no model, no --pictures, and no reference"))
    selection = geometry = None
    with collecting(faults):
        selection = Selection(config.data, config.subset, config.hold_out, max(1, config.num_samples))
    with collecting(faults):
        geometry = Geometry(config.geometry, config.resample, config.crop_seed, config.min_crop)
    with collecting(faults):
        extractor = extractor or find_extractor(config.inception)
    classes = None
    with collecting(faults):
        classes = Classes.read(config.classes, config.class_counts)
    raise_all(faults)
    assert selection and geometry and extractor
    return Plan(checkpoints, prompted, image_size, completers, selection, geometry, extractor, classes)


def model_names(folders: Sequence[Path]) -> list[str]:
    """What models are called: their folders, with as many parents as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)]
        same = [
            number
            for number, name in enumerate(names)
            if names.count(name) > 1 and depths[number] < len(paths[number].parts)
        ]
        if not same:
            return names
        for number in same:
            depths[number] += 1


def _labels(
    codecs: Sequence[ImageCodec], models: Sequence[str], files: Sequence[Path]
) -> dict[str, ImageCodec]:
    """Different codecs by their names; two of the same name are told apart by their models, and those of
    --codecs by their files."""
    different = {json.dumps(codec.to_dict()): number for number, codec in reversed(list(enumerate(codecs)))}
    names = [codecs[number].name for number in different.values()]
    owners = [*models, *(str(file) for file in files)]
    return {
        codec.name if names.count(codec.name) == 1 else f"{codec.name} of {owners[number]}": codec
        for number, codec in enumerate(codecs)
        if number in different.values()
    }
