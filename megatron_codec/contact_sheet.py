"""Contact sheets: many small pictures on one, for people who would rather look than read."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_LINE_HEIGHT = 12
_BACKGROUND = (250, 250, 250)
_MISSING = (200, 60, 60)
_GENERATED = (240, 140, 20)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]], titles: Sequence[str] = (), size: int = 96
) -> Image.Image:
    """Draws rows of pictures, each enlarged by a whole factor to about `size` pixels.

    Args:
        rows: None draws a crossed-out cell, for a sample that does not decode.
        titles: headings of the columns, as many as are wanted; long ones are broken into lines.
    """
    columns = max(len(row) for row in rows)
    cell = size
    first = next((picture for row in rows for picture in row if picture is not None), None)
    if first is not None:
        cell = max(1, round(size / max(first.size))) * max(first.size)
    headings = [_lines(title, cell) for title in titles]
    top = 2 + _LINE_HEIGHT * max(map(len, headings)) if headings else 0
    sheet = Image.new(
        "RGB", (_GAP + columns * (cell + _GAP), top + _GAP + len(rows) * (cell + _GAP)), _BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        for number, line in enumerate(lines):
            place = (_GAP + column * (cell + _GAP), 2 + number * _LINE_HEIGHT)
            draw.text(place, line, fill=(60, 60, 60), font=_font())
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


def _lines(title: str, width: int) -> list[str]:
    """A title broken between words, and within one where it is wider than `width` pixels by itself."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if _font().getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


@functools.cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(10)


def film_sheet(clips: Sequence[tuple[np.ndarray | None, int]], width: int = 96) -> Image.Image:
    """Draws the frames of clips side by side, a clip a row; frames that were generated have a line below.

    Args:
        clips: uint8 [frames, height, width, 3] and how many of its first frames were given; None draws a
            crossed-out row, for a sample that does not decode.
        width: of a frame in pixels, about; frames are enlarged by a whole factor.
    """
    first = next((frames for frames, _ in clips if frames is not None), np.zeros((1, 1, 1, 3), np.uint8))
    count, height, wide = first.shape[:3]
    factor = max(1, round(width / wide))
    height, wide = height * factor, wide * factor
    size = (_GAP + count * (wide + _GAP), _GAP + len(clips) * (height + 2 * _GAP))
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for y, (frames, given) in enumerate(clips):
        top = _GAP + y * (height + 2 * _GAP)
        if frames is None:
            box = (_GAP, top, size[0] - _GAP, top + height)
            draw.rectangle(box, outline=_MISSING)
            draw.line(box, fill=_MISSING)
            continue
        for x, frame in enumerate(frames):
            left = _GAP + x * (wide + _GAP)
            picture = Image.fromarray(frame).resize((wide, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            if x >= given:
                draw.rectangle((left, top + height + 1, left + wide - 1, top + height + 2), fill=_GENERATED)
    return sheet
