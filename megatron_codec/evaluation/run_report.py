"""The small report of one run: loss curve, held-out loss, validity of the samples, pictures.

Reads what the tools left in a run's folder, writes `report.md`, `loss.png`, `samples.png`, `report.json`:

    RUN/tokenizer.json  RUN/data/train.*  RUN/data/test.*  RUN/checkpoint/  RUN/samples/  RUN/completions/
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_codec.data import CodecDataset
from megatron_codec.data.code_length import payload_bytes, token_counts, unigram_nats
from megatron_codec.errors import UserError
from megatron_codec.files import whole_file, write_json
from megatron_codec.tokenizer import Tokenizer

_REMEDY = "run examples/quickstart.sh to its end"


def write_report(run: Path) -> dict[str, Any]:
    """Writes the report of a finished run and returns its numbers.

    Raises:
        UserError: a part of the run is missing.
    """
    metrics = _read_metrics(run / "checkpoint" / "metrics.jsonl")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    train, test = (CodecDataset.open(run / "data" / name) for name in ("train", "test"))
    samples, completions = (_read_json(run / name / "samples.json") for name in ("samples", "completions"))

    losses = _curve(metrics, "loss")
    validation = _curve(metrics, "validation_loss")
    bits = _curve(metrics, "validation_bits_per_byte")
    if not losses or not validation or not bits:
        raise UserError(f"{run}", "has no training or no held-out loss yet", _REMEDY)
    train_counts = token_counts(train, tokenizer.num_tokens)
    test_counts = token_counts(test, tokenizer.num_tokens)
    train_counts[tokenizer.bos] = test_counts[tokenizer.bos] = 0  # BOS is given, not predicted
    nats, unigram = validation[-1][1], unigram_nats(train_counts, test_counts)
    numbers: dict[str, Any] = {
        "train_pictures": train.num_documents,
        "test_pictures": test.num_documents,
        "tokens_per_picture": test.num_tokens / test.num_documents,
        "bytes_per_picture": payload_bytes(test_counts, tokenizer.token_bytes) / test.num_documents,
        "iterations": losses[-1][0],
        "train_nats_per_token": losses[-1][1],
        "held_out_nats_per_token": nats,
        "held_out_bits_per_payload_byte": bits[-1][1],
        "unigram_nats_per_token": unigram,
        "below_unigram": 1 - nats / unigram,
        "samples": samples["samples"] + completions["samples"],
        "share_that_decodes": _weighted("share_that_decodes", samples, completions),
        "share_valid": _weighted("share_valid", samples, completions),
        "sampling_tokens_per_second": samples["tokens_per_second"],
    }
    _plot(losses, validation, unigram, run / "loss.png")
    _join([run / name / "contact_sheet.png" for name in ("samples", "completions")], run / "samples.png")
    with whole_file(run / "report.md", "w") as stream:
        stream.write(_markdown(run.name, numbers, test.manifest.codec))
    write_json(run / "report.json", numbers)
    return numbers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}", f"cannot be read ({error})", _REMEDY) from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}", f"cannot be read ({error})", _REMEDY) from error


def _curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["iteration"], line[name]) for line in metrics if name in line]


def _weighted(name: str, *groups: dict[str, Any]) -> float:
    return sum(group[name] * group["samples"] for group in groups) / sum(group["samples"] for group in groups)


def _plot(losses, validation, unigram: float, path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(*zip(*losses, strict=True), linewidth=1, label="training")
    axes.plot(*zip(*validation, strict=True), "o-", markersize=4, label="held out")
    axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label="unigram model, held out")
    axes.set(xlabel="iteration", ylabel="nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _join(paths: list[Path], target: Path) -> None:
    """One picture below the other."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    sheet = Image.new("RGB", size, (250, 250, 250))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    with whole_file(target) as stream:
        sheet.save(stream, format="PNG")


def _markdown(name: str, numbers: dict[str, Any], codec: dict[str, Any]) -> str:
    return f"""# {name}

| | |
|---|---|
| codec | `{json.dumps(codec)}` |
| pictures, training / held out | {numbers["train_pictures"]:,} / {numbers["test_pictures"]:,} |
| bytes / tokens a picture | {numbers["bytes_per_picture"]:.1f} / {numbers["tokens_per_picture"]:.1f} |
| iterations | {numbers["iterations"]:,} |
| training loss, nats a token | {numbers["train_nats_per_token"]:.3f} |
| **held-out loss, nats a token** | **{numbers["held_out_nats_per_token"]:.3f}** |
| unigram model of the same tokens | {numbers["unigram_nats_per_token"]:.3f} |
| held-out loss below the unigram model | {numbers["below_unigram"]:.1%} |
| held-out bits a byte of payload | {numbers["held_out_bits_per_payload_byte"]:.3f} |
| samples that decode | {numbers["share_that_decodes"]:.1%} of {numbers["samples"]} |
| valid samples | {numbers["share_valid"]:.1%} |
| sampling, tokens a second | {numbers["sampling_tokens_per_second"]:.0f} |

![loss](loss.png)

Pictures from nothing, and below them completions of held-out pictures: the prompt, the samples, the original.

![samples](samples.png)
"""
