"""Pictures of masks: the image, the prompt, and one panel for each opinion on what the object is. PIL alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from samlet.artefacts import write_file
from samlet.types import POSITIVE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (0, 168, 150), (240, 84, 84), (106, 90, 224), (255, 170, 30), (20, 132, 230), (232, 72, 160),
    (110, 186, 60), (150, 104, 70), (60, 200, 230), (200, 110, 240), (250, 128, 70), (90, 120, 150),
)  # fmt: skip
PAPER, INK, FAINT, WHITE, SHADOW = (250, 250, 248), (38, 40, 46), (120, 124, 132), (255, 255, 255), (20, 22, 26)
POSITIVE_COLOUR, NEGATIVE_COLOUR, BOX_COLOUR = (34, 190, 84), (228, 52, 52), (255, 214, 10)

PANEL = 320  # longest side of a panel
FINER = 2  # everything is drawn this much larger, so that edges come out smooth
MARGIN, CAPTION = 14, 34
FILL = 0.42
CROWD = 12  # more points than these are drawn smaller
TRUTH = "ground truth"


class DrawnPrompts(NamedTuple):
    """What the user pointed at, in pixels of the original frame."""

    points: Float[np.ndarray, "N 2"] = np.zeros((0, 2), np.float32)
    labels: Int[np.ndarray, "N"] | None = None  # None: all positive
    boxes: Float[np.ndarray, "K 4"] = np.zeros((0, 4), np.float32)


def save_overlay(
    path: Path,
    image: UInt8[np.ndarray, "H W 3"],
    prompts: DrawnPrompts,
    panels: Mapping[str, Bool[np.ndarray, "O H W"] | Bool[np.ndarray, "H W"]],
) -> None:
    """One row as a PNG: the image, the prompt, then each panel's masks, an object in the same colour throughout.

    Where there is a panel "ground truth", the others' captions say their mean IoU with it over the O objects.

    Raises:
        ValueError: masks that are not of the image's size, or not as many as those of the ground truth.
        SamletError: the file cannot be written.
    """
    masks = {name: value.reshape(-1, *value.shape[-2:]) for name, value in panels.items()}
    _check(image, masks)
    canvas = canvas_of(image)
    pictures = [(canvas, "image", ""), (_with_prompts(canvas, image, prompts), "prompt", "")]
    truth = masks.get(TRUTH)
    for name, value in masks.items():
        iou = "" if truth is None or name == TRUTH or not len(truth) else f"IoU {mean_iou(value, truth):.2f}"
        pictures.append((with_masks(canvas, value), name, iou))
    sheet = _row(pictures)
    write_file(path, lambda place: sheet.save(place, format="PNG", optimize=True))


def save_answer(
    path: Path, image: UInt8[np.ndarray, "H W 3"], prompts: DrawnPrompts, mask: Bool[np.ndarray, "H W"]
) -> None:
    """One picture as a PNG, at the image's own size where that is legible: mask and prompt over the image.

    Raises:
        ValueError: a mask that is not of the image's size.
        SamletError: the file cannot be written.
    """
    _check(image, {"mask": mask[None]})
    canvas = canvas_of(image, min(max(*image.shape[:2], 640), 2048))
    drawn = _with_prompts(with_masks(canvas, mask[None]), image, prompts)
    size = (drawn.width // FINER, drawn.height // FINER)
    smooth = drawn.resize(size, Image.Resampling.LANCZOS)
    write_file(path, lambda place: smooth.save(place, format="PNG", optimize=True))


def save_numbered(path: Path, image: UInt8[np.ndarray, "H W 3"], labels: Int[np.ndarray, "H W"]) -> None:
    """One picture as a PNG: the image under translucent, outlined regions, a colour a number, 0 left as it is.

    Raises:
        ValueError: numbers that are not of the image's size.
        SamletError: the file cannot be written.
    """
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels must be of the image's size {image.shape[:2]}, got {labels.shape}")
    canvas = canvas_of(image, min(max(*image.shape[:2], 640), 1280))
    finer = Image.fromarray(labels.astype(np.int32)).resize(canvas.size, Image.Resampling.NEAREST)
    numbers, pixels = np.asarray(finer), np.asarray(canvas).astype(np.float32)
    colours = np.array(PALETTE, np.float32)[(numbers - 1) % len(PALETTE)]
    opacity = np.where(_edges(numbers), 1.0, FILL) * (numbers > 0)
    blended = pixels + (colours - pixels) * opacity[..., None].astype(np.float32)
    drawn = Image.fromarray(blended.round().astype(np.uint8))
    smooth = drawn.resize((canvas.width // FINER, canvas.height // FINER), Image.Resampling.LANCZOS)
    write_file(path, lambda place: smooth.save(place, format="PNG"))


def _edges(numbers: Int[np.ndarray, "H W"], width: int = 2) -> Bool[np.ndarray, "H W"]:
    """Where a pixel's number differs from one up to `width` pixels away."""
    found = np.zeros(numbers.shape, np.bool_)
    for step in range(1, width + 1):
        across, down = numbers[:, step:] != numbers[:, :-step], numbers[step:] != numbers[:-step]
        found[:, step:] |= across
        found[:, :-step] |= across
        found[step:] |= down
        found[:-step] |= down
    return found


