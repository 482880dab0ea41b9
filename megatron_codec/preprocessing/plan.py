"""A dataset on its way: what is to be written, how far it is, and how it is put together at the end.

The folder PREFIX.partial holds it, for all processes and all tasks of a SLURM array, until PREFIX.json is
written; see `journal.py` for the shards within.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_codec.data import Manifest
from megatron_codec.data.manifest import length_statistics
from megatron_codec.errors import UserError
from megatron_codec.files import write_json
from megatron_codec.preprocessing.journal import RECORD, Finished, ShardFiles
from megatron_codec.preprocessing.skipping import SkipLimit, nothing_readable, skipped_summary
from megatron_codec.tokenizer import Tokenizer

_PAIRS = 100  # duplicates that the manifest names


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the files of a dataset.

    Args:
        prefix: of the dataset.
        shards: how many it has.
        codec, source, versions: as in the manifest.
        tokenizer: for the manifest, too.
        digest: of the source, see `sources.base`.
        things: what its items are called.
    """

    prefix: Path
    shards: int
    codec: dict[str, Any]
    tokenizer: Tokenizer
    source: dict[str, Any]
    versions: dict[str, str]
    digest: str
    things: str

    @property
    def folder(self) -> Path:
        """Where everything is until it is finished."""
        return partial_folder(self.prefix)

    def files(self, shard: int) -> ShardFiles:
        """The names of a shard's files."""
        name = (
            self.prefix.name if self.shards == 1 else f"{self.prefix.name}-{shard:05d}-of-{self.shards:05d}"
        )
        return ShardFiles(self.folder, self.prefix.with_name(name))

    def start(self) -> None:
        """Writes the plan, or finds that it is the same as that of the run that was stopped.

        Raises UserError if it is not.
        """
        path = self.folder / "plan.json"
        wanted = {
            "shards": self.shards,
            "codec": self.codec,
            "tokenizer": self.tokenizer.hash,
            "source": self.source,
            "versions": self.versions,
            "input_names": self.digest,
        }
        if not path.exists():
            write_json(path, wanted)
            return
        before, now = _flat(json.loads(path.read_bytes())), _flat(json.loads(json.dumps(wanted)))
        names = sorted(before.keys() | now.keys())
        changes = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if changes:
            remedy = f"run the command that was stopped, or remove {self.folder} to begin again"
            rule = f"holds a dataset that was stopped half-way and is another one: {'; '.join(changes)}"
            raise UserError(f"{self.folder}", rule, remedy)

    def join(self, command: Sequence[str], max_skipped: SkipLimit | None) -> Manifest | None:
        """Writes the manifest if all shards are finished, and returns it; None if some are not yet.

        May be called by several tasks at once: they write the same.
        """
        try:
            finished = [self.files(i).finished() for i in range(self.shards)]
            whole = [entry for entry in finished if entry is not None]
            if len(whole) < self.shards:
                return None
            return self._join(whole, command, max_skipped)
        except FileNotFoundError:
            if Path(f"{self.prefix}.json").exists():  # another task was faster
                return Manifest.load(f"{self.prefix}.json")
            raise

    def _join(
        self, finished: list[Finished], command: Sequence[str], max_skipped: SkipLimit | None
    ) -> Manifest:
        skipped = [entry for part in finished for entry in part.skipped]
        items = sum(part.items for part in finished)
        if max_skipped:
            max_skipped.check(items, len(skipped), self.things, finished=True)
        if not any(part.shard.documents for part in finished):
            self.remove()
            raise nothing_readable(skipped[0], items, self.things)
        records = np.concatenate([np.fromfile(self.files(i).documents, RECORD) for i in range(self.shards)])
        manifest = Manifest(
            codec=self.codec,
            tokenizer=self.tokenizer.to_dict(),
            shards=[part.shard for part in finished if part.shard.documents],
            skipped=skipped_summary(skipped, Path(f"{self.prefix}.skipped.jsonl"), self.folder),
            source=self.source,
            statistics={"items": items, **_statistics(records)},
            versions=self.versions,
            command=list(command),
        )
        manifest.save(f"{self.prefix}.json", scratch=self.folder)
        self.remove()
        return manifest

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(prefix: Path) -> Path:
    """PREFIX.partial."""
    return prefix.with_name(f"{prefix.name}.partial")


def finished_before(
    prefix: Path,
    codec: dict[str, Any],
    tokenizer: Tokenizer,
    source: dict[str, Any],
    versions: dict[str, str],
) -> Manifest | None:
    """The manifest of a run with these settings that was killed when all was written and only PREFIX.partial
    was still to be removed, which is done now. None if there was none."""
    path, folder = Path(f"{prefix}.json"), partial_folder(prefix)
    if not (path.exists() and folder.is_dir()):
        return None
    manifest = Manifest.load(path)
    wanted = json.loads(json.dumps([codec, tokenizer.to_dict(), source, versions]))
    if [manifest.codec, manifest.tokenizer, manifest.source, manifest.versions] != wanted:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return manifest


def check_output(prefix: Path) -> None:
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


@contextlib.contextmanager
def input_lists(prefix: Path, task: str):
    """A folder for lists of input names, empty at first and removed at the end, with all that is empty by
    then."""
    folder = partial_folder(prefix)
    lists = folder / f"inputs-{task}"
    shutil.rmtree(lists, ignore_errors=True)
    try:
        yield lists
    finally:
        shutil.rmtree(lists, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _statistics(records: np.ndarray) -> dict[str, Any]:
    lengths, digests = records["length"], records["digest"]
    order = np.argsort(digests, kind="stable")
    begins = np.flatnonzero(np.diff(digests[order], prepend=~digests[order[0]]))
    group = np.repeat(order[begins], np.diff(begins, append=len(order)))
    again = order != group
    pairs = np.stack([order[again], group[again]], axis=1)
    pairs = pairs[np.argsort(pairs[:, 0])]
    return {
        "tokens_per_document": length_statistics(lengths),
        "duplicates": {"count": len(pairs), "first": pairs[:_PAIRS].tolist()},
    }


def _flat(values: dict[str, Any], within: str = "") -> dict[str, Any]:
    """`{"a.b": 1}` for `{"a": {"b": 1}}`."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {f"{within}{name}": value}
    return flat
