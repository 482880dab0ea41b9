"""Contact sheets: many small pictures on one, for people who would rather look than read."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

_GAP = 4
_LABEL_HEIGHT = 14
_BACKGROUND = (250, 250, 250)
_MISSING = (200, 60, 60)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]], titles: Sequence[str] = (), size: int = 96
) -> Image.Image:
    """Draws rows of pictures, each enlarged by a whole factor to about `size` pixels.

    Args:
        rows: None draws a crossed-out cell, for a sample that does not decode.
        titles: headings of the columns, as many as are wanted.
    """
    columns = max(len(row) for row in rows)
    cell = size
    first = next((picture for row in rows for picture in row if picture is not None), None)
    if first is not None:
        cell = max(1, round(size / max(first.size))) * max(first.size)
    top = _LABEL_HEIGHT if titles else 0
    sheet = Image.new(
        "RGB", (_GAP + columns * (cell + _GAP), top + _GAP + len(rows) * (cell + _GAP)), _BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (cell + _GAP), 2), title, fill=(60, 60, 60))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            corner = (_GAP + x * (cell + _GAP), top + _GAP + y * (cell + _GAP))
            if picture is None:
                box = (*corner, corner[0] + cell - 1, corner[1] + cell - 1)
                draw.rectangle(box, outline=_MISSING)
                draw.line(box, fill=_MISSING)
                continue
            # Whole factors and nearest pixels, so that what one sees is what was sampled.
            factor = max(1, cell // max(picture.size))
            larger = picture.resize(
                (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
            )
            sheet.paste(larger, corner)
    return sheet
