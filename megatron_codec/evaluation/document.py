"""A short document of headings, text, tables and pictures, as Markdown and as an HTML page by itself."""

import base64
import html
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Text as wide as one likes to read; tables and pictures as wide as the page; wider tables move alone.
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 110em; margin: 2em auto; padding: 0 1em; }
h1, h2, p { max-width: 48em; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th { vertical-align: bottom; } td { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
img { max-width: 100%; }
.warning { background: #fff3cd; padding: .6em 1em; }"""


@dataclass
class Document:
    """Filled part by part.

    Args:
        title: its first heading.
        folder: where the files of its pictures are.
    """

    title: str
    folder: Path
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A heading of the second level."""
        self._add(f"## {text}", f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Plain text."""
        self._add(text, f"<p>{html.escape(text)}</p>")

    def warning(self, text: str) -> None:
        """Plain text that must be seen."""
        self._add(f"> **Warning:** {text}", f'<p class="warning"><b>Warning:</b> {html.escape(text)}</p>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Cells of text."""
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
        cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
        page = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
        page += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        self._add(text, f'<div class="wide"><table>{"".join(page)}</table></div>')

    def picture(self, file: str, caption: str) -> None:
        """A PNG or JPEG file of the folder; in the page it is contained."""
        content = base64.b64encode((self.folder / file).read_bytes()).decode()
        alt, kind = html.escape(caption, quote=True), mimetypes.guess_type(file)[0]
        self._add(
            f"{caption}\n\n![{caption}]({file})",
            f'<p>{alt}</p><img alt="{alt}" src="data:{kind};base64,{content}">',
        )

    def markdown(self) -> str:
        """The document as Markdown, its pictures beside it."""
        return "\n\n".join([f"# {self.title}", *self._markdown]) + "\n"

    def page(self) -> str:
        """The document as one HTML file that needs no other."""
        title = html.escape(self.title)
        body = "\n".join([f"<h1>{title}</h1>", *self._html])
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'

    def _add(self, markdown: str, page: str) -> None:
        self._markdown.append(markdown)
        self._html.append(page)
