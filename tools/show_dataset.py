"""Shows what a dataset is: pictures of random documents, how long documents are, the commonest tokens.

python tools/show_dataset.py data/train --output train.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from megatron_codec.codecs import Codec, get_codec
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.data import CodecDataset
from megatron_codec.data.manifest import length_statistics
from megatron_codec.errors import UserError, run_tool
from megatron_codec.files import whole_file
from megatron_codec.tokenizer import Tokenizer

COLUMNS = 8  # of the contact sheet
COMMONEST = 24  # tokens shown
BARS = 60  # of the histogram, at most


@dataclass(frozen=True)
class Arguments:
    """Draws random documents of a dataset, a histogram of their lengths and the commonest tokens, and prints
    the figures as Markdown."""

    prefix: Annotated[Path, tyro.conf.Positional]
    """Path of the dataset, without an ending."""
    output: Path | None = None
    """The picture to write; PREFIX.png if not given."""
    count: int = 32
    """Random documents on the contact sheet."""
    sample: int = 10000
    """Random documents in which tokens are counted, at most."""
    seed: int = 0
    """Decides which documents are drawn."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    output = arguments.output or Path(f"{arguments.prefix}.png")
    for name in ("count", "sample"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}", "must be at least 1")
    if output.is_dir():
        raise UserError(f"--output {output}", "is a folder", "name the file to write")
    dataset = CodecDataset.open(arguments.prefix)
    if not dataset.num_documents:
        raise UserError(f"{arguments.prefix}", "is a dataset without documents")
    manifest = dataset.manifest
    tokenizer = Tokenizer.from_dict(manifest.tokenizer)

    rng = np.random.default_rng(arguments.seed)
    shown = draw(rng, dataset.num_documents, arguments.count)
    codec = get_codec(**manifest.codec)
    pictures = [picture_of(dataset.document(i), tokenizer, codec) for i in shown]
    sheet = contact_sheet([pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)])
    sample = draw(rng, dataset.num_documents, arguments.sample)
    counts = count_tokens(dataset, sample)
    # The largest first, equal ones by id.
    commonest = [int(id) for id in np.argsort(-counts, kind="stable")[:COMMONEST] if counts[id]]

    bars = {f"{id}: {token_name(id, tokenizer, 12)}": int(counts[id]) for id in commonest}
    with whole_file(output) as file:
        below(sheet, charts(dataset.lengths, bars, max(sheet.width, 1000))).save(file, "PNG")

    print(f"{arguments.prefix}: {manifest.codec['name']} {manifest.codec['settings']}\n")
    for name, value in figures(dataset).items():
        print(f"- {name}: {value}")
    print(f"- documents without a picture: {pictures.count(None)} of {len(pictures)} drawn")
    print(f"\nCommonest of {counts.sum():,} tokens in {len(sample):,} documents:\n")
    print("| token | bytes | count | share |\n|---|---|---|---|")
    for id in commonest:
        share = counts[id] / counts.sum()
        print(f"| {id} | {token_name(id, tokenizer, 48)} | {counts[id]:,} | {share:.2%} |")


def draw(rng: np.random.Generator, total: int, count: int) -> list[int]:
    """At most `count` different numbers below `total`, in order."""
    return sorted(rng.choice(total, min(count, total), replace=False).tolist())


def picture_of(document: np.ndarray, tokenizer: Tokenizer, codec: Codec) -> Image.Image | None:
    """What a document shows, a clip its first frame; None if it does not decode."""
    try:
        media = codec.decode(tokenizer.decode(document))
    except UserError:
        return None
    return media if isinstance(media, Image.Image) else Image.fromarray(media[0])


def count_tokens(dataset: CodecDataset, sample: list[int]) -> np.ndarray:
    """How often each id occurs in these documents, int64 [65536]."""
    counts = np.zeros(1 << 16, np.int64)
    for i in sample:
        counts += np.bincount(dataset.document(i), minlength=len(counts))
    return counts


def figures(dataset: CodecDataset) -> dict[str, Any]:
    """What the manifest says of the dataset; lengths are counted if it does not say them."""
    manifest = dataset.manifest
    lengths = manifest.statistics.get("tokens_per_document") or length_statistics(dataset.lengths)
    shown = {
        "documents": f"{manifest.documents:,} in {len(manifest.shards)} shards",
        "tokens": f"{manifest.tokens:,}",
        "tokens a document": ", ".join(f"{name} {value:,}" for name, value in lengths.items()),
    }
    if "duplicates" in manifest.statistics:
        shown["exact duplicates"] = f"{manifest.statistics['duplicates']['count']:,}"
    skipped = manifest.skipped
    reasons = ", ".join(f"{kind}: {count:,}" for kind, count in skipped["reasons"].items())
    shown["skipped"] = f"{skipped['count']:,}" + (f" ({reasons})" if reasons else "")
    return shown


def token_name(id: int, tokenizer: Tokenizer, digits: int) -> str:
    """BOS, EOS, or the bytes of a token in hexadecimal, cut to so many digits."""
    if id in (tokenizer.bos, tokenizer.eos):
        return "BOS" if id == tokenizer.bos else "EOS"
    try:
        text = tokenizer.token_bytes(id)
    except UserError:
        return "no token"
    name = text.hex() or "no bytes"
    return name if len(name) <= digits else f"{name[:digits]}... ({len(text)} bytes)"


def charts(lengths: np.ndarray, commonest: dict[str, int], width: int) -> Image.Image:
    """A histogram of lengths, integer [documents], beside bars of counted tokens; `width` pixels wide."""
    figure = Figure(figsize=(10, 5), dpi=width / 10, layout="constrained")
    left, right = figure.subplots(1, 2)
    least, most = int(lengths.min()), int(lengths.max())
    step = -(-(most - least + 1) // BARS)  # whole, so that each bar stands for as many lengths as the next
    left.stairs(*np.histogram(lengths, np.arange(least, most + step + 1, step) - 0.5), fill=True)
    left.set(xlabel="tokens", ylabel="documents", title="Tokens a document")
    right.barh(list(commonest), list(commonest.values()), color="tab:orange")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7, labelfontfamily="monospace")
    right.set(xlabel="count", title="The commonest tokens")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures, one below the other, pixel by pixel as they are."""
    width = max(upper.width, lower.width)
    both = Image.new("RGB", (width, upper.height + lower.height), "white")
    both.paste(upper, ((width - upper.width) // 2, 0))
    both.paste(lower, ((width - lower.width) // 2, upper.height))
    return both


if __name__ == "__main__":
    run_tool(main)
