"""A contact sheet of automatic masks: one row an image, one column for the ground truth and for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from samlet.artefacts import write_file
from samlet.engine.overlays import CAPTION, FAINT, FINER, INK, MARGIN, PAPER, TRUTH, canvas_of, with_masks

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, UInt8


class SheetRow(NamedTuple):
    """An image and what each column shows of it, the ground truth first."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    columns: dict[str, Bool[np.ndarray, "M H W"]]
    notes: dict[str, str]  # what is said below a column, beside the number of masks


def save_mask_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write the sheet as a PNG: every mask in a colour of its own, smaller ones on top, their number below.

    Raises:
        SamletError: the file cannot be written.
    """
    cells = [[(canvas_of(row.image), _shortened(row.name), ""), *_columns(row)] for row in rows]
    width = max(picture.width for line in cells for picture, *_ in line)
    heights = [max(picture.height for picture, *_ in line) for line in cells]
    margin, caption = MARGIN * FINER, CAPTION * FINER
    size = (len(cells[0]) * (width + margin) + margin, sum(height + margin + caption for height in heights) + caption)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", *rows[0].columns)):
        where = (margin + column * (width + margin), caption)
        draw.text(where, title, font=ImageFont.load_default(17 * FINER), fill=INK, anchor="ls")
    top = caption + margin
    for line, height in zip(cells, heights, strict=True):
        for column, (picture, left_text, right_text) in enumerate(line):
            left = margin + column * (width + margin)
            sheet.paste(picture, (left, top))
            _write(draw, (left, top + picture.height + caption // 2), picture.width, left_text, right_text)
        top += height + margin + caption
    smooth = sheet.resize((sheet.width // FINER, sheet.height // FINER), Image.Resampling.LANCZOS)
    write_file(path, lambda place: smooth.save(place, format="PNG", optimize=True))


def _columns(row: SheetRow) -> list[tuple[Image.Image, str, str]]:
    canvas = canvas_of(row.image)
    return [
        (
            with_masks(canvas, masks),
            _counted(len(masks), "object" if name == TRUTH else "mask"),
            row.notes.get(name, ""),
        )
        for name, masks in row.columns.items()
    ]


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, left: str, right: str) -> None:
    font = ImageFont.load_default(14 * FINER)
    draw.text(at, left, font=font, fill=INK, anchor="lm")
    draw.text((at[0] + width, at[1]), right, font=font, fill=FAINT, anchor="rm")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _shortened(name: str, most: int = 36) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
