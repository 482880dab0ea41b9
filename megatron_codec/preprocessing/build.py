"""From pictures to a dataset: source -> codec -> tokenizer -> shards, and one manifest."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import PIL
import PIL.features
from tqdm import tqdm

import megatron_codec
from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.data import Manifest, Shard
from megatron_codec.data.indexed import indexed_writer
from megatron_codec.errors import UserError
from megatron_codec.preprocessing.sources import Source, Subset, open_pictures
from megatron_codec.preprocessing.streams import Skipped, encode_pictures, nothing_readable
from megatron_codec.preprocessing.workers import run_in_processes
from megatron_codec.tokenizer import Tokenizer

BATCH = 64  # pictures tokenized at once and between two signs of progress


@dataclass(frozen=True)
class ShardJob:
    """What one worker does: its pictures become one shard."""

    prefix: Path
    pictures: Source
    codec: ImageCodec
    geometry: Geometry
    tokenizer: Tokenizer


def build_dataset(
    prefix: str | os.PathLike,
    inputs: Iterable[str | os.PathLike],
    codec: ImageCodec,
    tokenizer: Tokenizer,
    *,
    geometry: Geometry = "crop",
    subset: Subset = "all",
    hold_out: float = 0.0,
    limit: int | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
    progress: bool = True,
) -> Manifest:
    """Writes the dataset PREFIX with one document `BOS ids EOS` for each picture, and returns its manifest.

    Worker i of n takes the i-th of n contiguous parts of the pictures, so the documents and their order do
    not depend on the number of workers; only their distribution over shards does. Pictures that cannot be
    read are named in the manifest with the reason. PREFIX.json is written last: without it there is no
    dataset.

    Args:
        inputs, subset, hold_out, limit: which pictures, see `open_pictures`.
        geometry: how they become square, see `images.canonical`.
        workers: processes; one writes PREFIX.bin, n write PREFIX-00000-of-0000n.bin and so on.
        command: the command line, for the manifest.

    Raises UserError for a tokenizer of another codec, an output that exists or cannot be written, and
    inputs without a readable picture.
    """
    prefix = Path(prefix)
    inputs = [Path(path) for path in inputs]
    tokenizer.require_codec(codec.to_dict())
    if workers < 1:
        raise UserError(f"--workers {workers}", "must be at least 1")
    _check_output(prefix)
    pictures = open_pictures(inputs, subset, hold_out, limit)

    workers = min(workers, len(pictures))
    bounds = [i * len(pictures) // workers for i in range(workers + 1)]
    jobs = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        shard_prefix = prefix if workers == 1 else prefix.with_name(f"{prefix.name}-{i:05d}-of-{workers:05d}")
        jobs.append(ShardJob(shard_prefix, pictures.take(np.arange(start, stop)), codec, geometry, tokenizer))

    with tqdm(total=len(pictures), desc=str(prefix), unit=" pictures", disable=not progress) as bar:
        lost = 0

        def listen(done: tuple[int, int]) -> None:
            nonlocal lost
            lost += done[1]
            bar.set_postfix(skipped=lost, refresh=False)
            bar.update(done[0])

        parts = (
            [write_shard(jobs[0], listen)] if workers == 1 else run_in_processes(write_shard, jobs, listen)
        )

    skipped = [entry for _, entries in parts for entry in entries]
    for job, (shard, _) in zip(jobs, parts, strict=True):
        if shard.documents == 0:  # stock readers cannot map an empty file
            Path(f"{job.prefix}.bin").unlink()
            Path(f"{job.prefix}.idx").unlink()
    if len(skipped) == len(pictures):
        raise nothing_readable(skipped)
    manifest = Manifest(
        codec=codec.to_dict(),
        tokenizer=tokenizer.to_dict(),
        shards=[shard for shard, _ in parts if shard.documents],
        skipped=[asdict(entry) for entry in skipped],
        source={
            "inputs": [str(path) for path in inputs],
            "geometry": geometry,
            "subset": subset,
            "hold_out": hold_out,
            "limit": limit,
        },
        versions=library_versions(),
        command=list(command),
    )
    manifest.save(f"{prefix}.json")
    return manifest


def write_shard(job: ShardJob, tell: Callable[[tuple[int, int]], None]) -> tuple[Shard, list[Skipped]]:
    """Writes the shard of one worker; tells how many pictures were done and how many of them skipped."""
    skipped: list[Skipped] = []
    results = encode_pictures(job.pictures, job.codec, job.geometry)
    with indexed_writer(job.prefix) as writer:
        while batch := list(islice(results, BATCH)):
            streams = [result for result in batch if isinstance(result, bytes)]
            skipped += [result for result in batch if isinstance(result, Skipped)]
            ids, offsets = job.tokenizer.encode_batch(streams, add_special_tokens=True)
            for start, stop in pairwise(offsets.tolist()):
                writer.add(ids[start:stop])
            tell((len(batch), len(batch) - len(streams)))
    return writer.shard(), skipped


def library_versions() -> dict[str, str]:
    """Versions of everything that has a part in the bytes of a dataset."""
    return {
        "megatron_codec": megatron_codec.__version__,
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": PIL.features.version_feature("libjpeg_turbo") or "not used",
        "numpy": np.__version__,
    }


def _check_output(prefix: Path) -> None:
    """Raises UserError, before any work, where the dataset cannot be written."""
    if prefix.is_dir():
        raise UserError(f"--output-prefix {prefix}", "is a folder", f"add a name, such as {prefix / 'train'}")
    if Path(f"{prefix}.json").exists():
        raise UserError(f"{prefix}.json", "exists already", "remove that dataset or choose another prefix")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}", f"its folder cannot be made: {error}") from error
    if not os.access(prefix.parent, os.W_OK):
        raise UserError(f"--output-prefix {prefix}", "its folder cannot be written to")
