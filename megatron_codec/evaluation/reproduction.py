"""The report of examples/reproduce_small.sh: the paper's comparison made small, from what its stages left
(reproduction_results.py) and what training logged in RUN/models/NAME/metrics.jsonl."""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.document import Document
from megatron_codec.evaluation.reproduction_results import COMMAND, MODELS, Stage, answer, dataset, variables
from megatron_codec.files import whole_file

_LARGE = 1 << 19  # bytes of a picture, since reports are kept in a repository


def write_reproduction(run: Path, output: Path) -> list[str]:
    """Writes the report and its pictures.

    Args:
        run: folder of examples/reproduce_small.sh.
        output: the Markdown file; pictures go into the folder `images` beside it.

    Returns:
        The plain answer, a sentence for each prompt ratio; none without the stage `compare`.

    Raises:
        UserError: no stage has ended.
    """
    stages = {name: stage for name in _STAGES if (stage := Stage.read(run, name)) is not None}
    if not stages:
        raise UserError(f"{run}", "has no stage that has ended", f"run {COMMAND}")
    whole = "compare" in stages
    title = "The paper's comparison in small" if whole else "JPEG-LM over size, training and codec"
    title += f": {dataset(run).short}"
    document = Document(title, output.parent)
    first = next(iter(stages.values()))
    document.paragraph(_what_it_is(first, run))
    answers = answer(stages["compare"]) if "compare" in stages else []
    if answers:
        document.heading("The answer at this scale")
        document.paragraph(
            "The paper, with 7B models and FID, reports JPEG-LM 31% below the VQ transformer on average over "
            "its partial-prompt tables. Here:"
        )
        document.paragraph("\n".join(f"- {sentence}" for sentence in answers))
    if (output.parent / "experiments.md").exists():
        document.paragraph("What is behind these numbers is in [experiments.md](experiments.md).")
    for warning in first.results["warnings"]:
        document.warning(warning)
    for name, stage in stages.items():
        _STAGES[name](document, stage, run, output)
    with whole_file(output, "w") as stream:
        stream.write(document.markdown())
    return answers


def _what_it_is(stage: Stage, run: Path) -> str:
    settings = stage.results["settings"]
    return (
        f"Written by `{f'{variables(run)} {COMMAND}'.strip()}`, which trains each model, and its stage "
        f"`report`, which writes this page. Models on {dataset(run).words}. All of them are Llamas; "
        f"{stage.results['pictures']} held-out pictures are completed with "
        f"{_seeds(settings)} (top-k {settings['top_k'][0]}, top-p {settings['top_p'][0]:g}) unless it says "
        f"otherwise. {stage.results['names']['frechet']}: lower is nearer to the real ones."
    )


def _seeds(settings: Mapping[str, Any]) -> str:
    return "1 seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds"


def _compare(document: Document, stage: Stage, run: Path, output: Path) -> None:
    _models(document, stage, run, output)
    _distances(document, stage, output)


def _models(document: Document, stage: Stage, run: Path, output: Path) -> None:
    document.heading("The models")
    document.paragraph("The same Llama but for its vocabulary, as much computation for each.")
    _trained(document, stage, run, output, MODELS, "loss.png")
    document.paragraph(
        "Computation counts the causal half of attention. Bits a pixel are of each codec's own streams: a "
        "codec that keeps less has less to predict. The network of the VQ codec was trained before, and that "
        "computation is not counted."
    )


