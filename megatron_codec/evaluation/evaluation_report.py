"""The report of an evaluation: results.json, report.md, report.html, a plot, contact sheets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.evaluation.document import Document
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.sets import PictureSet
from megatron_codec.files import whole_file, write_json

Made = Mapping[tuple[str, float], Sequence[PictureSet]]
_STREAM_NAMES = {
    "share_valid": "strictly valid",
    "share_decodes": "decode",
    "bytes": "bytes a picture",
    "bytes_of_real": "of the real ones'",
}
_FORMS = {
    "frechet": ".3f", "kernel": ".5f", "precision": ".3f", "recall": ".3f",
    "share_valid": ".1%", "share_decodes": ".1%", "bytes": ".1f", "bytes_of_real": ".1%",
}  # fmt: skip


def write_evaluation(
    output: Path, results: dict[str, Any], originals: Originals, made: Made, sheet_rows: int
) -> None:
    """Writes all files of the report, results.json last.

    Args:
        results: what `evaluate` returns.
        made: the sets of each completer and ratio, a seed each.
        sheet_rows: originals on a contact sheet.
    """
    ratios = list(dict.fromkeys(row["ratio"] for row in results["rows"]))
    sheets = {ratio: f"contact-{ratio:g}.png" for ratio in ratios}
    for ratio, file in sheets.items():
        with whole_file(output / file) as stream:
            _sheet(originals, made, ratio, sheet_rows).save(stream, format="PNG")
    plotted = len(ratios) > 1
    if plotted:
        _plot(results, ratios, output / "distance.png")
    document = _document(output, results, sheets, plotted)
    with whole_file(output / "report.md", "w") as stream:
        stream.write(document.markdown())
    with whole_file(output / "report.html", "w") as stream:
        stream.write(document.page())
    write_json(output / "results.json", results)


def _document(
    output: Path, results: Mapping[str, Any], sheets: Mapping[float, str], plotted: bool
) -> Document:
    document = Document("Evaluation", output)
    facts = [
        ["real pictures, and completions of each seed", f"{results['pictures']:,}"],
        ["codec", json.dumps(results["codec"])[:120]],
        ["features", f"{results['extractor']['name']}, {results['extractor']['dimensions']:,} of a picture"],
    ]
    if results["checkpoint"]:
        facts.append(["checkpoint", f"iteration {results['checkpoint']['iteration']:,}"])
    if results["held_out"]:
        told = results["held_out"]
        for name, label in (
            ("nats_per_token", "real pictures, nats a token"),
            ("bits_per_byte", "real pictures, bits a byte of payload"),
            ("bits_per_pixel", "real pictures, bits a pixel"),
        ):
            value = told[name]
            facts.append([label, "every one is longer than the context" if value is None else f"{value:.4f}"])
        if told["longer_than_the_context"]:
            facts.append(["of them longer than the context, left out", str(told["longer_than_the_context"])])
    document.table(["", ""], facts)
    for warning in results["warnings"]:
        document.warning(warning)
    document.paragraph(
        "Completed pictures against the real ones that their prompts come from: mean and standard deviation "
        "over seeds. Distances compare at equal numbers of pictures only. docs/evaluation.md says what each "
        "number means."
    )
    names = results["names"] | _STREAM_NAMES
    for ratio, file in sheets.items():
        document.heading(f"Prompt ratio {ratio:g}" if ratio else "From nothing")
        rows = [row for row in results["rows"] if row["ratio"] == ratio]
        shown = [name for name in names if any(name in row["numbers"] for row in rows)]
        document.table(
            ["", *(names[name] for name in shown), "seeds"],
            [
                [
                    row["completer"],
                    *(_cell(row["numbers"].get(name), _FORMS[name]) for name in shown),
                    str(len(row["sets"])),
                ]
                for row in rows
            ],
        )
        document.picture(file, "In each row an original, its prompt, and what was made of it")
    if plotted:
        document.heading("Over prompt ratios")
        document.picture("distance.png", names["frechet"])
    return document


def _cell(number: Mapping[str, Any] | None, form: str) -> str:
    if number is None:
        return "-"
    deviation = "" if number["deviation"] is None else f" +- {number['deviation']:{form}}"
    return f"{number['mean']:{form}}{deviation}"


def _sheet(originals: Originals, made: Made, ratio: float, most: int) -> Image.Image:
    """A row for each of some originals, evenly spread: itself, its prompt, a completion of each set."""
    sets = [(name, one) for (name, of), of_seeds in made.items() if of == ratio for one in of_seeds]
    count = min(most, len(originals))
    codec, rows = originals.codec, []
    for number in (i * len(originals) // count for i in range(count)):
        row: list[Image.Image | None] = [Image.fromarray(originals.pictures[number])]
        if ratio:
            row.append(codec.decode(codec.prompt(originals.streams[number], ratio)))
        rows.append(row + [one.picture(number) for _, one in sets])
    titles = ["original", *(["prompt"] if ratio else []), *(name[:16] for name, _ in sets)]
    return contact_sheet(rows, titles)


def _plot(results: Mapping[str, Any], ratios: Sequence[float], path: Path) -> None:
    """The Frechet distance of each completer over the ratios."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name in dict.fromkeys(row["completer"] for row in results["rows"]):
        found = {
            row["ratio"]: row["numbers"]["frechet"] for row in results["rows"] if row["completer"] == name
        }
        means = [found[ratio]["mean"] for ratio in ratios]
        axes.errorbar(
            ratios, means, [found[ratio]["deviation"] or 0 for ratio in ratios], capsize=3, label=name
        )
    # From 0, where the originals are, and so that noise does not press the others together.
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="prompt ratio", ylabel=results["names"]["frechet"])
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
