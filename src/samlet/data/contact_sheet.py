"""A picture of a data set at a glance: some images of each split with their masks drawn on."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from samlet.data.images import read_image
from samlet.data.masks import centre_point
from samlet.data.records import Record, read_masks
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8

    from samlet.data.inspection import Report, SplitReport

_CELL, _GAP, _CAPTION, _MARGIN = 300, 14, 40, 28  # pixels
_COLUMNS, _FINE = 4, 2  # images are drawn at twice the size and shrunk: smooth outlines
_PAPER, _INK, _FAINT, _ALARM = (22, 24, 28), (238, 240, 243), (150, 156, 166), (255, 107, 107)
_DOT = 5  # radius of a centre's dot
_FILL = 0.34  # opacity of a mask
_GOLDEN = 0.61803398875  # steps of the hue that never come close to an earlier one


def object_colour(number: int) -> tuple[int, int, int]:
    """A vivid colour for the n-th object."""
    red, green, blue = colorsys.hsv_to_rgb((0.55 + number * _GOLDEN) % 1, 0.78, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_masks(image: UInt8[np.ndarray, "H W 3"], masks: Sequence[Bool[np.ndarray, "H W"]], side: int) -> Image.Image:
    """The image with filled, outlined masks and a dot at each centre; its longest side becomes `side`.

    Large objects are drawn first, so that nested ones stay visible.
    """
    fine = side * _FINE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * fine)), max(1, round(image.shape[0] * fine))
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
    order = sorted(range(len(masks)), key=lambda number: -int(np.count_nonzero(masks[number])))
    for number in order:
        _draw_mask(canvas, masks[number], np.array(object_colour(number), np.float32))
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    _draw_centres(picture, [masks[number] for number in order], fine)
    final = max(1, round(size[0] / _FINE)), max(1, round(size[1] / _FINE))
    return picture.resize(final, Image.Resampling.LANCZOS)


def _draw_mask(canvas: np.ndarray, mask: Bool[np.ndarray, "H W"], colour: np.ndarray) -> None:
    size = canvas.shape[1], canvas.shape[0]
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    large = np.asarray(resized) > 127
    edge = large & ~binary_erosion(large, iterations=3, border_value=0)
    canvas[large] = canvas[large] * (1 - _FILL) + colour * _FILL
    canvas[edge] = canvas[edge] * 0.08 + colour * 0.92


def _draw_centres(picture: Image.Image, masks: Sequence[Bool[np.ndarray, "H W"]], scale: float) -> None:
    """A dot on each object that is large enough to show it."""
    draw = ImageDraw.Draw(picture)
    for mask in masks:
        if np.sqrt(np.count_nonzero(mask)) * scale < 8 * _DOT:
            continue
        x, y = ((value + 0.5) * scale for value in centre_point(mask))
        draw.ellipse([x - _DOT, y - _DOT, x + _DOT, y + _DOT], fill=(255, 255, 255), outline=(20, 20, 20), width=2)


def _cell(record: Record) -> tuple[Image.Image, str, tuple[int, int, int]]:
    """A picture, what to write below it, and in which colour."""
    try:
        image = read_image(record.image_path)
    except DataError:
        return Image.new("RGB", (_CELL, _CELL), (52, 30, 34)), "cannot be read", _ALARM
    size = (image.shape[0], image.shape[1])
    read = list(read_masks(record.open_masks, size)) if record.open_masks else []
    masks = [mask for mask in read if not isinstance(mask, DataError)]
    caption = f"{size[1]} x {size[0]} - {len(masks)} object" + "s" * (len(masks) != 1)
    colour = _FAINT
    if len(masks) < len(read):
        caption, colour = f"{caption}, {len(read) - len(masks)} unusable", _ALARM
    if record.open_masks is None:
        caption = f"{size[1]} x {size[0]} - no masks"
    return draw_masks(image, masks, _CELL), caption, colour


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """At most `count` records, evenly through the split."""
    if len(records) <= count:
        return list(records)
    return [records[int(place)] for place in np.linspace(0, len(records) - 1, count).round()]


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def contact_sheet(report: Report, per_split: int = 8) -> Image.Image:
    """Draw a data set: `per_split` images of each split, evenly picked, under a line of totals."""
    chosen = [(split, _spread(split.records, per_split)) for split in report.splits]
    rows = sum(-(-len(records) // _COLUMNS) for _, records in chosen)
    width = 2 * _MARGIN + _COLUMNS * _CELL + (_COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + 44 + len(chosen) * 46 + rows * (_CELL + _CAPTION + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN - 6), report.root.resolve().name, fill=_INK, font=_font(30))
    top = _MARGIN + 44
    for split, records in chosen:
        top = _draw_split(sheet, split, records, top)
    return sheet


def _draw_split(sheet: Image.Image, split: SplitReport, records: Sequence[Record], top: int) -> int:
    draw = ImageDraw.Draw(sheet)
    totals = f"{split.images} images, {split.objects} objects, {split.format.replace('_', ' ')}"
    draw.text((_MARGIN, top + 4), split.name, fill=_INK, font=_font(22))
    left = _MARGIN + _font(22).getlength(split.name) + 12
    draw.text((left, top + 11), totals, fill=_FAINT, font=_font(15))
    top += 46
    for start in range(0, len(records), _COLUMNS):
        for column, record in enumerate(records[start : start + _COLUMNS]):
            _draw_cell(sheet, record, _MARGIN + column * (_CELL + _GAP), top)
        top += _CELL + _CAPTION + _GAP
    return top


def _draw_cell(sheet: Image.Image, record: Record, left: int, top: int) -> None:
    picture, caption, colour = _cell(record)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle([left, top, left + _CELL - 1, top + _CELL - 1], fill=(32, 35, 41))
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
    draw.text((left, top + _CELL + 4), _shorten(record.image_id, _font(14), _CELL), fill=_INK, font=_font(14))
    draw.text((left, top + _CELL + 21), caption, fill=colour, font=_font(13))