def _distances(document: Document, stage: Stage, output: Path) -> None:
    names = stage.results["names"]
    document.heading("Codecs")
    rows = [
        [name.removeprefix("original, ")]
        + [_cell(stage.number(name, stage.ratios[0], what), form) for what, form in _CODEC_NUMBERS]
        for name in stage.references
        if name.startswith("original, ")
    ]
    document.table(["originals through", "PSNR, dB", "bytes a picture", names["frechet"]], rows)
    _keep(document, stage.folder / "codecs.png", output, "Originals, and what the codecs leave of them")
    document.heading("Distances")
    document.paragraph(f"`{_command(stage.results['settings'])}`")
    for what, form in (("frechet", ".1f"), ("kernel", ".3f"), ("precision", ".3f"), ("recall", ".3f")):
        document.paragraph(f"{names[what]}, mean and deviation over seeds, over prompt ratios:")
        document.table(
            ["", *(f"{ratio:g}" for ratio in stage.ratios)],
            [
                [title, *(_cell(stage.number(name, ratio, what), form) for ratio in stage.ratios)]
                for name, title in [*MODELS.items(), *((name, name) for name in stage.references)]
            ],
        )
    _keep(document, stage.folder / "distance.png", output, names["frechet"])
    for ratio in stage.ratios:
        caption = f"Prompt ratio {ratio:g}" if ratio else "From nothing"
        _keep(document, stage.folder / f"contact-{ratio:g}.png", output, caption)


def _half_size(document: Document, stage: Stage, run: Path, output: Path) -> None:
    document.heading("At half size on black")
    side = dataset(run).side // 2
    document.paragraph(f"The same models and prompts; pictures of {side}x{side} in the middle of black ones.")
    _table_of(document, stage, list(MODELS.items()))


def _sampling(document: Document, stage: Stage, run: Path, output: Path) -> None:
    document.heading("Over top-k and top-p")
    document.paragraph(f"The same models, {_seeds(stage.results['settings'])}.")
    rows = [row["completer"] for row in stage.results["rows"]]
    _table_of(document, stage, [(name, _titled(name)) for name in dict.fromkeys(rows)])


def _scale(document: Document, stage: Stage, run: Path, output: Path) -> None:
    document.heading("JPEG-LM over size and length of training")
    document.paragraph(
        "Three models of one size, trained for all, half and a quarter of the computation; and smaller ones, "
        "trained on as many tokens as the first."
    )
    names = {name: name for name in stage.checkpoints}
    _trained(document, stage, run, output, names, "scale.png")
    _table_of(document, stage, list(names.items()))


def _quality(document: Document, stage: Stage, run: Path, output: Path) -> None:
    document.heading("JPEG-LM over JPEG quality, and without restart markers")
    document.paragraph(
        "One small model, the same computation, the same pictures in another codec each: at the quality that "
        "its name says, or at 25 without restart markers."
    )
    names = {name: name for name in stage.checkpoints}
    _trained(document, stage, run, output, names, "quality.png")
    rows = [*names.items(), *((name, name) for name in stage.references if name.startswith("original, "))]
    _table_of(document, stage, rows)


_STAGES = {
    "compare": _compare,
    "half-size": _half_size,
    "sampling": _sampling,
    "scale": _scale,
    "quality": _quality,
}


def _titled(row: str) -> str:
    """A row of a model under its title: "model (vq), top-k 40" is "VQ transformer, top-k 40"."""
    name = row.partition("model (")[2].partition(")")[0]
    return row.replace(f"model ({name})", MODELS.get(name, name)) if name else row


def _table_of(document: Document, stage: Stage, names: Sequence[tuple[str, str]]) -> None:
    document.paragraph(f"{stage.results['names']['frechet']} over prompt ratios:")
    document.table(
        ["", *(f"{ratio:g}" for ratio in stage.ratios)],
        [
            [title, *(_cell(stage.number(name, ratio), ".1f") for ratio in stage.ratios)]
            for name, title in names
        ],
    )
    settings = stage.results["settings"]
    document.paragraph(f"`{_command(settings)}`")


_MODEL_HEAD = [
    "", "layers x width", "parameters", "steps", "tokens", "pictures", "FLOPs", "nats a token",
    "bits a pixel",
]  # fmt: skip
_CODEC_NUMBERS = (("psnr", ".1f"), ("bytes", ".0f"), ("frechet", ".1f"))


