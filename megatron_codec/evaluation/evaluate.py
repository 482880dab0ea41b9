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

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate.flops import model_parameters, token_flops
from megatron_codec.evaluation.classes import compare_classes
from megatron_codec.evaluation.completers import Completer, FolderCompleter, ReferenceCompleter
from megatron_codec.evaluation.distances import rank_problem
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter, held_out
from megatron_codec.evaluation.evaluate_config import EvaluateConfig, Plan, check
from megatron_codec.evaluation.evaluation_report import write_evaluation
from megatron_codec.evaluation.export import export
from megatron_codec.evaluation.features import Extractor, metric_names
from megatron_codec.evaluation.measure import measure, over_seeds
from megatron_codec.evaluation.originals import Originals, read_originals
from megatron_codec.evaluation.sets import Made, Sets, key_of
from megatron_codec.tokenizer import Tokenizer

PART = 256  # pictures that are made at a time: what is lost when a run is stopped


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
    """Makes what is missing, measures, writes the report and returns `results.json`; nothing on the other
    processes of a layout, nor with `--export`.

    Args:
        extractor: of features; by default what `--inception` says.

    Raises:
        UserError: all faults of the command line at once, before anything is computed; later what is wrong
            with the pictures.
    """
    plan = check(config, extractor)
    extractor = plan.extractor
    others = "others" in config.references and not config.export
    with _bar("reading", config.num_samples * (2 if others else 1), "picture") as bar:
        originals = read_originals(
            plan.selection,
            plan.image_size,
            plan.geometry,
            extractor.dimensions,
            bar.update,
            config.half_size,
            others,
            config.least_pictures,
        )
    if config.export:
        if _is_main():
            export(config.output / "export", originals, plan.codecs, config.ratios)
        return {}
    completers = [
        completer
        for completer in plan.completers
        if not (isinstance(completer, ReferenceCompleter) and completer.kind == "others") or originals.others
    ]
    # What is wrong with these is told before anything is made.
    if plan.classes:
        plan.classes.members(originals.names)
    entries = _entries(config, completers, originals)
    for entry in entries.values():
        if isinstance(entry.completer, FolderCompleter):
            entry.completer.check(originals, entry.ratio, entry.seed)
    sets = Sets(config.output)
    # Before anything is made: under TP or PP all processes have to agree about what there is to do.
    missing = [(entry, _missing_parts(entry, len(originals), sets)) for entry in entries.values()]
    scores = [
        {"checkpoint": checkpoint.identity, "originals": originals.hash} for checkpoint in plan.checkpoints
    ]
    unscored = [not sets.has_json("held-out", score) for score in scores]

    total = sum(len(part) for _, parts in missing for part in parts or ())
    with _bar("completing", total, "picture") as bar:
        # One model after the other: each has its memory only while it is needed.
        for completer in completers if _is_main() else ():
            for entry, parts in missing:
                if entry.completer is completer and not isinstance(completer, EngineCompleter):
                    _make(entry, parts, originals, sets, bar)
            completer.release()
        for checkpoint, score, wanted in zip(plan.checkpoints, scores, unscored, strict=True):
            for entry, parts in missing:
                if isinstance(entry.completer, EngineCompleter) and entry.completer.checkpoint is checkpoint:
                    _make(entry, parts, originals, sets, bar)
            if wanted:
                _score(checkpoint, score, originals, sets)
            for completer in plan.completers:
                if isinstance(completer, EngineCompleter) and completer.checkpoint is checkpoint:
                    completer.release()
    if not _is_main():
        return {}
    made: Made = {}
    for entry in entries.values():
        made.setdefault((entry.completer.name, entry.ratio), []).append(sets.read(entry.name, entry.key))
    rows = _measure(made, config, originals, extractor, sets)
    checkpoints = [
        _describe(checkpoint) | {"held_out": sets.json("held-out", score, dict)}
        for checkpoint, score in zip(plan.checkpoints, scores, strict=True)
    ]
    results = {
        "names": metric_names(extractor, config.neighbours),
        "extractor": extractor.identity | {"dimensions": extractor.dimensions},
        "pictures": len(originals),
        "originals": list(originals.names),
        "originals_sha256": originals.hash,
        "checkpoints": checkpoints,
        "settings": _settings(config),
        "warnings": _warnings(config, plan, originals, made),
        "rows": rows,
    }
    if plan.classes:
        with _bar("measuring classes", len(made), "row") as bar:
            results["classes"] = compare_classes(plan.classes, made, originals, extractor, sets, bar.update)
    write_evaluation(config.output, results, originals, made, plan.codecs, config.sheet_rows)
    return results


