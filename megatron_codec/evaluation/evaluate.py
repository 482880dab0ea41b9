"""What tools/evaluate.py does: completions of real pictures at several prompt ratios, and how good they are.

The protocol is that of JPEG-LM (Han et al., 2024), section 5: a prompt is the first part of a real picture; a
model completes it; the set of completed pictures is compared with the set of real ones, over several seeds.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from megatron_codec.evaluation.completers import Completer
from megatron_codec.evaluation.distances import rank_problem
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter, held_out
from megatron_codec.evaluation.evaluate_config import EvaluateConfig, check
from megatron_codec.evaluation.evaluation_report import write_evaluation
from megatron_codec.evaluation.features import Extractor, metric_names
from megatron_codec.evaluation.measure import measure, over_seeds
from megatron_codec.evaluation.originals import Originals, read_originals
from megatron_codec.evaluation.sets import PictureSet, Sets, key_of


@dataclass(frozen=True)
class Entry:
    """A set of pictures that is wanted.

    Attributes:
        completer, ratio, seed: who makes it of what.
        name, key: where it lies, see `Sets`.
        identity: what the key is of.
    """

    completer: Completer
    ratio: float
    seed: int
    name: str
    key: str
    identity: dict[str, Any]


def evaluate(config: EvaluateConfig, extractor: Extractor | None = None) -> dict[str, Any]:
    """Makes what is missing, measures, writes the report and returns `results.json`.

    Args:
        extractor: of features; by default what `--inception` says.

    Raises:
        UserError: all faults of the command line at once, before anything is computed; later what is wrong
            with the pictures.
    """
    plan = check(config, extractor)
    checkpoint, extractor = plan.checkpoint, plan.extractor
    with _bar("reading", config.num_samples, "picture") as bar:
        originals = read_originals(
            plan.selection, plan.codec, plan.geometry, extractor.dimensions, bar.update
        )
    entries = _entries(config, plan.completers, originals)
    sets = Sets(config.output)
    # Before anything is made: under TP or PP all processes have to agree about what there is to do.
    missing = {e.key: e for e in entries if not sets.has(e.name, e.key)}
    scored = {"checkpoint": checkpoint.identity, "originals": originals.hash} if checkpoint else None
    scoring = scored is not None and not sets.has_json("held-out", scored)
    _make(list(missing.values()), originals, sets)
    numbers = None
    if checkpoint and scoring:
        with _bar("scoring the originals", len(originals), "picture") as bar:
            numbers = held_out(checkpoint, originals, bar.update)
    if not _is_main():
        return {}
    numbers = sets.json("held-out", scored, lambda: numbers) if checkpoint else None
    return _finish(config, originals, extractor, entries, sets, checkpoint, numbers)


def _entries(config: EvaluateConfig, completers: Sequence[Completer], originals: Originals) -> list[Entry]:
    entries = []
    for ratio in config.ratios:
        for completer in completers:
            for seed in range(config.seed, config.seed + (config.seeds if completer.is_random else 1)):
                decides = completer.identity(ratio, seed)
                identity = {
                    "completer": decides,
                    "originals": originals.hash,
                    "codec": originals.codec.to_dict(),
                }
                parts = [
                    completer.name,
                    *(str(decides[part]) for part in ("ratio", "seed") if part in decides),
                ]
                name = " ".join(parts)
                entries.append(Entry(completer, ratio, seed, name, key_of(identity), identity))
    return entries


def _make(missing: Sequence[Entry], originals: Originals, sets: Sets) -> None:
    """Completes and writes what is not there."""
    with _bar("completing", len(missing) * len(originals), "picture") as bar:
        for entry in missing:
            bar.set_postfix_str(entry.name)
            if isinstance(entry.completer, EngineCompleter) or _is_main():
                samples = entry.completer.complete(originals, entry.ratio, entry.seed, bar.update)
                if _is_main():
                    sets.write(entry.name, entry.key, entry.identity, samples)


def _finish(
    config: EvaluateConfig,
    originals: Originals,
    extractor: Extractor,
    entries: Sequence[Entry],
    sets: Sets,
    checkpoint: Checkpoint | None,
    scored: dict[str, Any] | None,
) -> dict[str, Any]:
    """Measures all sets and writes the report."""
    made: dict[tuple[str, float], list[PictureSet]] = {}
    for entry in entries:
        made.setdefault((entry.completer.name, entry.ratio), []).append(sets.read(entry.name, entry.key))
    rows = []
    with _bar("measuring", len(entries), "set") as bar:
        for (name, ratio), of_seeds in made.items():
            numbers = []
            for one in of_seeds:
                numbers.append(measure(one, originals, extractor, config.neighbours, sets))
                bar.update(1)
            folders = [str(s.folder.relative_to(config.output)) for s in of_seeds]
            rows.append({"completer": name, "ratio": ratio, "numbers": over_seeds(numbers), "sets": folders})
    warnings = []
    if problem := rank_problem(len(originals), extractor.dimensions):
        warnings.append(problem)
    if originals.skipped:
        first = originals.skipped[0]
        warnings.append(
            f"{len(originals.skipped)} of --num-samples {config.num_samples} pictures could not be read and "
            f"are left out, first {first.name} ({first.reason})"
        )
    results = {
        "names": metric_names(extractor, config.neighbours),
        "extractor": extractor.identity | {"dimensions": extractor.dimensions},
        "codec": originals.codec.to_dict(),
        "pictures": len(originals),
        "originals_sha256": originals.hash,
        "checkpoint": _describe(checkpoint),
        "settings": _settings(config),
        "warnings": warnings,
        "held_out": scored,
        "rows": rows,
    }
    write_evaluation(config.output, results, originals, made, config.sheet_rows)
    return results


def _describe(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    steps = {"folder": str(checkpoint.path), "iteration": checkpoint.description.iteration}
    return steps | {"sha256": checkpoint.identity["checkpoint_sha256"]}


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The flags, JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def _is_main() -> bool:
    # Asked before any engine has joined the processes, and where no engine is wanted.
    return os.environ.get("RANK", "0") == "0"


def _bar(title: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=title, total=total, unit=unit, disable=not _is_main() or total == 0)
