"""The report of an evaluation: results.json, report.md, report.html, a plot, contact sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_codec.codecs import ImageCodec
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.evaluation.document import Document
from megatron_codec.evaluation.measure import stream_numbers
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.sets import Made, PictureSet
from megatron_codec.files import whole_file, write_json

_STREAM_NAMES = {
    "share_valid": "strictly valid",
    "share_decodes": "decode",
    "bytes": "bytes a picture",
    "bytes_of_real": "of the real ones'",
    "file_bytes": "bytes a file",
    "file_bytes_of_real": "of the real ones' files",
    "psnr": "PSNR, dB",
}
_SCORES = {
    "nats_per_token": "real pictures, nats a token",
    "bits_per_byte": "bits a byte of payload",
    "bits_per_pixel": "bits a pixel",
}
_MOST_CLASSES = 30
_FORMS = {
    "frechet": ".3f", "kernel": ".5f", "precision": ".3f", "recall": ".3f",
    "share_valid": ".1%", "share_decodes": ".1%", "bytes": ".1f", "bytes_of_real": ".1%",
    "file_bytes": ".1f", "file_bytes_of_real": ".1%", "psnr": ".1f",
}  # fmt: skip


def write_evaluation(
    output: Path,
    results: dict[str, Any],
    originals: Originals,
    made: Made,
    codecs: Mapping[str, ImageCodec],
    sheet_rows: int,
) -> None:
    """Writes all files of the report, results.json last.

    Args:
        results: what `evaluate` returns.
        made: the sets of each completer and ratio, a seed each.
        codecs: whose prompts are shown, by what they are called.
        sheet_rows: originals on a contact sheet.
    """
    ratios = list(dict.fromkeys(row["ratio"] for row in results["rows"]))
    sheets = {ratio: f"contact-{ratio:g}.png" for ratio in ratios}
    for ratio, file in sheets.items():
        with whole_file(output / file) as stream:
            _sheet(originals, made, ratio, codecs, sheet_rows).save(stream, format="PNG")
    through = {name: of_seeds[0] for (name, _), of_seeds in made.items() if name.startswith("original, ")}
    plots: dict[str, str] = {}
    if through:
        with whole_file(output / "codecs.png") as stream:
            _codec_sheet(originals, through, results, sheet_rows).save(stream, format="PNG")
        name = results["names"]["frechet"]
        plots[f"Originals, and what codecs leave of them, with PSNR and {name}"] = "codecs.png"
    if len(ratios) > 1:
        _plot(results, ratios, output / "distance.png")
        plots["Over prompt ratios"] = "distance.png"
    for number, comparison in enumerate(results.get("classes", {}).get("comparisons", [])):
        if comparison.get("pearson"):
            file = f"classes-{number}.png"
            name = results["names"][comparison["distance"]]
            _plot_classes(comparison, name, results["classes"]["counts"], output / file)
            plots[f"By class, ratio {comparison['ratio']:g}: {comparison['other']}, {name}"] = file
    document = _document(output, results, sheets, plots)
    wanted = {*sheets.values(), *plots.values()}
    for pattern in ("contact-*.png", "classes-*.png", "codecs.png", "distance.png"):
        for file in output.glob(pattern):
            if file.name not in wanted:
                file.unlink()  # of another report in the same folder
    with whole_file(output / "report.md", "w") as stream:
        stream.write(document.markdown())
    with whole_file(output / "report.html", "w") as stream:
        stream.write(document.page())
    write_json(output / "results.json", results)


def _document(
    output: Path, results: Mapping[str, Any], sheets: Mapping[float, str], plots: Mapping[str, str]
) -> Document:
    document = Document("Evaluation", output)
    facts = [
        ["real pictures, and completions of each seed", f"{results['pictures']:,}"],
        ["features", f"{results['extractor']['name']}, {results['extractor']['dimensions']:,} of a picture"],
    ]
    if results["settings"]["half_size"]:
        facts.append(["pictures", "at half size on black; distances are of that part"])
    document.table(["", ""], facts)
    if results["checkpoints"]:
        document.table(
            ["checkpoint", "codec", "iteration", *_SCORES.values(), "longer than its context, left out"],
            [_checkpoint_row(checkpoint) for checkpoint in results["checkpoints"]],
        )
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
    if "classes" in results:
        _classes(document, results)
    for heading, file in plots.items():
        document.heading(heading)
        document.picture(file, heading)
    return document


def _checkpoint_row(checkpoint: Mapping[str, Any]) -> list[str]:
    scores = checkpoint["held_out"]
    return [
        checkpoint["name"],
        checkpoint["codec"]["name"],
        f"{checkpoint['iteration']:,}",
        *("-" if scores[name] is None else f"{scores[name]:.4f}" for name in _SCORES),
        str(scores["longer_than_the_context"]),
    ]


def _classes(document: Document, results: Mapping[str, Any]) -> None:
    """Distances by class, where these are few enough for a table, and what they have to do with counts."""
    classes = results["classes"]
    document.heading("By class")
    shown = list(dict.fromkeys((row["distance"], row["ratio"]) for row in classes["distances"]))
    for distance, ratio in shown if len(classes["pictures"]) <= _MOST_CLASSES else ():
        rows = [row for row in classes["distances"] if row["distance"] == distance and row["ratio"] == ratio]
        document.paragraph(f"{results['names'][distance]} of each class, ratio {ratio:g}:")
        document.table(
            ["class", "pictures", "count", *(row["completer"] for row in rows)],
            [
                [kind, str(number), f"{classes['counts'].get(kind, '-')}"]
                + [f"{row['of_class'][kind]:{_FORMS[distance]}}" for row in rows]
                for kind, number in classes["pictures"].items()
            ],
        )
    document.paragraph(
        "Gain: the distance of the other row less that of the first, for each class. Correlated with the "
        "logarithm of the class's count (Pearson) and with its rank (Spearman); p-values in brackets."
    )
    document.table(
        ["distance", "ratio", "row", "other row", "mean gain", "Pearson", "Spearman"],
        [
            [results["names"][one["distance"]], f"{one['ratio']:g}", one["completer"], one["other"]]
            + [f"{sum(one['gain'].values()) / len(one['gain']):{_FORMS[one['distance']]}}"]
            + [
                f"{one[name][0]:.3f} ({one[name][1]:.3g})" if one.get(name) else "-"
                for name in ("pearson", "spearman")
            ]
            for one in classes["comparisons"]
        ],
    )


def _cell(number: Mapping[str, Any] | None, form: str) -> str:
    if number is None:
        return "-"
    deviation = "" if number["deviation"] is None else f" +- {number['deviation']:{form}}"
    return f"{number['mean']:{form}}{deviation}"


def _sheet(
    originals: Originals, made: Made, ratio: float, codecs: Mapping[str, ImageCodec], most: int
) -> Image.Image:
    """A row for each of some originals, evenly spread: itself, its prompts, a completion of each set."""
    sets = [(name, one) for (name, of), of_seeds in made.items() if of == ratio for one in of_seeds]
    shown = dict(codecs) if ratio else {}
    rows = []
    for number in _spread(originals, most):
        row: list[Image.Image | None] = [Image.fromarray(originals.pictures[number])]
        for codec in shown.values():
            row.append(originals.prompt(codec, number, ratio))
        rows.append(row + [one.picture(number) for _, one in sets])
    prompts = ["prompt"] if len(shown) == 1 else [f"prompt, {label}" for label in shown]
    return contact_sheet(rows, ["original", *prompts, *(name for name, _ in sets)])


def _codec_sheet(
    originals: Originals, through: Mapping[str, PictureSet], results: Mapping[str, Any], most: int
) -> Image.Image:
    """A row for each of some originals: itself, and itself through each codec with PSNR and distance."""
    titles = ["original"]
    for name, one in through.items():
        psnr = stream_numbers(one).get("psnr")
        row = next(row for row in results["rows"] if row["completer"] == name)
        shown = [name.removeprefix("original, "), *([f"{psnr:.1f} dB"] if psnr else [])]
        titles.append(", ".join([*shown, f"distance {row['numbers']['frechet']['mean']:.1f}"]))
    rows = [
        [Image.fromarray(originals.pictures[number]), *(one.picture(number) for one in through.values())]
        for number in _spread(originals, most)
    ]
    return contact_sheet(rows, titles)


def _spread(originals: Originals, most: int) -> list[int]:
    count = min(most, len(originals))
    return [i * len(originals) // count for i in range(count)]


def _plot_classes(comparison: Mapping[str, Any], name: str, counts: Mapping[str, int], path: Path) -> None:
    """What the first row gains over another in each class, over how often the class occurs."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    gain = comparison["gain"]
    axes.scatter([counts[kind] for kind in gain], list(gain.values()), s=12)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log")
    coefficient, p = comparison["pearson"]
    title = f"{comparison['other']} less {comparison['completer']}: r = {coefficient:.2f}, p = {p:.2g}"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="pictures of the class in training", ylabel=f"difference, {name}")
    axes.grid(alpha=0.3)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


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