def _entries(
    config: EvaluateConfig, completers: Sequence[Completer], originals: Originals
) -> dict[tuple[str, float, int], Entry]:
    """By name of the completer, ratio and seed."""
    entries = {}
    for ratio in config.ratios:
        for completer in completers:
            for seed in range(config.seed, config.seed + (config.seeds if completer.is_random else 1)):
                decides = completer.identity(ratio, seed)
                identity = {"completer": decides, "originals": originals.hash}
                if isinstance(completer, ReferenceCompleter) and completer.kind == "others":
                    assert originals.others
                    identity["originals"] = originals.others.hash
                parts = [
                    completer.name,
                    *(str(decides[part]) for part in ("ratio", "seed") if part in decides),
                ]
                key = completer.name, ratio, seed
                entries[key] = Entry(completer, ratio, seed, " ".join(parts), key_of(identity), identity)
    return entries


def _missing_parts(entry: Entry, count: int, sets: Sets) -> list[range] | None:
    """The parts of a set that are to be made; None where the whole set is there."""
    if sets.has(entry.name, entry.key):
        return None
    parts = [range(start, min(count, start + PART)) for start in range(0, count, PART)]
    return [part for part in parts if not sets.has_part(entry.name, entry.key, part)]


def _make(entry: Entry, parts: Sequence[range] | None, originals: Originals, sets: Sets, bar: tqdm) -> None:
    """Completes and writes what is not there."""
    if parts is None or (_is_main() and sets.has(entry.name, entry.key)):  # rows may share a set
        return
    bar.set_postfix_str(entry.name)
    for part in parts:
        samples = entry.completer.complete(originals, part, entry.ratio, entry.seed, bar.update)
        if _is_main():
            sets.write_part(entry.name, entry.key, part, samples)
    if _is_main():
        sets.finish(entry.name, entry.key, entry.identity)


def _score(checkpoint: Checkpoint, score: dict[str, Any], originals: Originals, sets: Sets) -> None:
    with _bar(f"scoring the originals by {checkpoint.name}", len(originals), "picture") as bar:
        numbers = held_out(checkpoint, originals, bar.update)
    if _is_main():
        sets.json("held-out", score, lambda: numbers)


def _measure(
    made: Made, config: EvaluateConfig, originals: Originals, extractor: Extractor, sets: Sets
) -> list[dict[str, Any]]:
    rows = []
    with _bar("measuring", sum(map(len, made.values())), "set") as bar:
        for (name, ratio), of_seeds in made.items():
            numbers = []
            for one in of_seeds:
                numbers.append(measure(one, originals, extractor, config.neighbours, sets))
                bar.update(1)
            folders = [str(s.folder.relative_to(config.output)) for s in of_seeds]
            rows.append({"completer": name, "ratio": ratio, "numbers": over_seeds(numbers), "sets": folders})
    return rows


def _warnings(config: EvaluateConfig, plan: Plan, originals: Originals, made: Made) -> list[str]:
    warnings = []
    dimensions = plan.extractor.dimensions
    if problem := rank_problem(len(originals), dimensions):
        warnings.append(problem)
    if plan.classes and (problem := plan.classes.rank_problem(originals.names, dimensions)):
        warnings.append(problem)
    if "others" in config.references and originals.others is None:
        warnings.append(
            f"--data has no {len(originals)} other real pictures beside the originals: there are no rows of "
            f"them to say how near a perfect model could come"
        )
    if originals.skipped:
        first = originals.skipped[0]
        warnings.append(
            f"{len(originals.skipped)} of --num-samples {config.num_samples} pictures could not be read and "
            f"are left out, first {first.name} ({first.reason})"
        )
    for (name, ratio), of_seeds in made.items():
        if count := sum("too_long" in numbers for numbers in of_seeds[0].numbers):
            warnings.append(
                f"{name}: {count} of {len(originals)} prompts of ratio {ratio:g} do not fit into the model's "
                f"context, and nothing was added to them"
            )
    return warnings


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    description = checkpoint.description
    config = PretrainConfig(model=description.model)
    rows = config.model.padded_vocab_size(Tokenizer.from_dict(description.tokenizer).num_tokens)
    tokens = description.consumed_samples * description.model.seq_length
    return {
        "name": checkpoint.name,
        "folder": str(checkpoint.path),
        "iteration": description.iteration,
        "sha256": checkpoint.identity["checkpoint_sha256"],
        "codec": checkpoint.codec.to_dict(),
        "model": asdict(description.model),
        "parameters": model_parameters(config, rows),
        "tokens": tokens,  # of training
        "flops": tokens * token_flops(config, rows).causal,
    }


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The flags, JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def _is_main() -> bool:
    # Asked before any engine has joined the processes, and where no engine is wanted.
    return os.environ.get("RANK", "0") == "0"


def _bar(title: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=title, total=total, unit=unit, disable=not _is_main() or total == 0)
