"""What tools/generate.py does: pictures or clips from nothing or from their first part, as files."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tyro
from PIL import Image
from tqdm import tqdm

from megatron_codec.codecs import AvcCodec, Codec, DecodeError, ImageCodec
from megatron_codec.codecs.given import given_pixels, prompt_picture
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.files import whole_file, write_json
from megatron_codec.inference.admission import find_checkpoint
from megatron_codec.inference.clips import clip_sheet, made_up, prompt_faults, prompt_ratio, video_streams
from megatron_codec.inference.completion import Completion
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.engine import Engine
from megatron_codec.inference.sampling import Sampling
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Samples pictures from a checkpoint and writes them with a contact sheet."""

    load: Path
    """Folder of checkpoints, the --save of tools/pretrain.py; it is enough by itself."""
    output: Path
    """Folder for the pictures, contact_sheet.png and samples.json."""
    num_samples: int = 16
    """Samples, of each prompt if there are prompts."""
    prompt_image: tuple[Path, ...] = ()
    """Pictures to complete."""
    prompt_video: tuple[Path, ...] = ()
    """Videos whose first clip is completed, for a model of clips."""
    prompt_data_path: Path | None = None
    """Dataset prefix whose first documents are completed, instead of pictures."""
    num_prompts: int = 4
    """Documents to take from --prompt-data-path."""
    prompt_ratio: float = 0.5
    """Share of a prompt picture that is given, in patches, from the top; of a clip, in frames."""
    prompt_frames: int | None = None
    """Frames of a clip that are given, instead of --prompt-ratio; the paper gives 10 of 15."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Of these, among the likeliest that together reach this probability."""
    min_p: float = 0.0
    """Among those with at least this share of the likeliest token's probability."""
    max_tokens: int | None = None
    """New tokens a sample at most; by default to the end of the model's context."""
    constrain: bool = True
    """Let only tokens follow that can become a whole, valid file (docs/grammar.md)."""
    seed: int = 0
    """Of the random numbers; the same seed gives the same pictures."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    """What computes them."""


def generate(config: GenerateConfig) -> dict:
    """Samples, writes `OUTPUT/*.jpg`, `contact_sheet.png` and `samples.json`, and returns the last.

    Raises:
        UserError: no checkpoint, a picture that cannot be read, or sampling settings out of range.
    """
    sampling, pictures = _check(config)
    engine = Engine.load(config.load, config.engine)
    if engine.layout.is_main:
        print(f"{engine.memory} a process", flush=True)
    originals = [(name, engine.codec.encode(picture)) for name, picture in pictures.items()]
    originals += video_streams(config.prompt_video, engine.codec)
    originals += _documents(config, engine)
    ratio = prompt_ratio(config.prompt_ratio, config.prompt_frames, engine.codec)
    prompts = [engine.prompt_ids(stream, ratio) for _, stream in originals]
    prompts = prompts or [engine.prompt_ids()]

    started = time.perf_counter()
    with tqdm(total=len(prompts) * sampling.n, unit="sample", disable=not engine.layout.is_main) as bar:
        completions = engine.generate(prompts, sampling, progress=bar.update)
    seconds = time.perf_counter() - started
    if not engine.layout.is_main:
        return {}
    return _write(config, engine.codec, originals, completions, ratio, seconds)


def _check(config: GenerateConfig) -> tuple[Sampling, dict[str, Image.Image]]:
    """Sampling settings, and the pictures to complete by the names of their files.

    Raises:
        UserError: all faults of the command line at once, before a model is built.
    """
    faults: list[UserError] = []
    for name in ("num_samples", "num_prompts"):
        if getattr(config, name) < 1:
            flag = f"--{name.replace('_', '-')} {getattr(config, name)}"
            faults.append(UserError(flag, "must be at least 1", "leave it out for the default"))
    if not 0 <= config.prompt_ratio <= 1:
        faults.append(
            UserError(f"--prompt-ratio {config.prompt_ratio}", "must lie between 0 and 1", "use 0.5 for half")
        )
    if config.output.exists() and not config.output.is_dir():
        faults.append(UserError(f"--output {config.output}", "is a file", "name a folder"))
    with collecting(faults):
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=config.seed,
            n=max(1, config.num_samples),
            max_tokens=config.max_tokens,
            constrain=config.constrain,
            heal_prompt=True,
        )
    pictures: dict[str, Image.Image] = {}
    for path in config.prompt_image:
        with collecting(faults):
            if path.stem in pictures:
                rule = "has the name of another prompt picture, and samples are named after them"
                raise UserError(f"--prompt-image {path}", rule, "rename one of the two")
            pictures[path.stem] = _open(path)
    faults += prompt_faults(config.prompt_video, config.prompt_frames)
    with collecting(faults):
        find_checkpoint(config.load, config.engine)
    raise_all(faults)
    return sampling, pictures


def _documents(config: GenerateConfig, engine: Engine) -> Iterator[tuple[str, bytes]]:
    """Name and stream of each document to complete."""
    if config.prompt_data_path is None:
        return
    dataset = CodecDataset.open(config.prompt_data_path)
    if dataset.manifest.codec != engine.codec.to_dict():
        raise UserError(
            f"--prompt-data-path {config.prompt_data_path}",
            f"was made with {dataset.manifest.codec}, the checkpoint with {engine.codec.to_dict()}",
            "give a dataset made with the settings that the model was trained on",
        )
    tokenizer = Tokenizer.from_dict(dataset.manifest.tokenizer)
    special = (tokenizer.bos, tokenizer.eos)
    for index in range(min(config.num_prompts, dataset.num_documents)):
        ids = [int(i) for i in dataset.document(index) if i not in special]
        yield f"document-{index}", tokenizer.decode(ids)


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"--prompt-image {path}", f"cannot be read: {error}", "give a whole picture"
        ) from error
    return picture


def _write(
    config: GenerateConfig,
    codec: Codec,
    originals: list[tuple[str, bytes]],
    completions: list[Completion],
    ratio: float,
    seconds: float,
) -> dict:
    config.output.mkdir(parents=True, exist_ok=True)
    n = config.num_samples
    samples, pictures = [], []
    for number, completion in enumerate(completions):
        name = f"{originals[number // n][0]}-{number % n:03d}" if originals else f"sample-{number:03d}"
        picture, fault = _decode(completion)
        pictures.append(picture)
        # What no viewer opens is kept as it came, under another name.
        file = config.output / (name + (".broken" if picture is None else codec.file_suffix))
        with whole_file(file) as stream:
            stream.write(completion.stream if picture is None else codec.to_file(completion.stream))
        report = codec.check(completion.stream)
        samples.append(
            made_up(codec, completion.stream)
            | {
                "file": file.name,
                "decodes": picture is not None,
                "valid": report.valid,
                "fault": fault or report.reason,
                "finish_reason": completion.finish_reason,
                "new_tokens": len(completion.token_ids),
                "mean_logprob": sum(completion.logprobs) / len(completion.logprobs),
                "mean_removed": sum(completion.removed) / len(completion.removed),
                "redrawn_tokens": completion.redrawn,
            }
        )
    if isinstance(codec, AvcCodec):
        sheet = clip_sheet(codec, originals, pictures, ratio)
    elif originals:
        of_pictures = cast(ImageCodec, codec)
        given = given_pixels(of_pictures, ratio)
        rows = [
            [
                prompt_picture(of_pictures, codec.prompt(stream, ratio), given),
                *pictures[index * n : (index + 1) * n],
                codec.decode(stream),
            ]
            for index, (_, stream) in enumerate(originals)
        ]
        sheet = contact_sheet(rows, ["prompt", *["sample"] * n, "original"])
    else:
        columns = max(1, round(n**0.5))
        sheet = contact_sheet([pictures[i : i + columns] for i in range(0, n, columns)])
    with whole_file(config.output / "contact_sheet.png") as stream:
        sheet.save(stream, format="PNG")
    new_tokens = sum(sample["new_tokens"] for sample in samples)
    untouched = sum(sample["valid"] and not sample["redrawn_tokens"] for sample in samples) / len(samples)
    summary = {
        "samples": len(samples),
        "share_that_decodes": sum(sample["decodes"] for sample in samples) / len(samples),
        "share_valid": sum(sample["valid"] for sample in samples) / len(samples),
        "share_valid_without_grammar": untouched,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
        "seed": config.seed,
        "files": samples,
    }
    write_json(config.output / "samples.json", summary)
    return summary


def _decode(completion: Completion) -> tuple[Any, str]:
    try:
        return completion.media, ""
    except DecodeError as error:
        return None, str(error)