def _model_row(title: str, stage: Stage, name: str) -> list[str]:
    checkpoint = stage.checkpoints[name]
    model, scores = checkpoint["model"], checkpoint["held_out"]
    tokens_a_picture = scores["tokens"] / max(1, scores["pictures"]) + 1  # and its BOS
    return [
        title,
        f"{model['num_layers']} x {model['hidden_size']}",
        f"{checkpoint['parameters'] / 1e6:.2f}M",
        f"{checkpoint['iteration']:,}",
        f"{checkpoint['tokens'] / 1e6:.1f}M",
        f"{checkpoint['tokens'] / tokens_a_picture:,.0f}",
        f"{checkpoint['flops']:.2e}",
        f"{scores['nats_per_token']:.3f}" if scores["nats_per_token"] else "-",
        f"{scores['bits_per_pixel']:.3f}" if scores["bits_per_pixel"] else "-",
    ]


def _cell(number: Mapping[str, Any] | None, form: str) -> str:
    if number is None:
        return "-"
    deviation = "" if number["deviation"] is None else f" +- {number['deviation']:{form}}"
    return f"{number['mean']:{form}}{deviation}"


def _trained(
    document: Document, stage: Stage, run: Path, output: Path, titles: Mapping[str, str], file: str
) -> None:
    """A table and a plot of what training was like, for each model under its title."""
    document.table(_MODEL_HEAD, [_model_row(title, stage, name) for name, title in titles.items()])
    curves = {title: _curve(run, stage.checkpoints[name]) for name, title in titles.items()}
    path = _picture(output, file)
    _plot_curves(curves, path)
    document.picture(f"images/{path.name}", "Held-out bits a picture over computation")


def _curve(run: Path, checkpoint: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(FLOPs, held-out bits a picture) of each validation."""
    path = run / "models" / checkpoint["name"] / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}", f"cannot be read ({error})", f"run {COMMAND} compare") from error
    scores = checkpoint["held_out"]
    bits = scores["tokens"] / max(1, scores["pictures"]) / 0.6931471805599453
    flops = checkpoint["flops"] / checkpoint["iteration"]
    return [
        (line["iteration"] * flops, line["validation_loss"] * bits)
        for line in lines
        if "validation_loss" in line
    ]


def _plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for title, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=title)
    axes.set(xlabel="FLOPs of training", ylabel="held-out bits a picture", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _picture(output: Path, name: str) -> Path:
    """Where a picture of the report goes: reports in one folder do not share them."""
    return output.parent / "images" / f"{output.stem}-{name}"


def _keep(document: Document, picture: Path, output: Path, caption: str) -> None:
    """Copies a picture of an evaluation beside the report, and shows it; a large one, of photos, as JPEG."""
    large = picture.stat().st_size > _LARGE
    kept = _picture(output, picture.with_suffix(".jpg").name if large else picture.name)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(picture, "rb") as source, whole_file(kept) as target:
        if large:
            Image.open(source).convert("RGB").save(target, format="JPEG", quality=80)
        else:
            shutil.copyfileobj(source, target)
    document.picture(f"images/{kept.name}", caption)


def _command(settings: Mapping[str, Any]) -> str:
    """The evaluation's own command."""
    words = ["python", "tools/evaluate.py", "--load", *settings["load"], "--data", *settings["data"]]
    words += ["--geometry", settings["geometry"], "--num-samples", str(settings["num_samples"])]
    words += ["--ratios", *(f"{ratio:g}" for ratio in settings["ratios"])]
    words += ["--top-k", *(f"{top_k:g}" for top_k in settings["top_k"])]
    words += ["--top-p", *(f"{top_p:g}" for top_p in settings["top_p"])]
    words += ["--seeds", str(settings["seeds"])] if settings["seeds"] != 3 else []
    words += ["--half-size"] if settings["half_size"] else []
    words += ["--references", *settings["references"]]
    return shlex.join([*words, "--output", settings["output"]])
