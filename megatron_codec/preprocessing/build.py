"""From pictures or videos to a dataset: source -> encoder -> tokenizer -> shards, and one manifest."""

import errno
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

import megatron_codec
from megatron_codec.data import Manifest
from megatron_codec.errors import UserError
from megatron_codec.preprocessing.encoder import Encoder
from megatron_codec.preprocessing.journal import ShardFiles, ShardJournal
from megatron_codec.preprocessing.plan import Plan, check_output, finished_before, input_lists
from megatron_codec.preprocessing.progress import Progress
from megatron_codec.preprocessing.skipping import SkipLimit, Skipped
from megatron_codec.preprocessing.sources import Item, Selection, Source, Subset, open_inputs
from megatron_codec.preprocessing.workers import run_in_processes
from megatron_codec.tokenizer import Tokenizer

# Items tokenized at once and between two lines of the journal: so many, or as many as give so many bytes or
# take so many seconds.
BATCH, BATCH_BYTES, BATCH_SECONDS = 64, 1 << 20, 10.0

Result = tuple[Item, list[bytes] | Skipped]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ShardJob:
    """What one worker does: its part of the items becomes one shard."""

    files: ShardFiles
    source: Source
    encoder: Encoder
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Step:
    """What a worker tells: so many more positions and items are done, `skipped` of them without a document.

    Args:
        resumed: by an earlier run.
    """

    positions: int
    items: int
    skipped: int
    resumed: bool = False


def build_dataset(
    prefix: str | os.PathLike,
    inputs: Iterable[str | os.PathLike],
    encoder: Encoder,
    tokenizer: Tokenizer,
    *,
    subset: Subset = "all",
    hold_out: float = 0.0,
    limit: int | None = None,
    workers: int = 1,
    task: tuple[int, int] = (0, 1),
    max_skipped: SkipLimit | None = None,
    command: Sequence[str] = (),
    progress: bool = True,
) -> Manifest | None:
    """Writes the dataset PREFIX with one document `BOS ids EOS` for each stream, and returns its manifest.

    The items are cut into as many contiguous parts as there are workers in all tasks, and each becomes a
    shard, so the documents and their order do not depend on these numbers; only their distribution over
    shards does. Items that cannot be read are counted in the manifest and named with the reason.
    PREFIX.json is written last: without it there is no dataset.

    However a run is stopped, the same call goes on where it was, and ends with the files of a run that was
    not.

    Args:
        inputs, subset, hold_out, limit: which items, see `Selection`.
        workers: processes; one writes PREFIX.bin, n write PREFIX-00000-of-0000n.bin and so on.
        task: (i, n) does the i-th of n parts of the work alone, for n machines with one file system. The task
            that ends last writes the manifest; the others return None.
        max_skipped: stops the run when more items give no document.
        command: the command line, for the manifest.

    Raises UserError for a tokenizer of another codec, an output that exists, cannot be written or is being
    written, inputs without a readable item, too many skipped ones, and a run that was stopped and had other
    settings.
    """
    prefix = Path(prefix)
    selection = Selection(tuple(map(Path, inputs)), subset, hold_out, limit)
    tokenizer.require_codec(encoder.codec.to_dict())
    number, tasks = task
    if workers < 1:
        raise UserError(f"--workers {workers}", "must be at least 1")
    if not 0 <= number < tasks:
        raise UserError(f"--shard {number}/{tasks}", "must be I/N with I from 0 to N - 1")
    codec, versions = encoder.codec.to_dict(), library_versions() | encoder.versions()
    settings = selection.to_dict() | encoder.settings()
    if manifest := finished_before(prefix, codec, tokenizer, settings, versions):
        return manifest
    check_output(prefix)

    with input_lists(prefix, f"{number}-of-{tasks}") as lists:
        source = open_inputs(selection, encoder.suffixes, lists, encoder.things)
        if tasks == 1:
            workers = min(workers, source.size)
        plan = Plan(
            prefix,
            workers * tasks,
            codec,
            tokenizer,
            settings,
            versions,
            source.digest,
            encoder.things,
        )
        plan.start()
        try:
            _write_shards(
                plan, range(number * workers, (number + 1) * workers), source, encoder, progress, max_skipped
            )
        except KeyboardInterrupt:
            print(f"stopped; {plan.folder} is where the same command goes on", file=sys.stderr)
            raise
        return plan.join(command, max_skipped)


def _write_shards(
    plan: Plan,
    shards: Iterable[int],
    source: Source,
    encoder: Encoder,
    progress: bool,
    max_skipped: SkipLimit | None,
) -> None:
    bounds = [i * source.size // plan.shards for i in range(plan.shards + 1)]
    parts = list(pairwise(bounds))
    size = sum(parts[i][1] - parts[i][0] for i in shards)
    jobs = []
    with Progress(str(plan.prefix), size, plan.things, disable=not progress) as bar:
        for i in shards:
            finished = plan.files(i).finished()
            if finished:
                bar.resume(parts[i][1] - parts[i][0], finished.items, len(finished.skipped))
            else:
                jobs.append(ShardJob(plan.files(i), source.part(*parts[i]), encoder, plan.tokenizer))

        def listen(step: Step) -> None:
            (bar.resume if step.resumed else bar.advance)(step.positions, step.items, step.skipped)
            if max_skipped:
                max_skipped.check(bar.items, bar.skipped, plan.things)

        if len(jobs) == 1:
            write_shard(jobs[0], listen)
        else:
            run_in_processes(write_shard, jobs, listen)


def write_shard(job: ShardJob, tell: Callable[[Step], None]) -> None:
    """Writes the shard of one worker, or goes on with it, and tells what is done."""
    try:
        with ShardJournal(job.files) as journal:
            tell(Step(journal.position, journal.items, len(journal.skipped), resumed=True))
            results = job.encoder.encode(islice(job.source, journal.items, None))
            while batch := _batch(results):
                skipped = [result for _, result in batch if isinstance(result, Skipped)]
                streams = [stream for _, result in batch if isinstance(result, list) for stream in result]
                ids, offsets = job.tokenizer.encode_batch(streams, add_special_tokens=True)
                documents = [ids[start:stop] for start, stop in pairwise(offsets.tolist())]
                reached = batch[-1][0].position + 1
                step = Step(reached - journal.position, len(batch), len(skipped))
                journal.append(len(batch), reached, documents, skipped)
                tell(step)
            tell(Step(job.source.size - journal.position, 0, 0))
            journal.finish()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        remedy = "make room; the same command goes on where it was"
        raise UserError(f"{job.files.target}", f"cannot be written: {error.strerror}", remedy) from error


def _batch(results: Iterator[Result]) -> list[Result]:
    """The next results: 64 of them, or fewer if they are large or slow. The documents do not depend on it."""
    batch, size, started = [], 0, time.monotonic()
    for result in islice(results, BATCH):
        batch.append(result)
        if isinstance(result[1], list):
            size += sum(map(len, result[1]))
        if size >= BATCH_BYTES or time.monotonic() - started > BATCH_SECONDS:
            break
    return batch


def library_versions() -> dict[str, str]:
    """Versions of what has a part in every dataset."""
    return {
        "megatron_codec": megatron_codec.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