def mean_iou(masks: Bool[np.ndarray, "O H W"], truth: Bool[np.ndarray, "O H W"]) -> float:
    """Mean over objects of intersection over union; 0 where both are empty."""
    both = (masks & truth).sum(axis=(1, 2))
    either = (masks | truth).sum(axis=(1, 2))
    return float((both / np.maximum(either, 1)).mean())


def with_masks(canvas: Image.Image, masks: Bool[np.ndarray, "O H W"]) -> Image.Image:
    """The canvas with translucent masks under thin outlines; smaller masks lie on top."""
    picture = canvas.copy()
    order = np.argsort(-masks.sum(axis=(1, 2)), kind="stable")
    for number in order:
        if masks[number].any():
            _paint(picture, masks[number], PALETTE[int(number) % len(PALETTE)])
    return picture


def _check(image: np.ndarray, masks: Mapping[str, np.ndarray]) -> None:
    for name, value in masks.items():
        if value.shape[1:] != image.shape[:2]:
            raise ValueError(f"'{name}' must be of the image's size {image.shape[:2]}, got {value.shape}")
        if TRUTH in masks and len(value) != len(masks[TRUTH]):
            raise ValueError(f"'{name}' has {len(value)} masks and the ground truth {len(masks[TRUTH])}")


def canvas_of(image: UInt8[np.ndarray, "H W 3"], longest: int = PANEL) -> Image.Image:
    """The image at the size that is drawn on: `FINER` times that of the panel."""
    scale = longest * FINER / max(image.shape[:2])
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    return Image.fromarray(image).convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _paint(picture: Image.Image, mask: Bool[np.ndarray, "H W"], colour: Colour) -> None:
    """Fill and outline one mask; its edge is smoothed where the canvas is finer than the mask."""
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    shape = soft.point([255 * (value > 127) for value in range(256)])
    found = shape.getbbox()
    if found is None:
        return
    left, top, right, bottom = found[0] - 2, found[1] - 2, found[2] + 2, found[3] + 2
    near = shape.crop((left, top, right, bottom))  # black beyond the canvas
    corner = (max(left, 0), max(top, 0))
    inside = (corner[0] - left, corner[1] - top, min(right, picture.width) - left, min(bottom, picture.height) - top)
    inner, outer = near.filter(ImageFilter.MinFilter(5)), near.filter(ImageFilter.MaxFilter(3))
    rim = ImageChops.subtract(outer, near)
    line = ImageChops.subtract(near, inner)
    for stencil, tint, opacity in ((near, colour, FILL), (rim, WHITE, 0.75), (line, colour, 1.0)):
        faded = stencil.point([int(value * opacity) for value in range(256)]).crop(inside)
        picture.paste(Image.new("RGB", faded.size, tint), corner, mask=faded)


def _with_prompts(canvas: Image.Image, image: np.ndarray, prompts: DrawnPrompts) -> Image.Image:
    """Boxes with a dark rim, points as discs with a white ring: plus inside, minus outside."""
    picture = canvas.copy()
    draw = ImageDraw.Draw(picture)
    scale = picture.width / image.shape[1]
    unit = FINER * max(max(picture.size) / (PANEL * FINER), 1.0) ** 0.5
    for box in prompts.boxes * scale:
        corners = [float(edge) for edge in box]
        draw.rectangle(
            [c - unit if i < 2 else c + unit for i, c in enumerate(corners)], outline=SHADOW, width=round(3.5 * unit)
        )
        draw.rectangle(corners, outline=BOX_COLOUR, width=round(2 * unit))
    labels = [POSITIVE] * len(prompts.points) if prompts.labels is None else prompts.labels.tolist()
    unit *= 1.0 if len(prompts.points) <= CROWD else 0.55
    for (x, y), label in zip((prompts.points + 0.5) * scale, labels, strict=True):
        _draw_point(draw, float(x), float(y), unit, positive=label == POSITIVE)
    return picture


def _draw_point(draw: ImageDraw.ImageDraw, x: float, y: float, unit: float, *, positive: bool) -> None:
    for radius, colour in ((7.5, SHADOW), (6.8, WHITE), (5.2, POSITIVE_COLOUR if positive else NEGATIVE_COLOUR)):
        r = radius * unit
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    arm, half = 2.8 * unit, 0.7 * unit
    draw.rectangle((x - arm, y - half, x + arm, y + half), fill=WHITE)
    if positive:
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=WHITE)


def _row(pictures: Sequence[tuple[Image.Image, str, str]]) -> Image.Image:
    """Pictures side by side on paper, each with its name below on the left and its score on the right."""
    width, height = pictures[0][0].size
    cell, margin, caption = max(width, 150 * FINER), MARGIN * FINER, CAPTION * FINER
    sheet = Image.new("RGB", (len(pictures) * (cell + margin) + margin, height + margin + caption), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15 * FINER)
    for place, (picture, name, score) in enumerate(pictures):
        left = margin + place * (cell + margin) + (cell - width) // 2
        sheet.paste(picture, (left, margin))
        middle = margin + height + caption // 2
        draw.text((left, middle), name, font=font, fill=INK, anchor="lm")
        draw.text((left + width, middle), score, font=font, fill=FAINT, anchor="rm")
    return sheet.resize((sheet.width // FINER, sheet.height // FINER), Image.Resampling.LANCZOS)
