"""What the automatic generator found, while it works and as it hands it over."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samlet.models.amg import regions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int

    from samlet.models.amg.regions import Rle


class Found(NamedTuple):
    """n masks in pixels of the whole image; boxes (x0, y0, x1, y1) of the first and the last pixel."""

    rles: list[Rle]
    boxes: Float[np.ndarray, "n 4"]
    iou: Float[np.ndarray, "n"]
    stability: Float[np.ndarray, "n"]
    points: Float[np.ndarray, "n 2"]
    crops: Float[np.ndarray, "n 4"]

    def take(self, rows: Int[np.ndarray, "k"] | Bool[np.ndarray, "n"]) -> Found:
        """Some rows, in this order."""
        numbers = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        rles, *columns = self
        return Found([rles[i] for i in numbers], *(column[numbers] for column in columns))


class AutomaticMasks(NamedTuple):
    """The n masks of an image (H, W) = `size`, the best first, as SAM's generator orders them."""

    rles: list[Rle]
    """Compressed COCO run lengths: `size` [H, W], `counts` as text."""
    boxes: Float[np.ndarray, "n 4"]
    """(x, y, w, h) as SAM gives them: from the first pixel to the last, so w is one less than the pixels in between."""
    area: Int[np.ndarray, "n"]
    predicted_iou: Float[np.ndarray, "n"]
    stability_score: Float[np.ndarray, "n"]
    points: Float[np.ndarray, "n 2"]
    """The click (x, y) that gave each mask."""
    size: tuple[int, int]
    crop_boxes: Float[np.ndarray, "n 4"]
    """(x, y, w, h) of the part of the image that it was found in."""


def joined(parts: Sequence[Found]) -> Found:
    """One after the other; no parts, no masks."""
    rles, *columns = zip(nothing(), *parts, strict=True)
    return Found(list(itertools.chain(*rles)), *map(np.concatenate, columns))


def nothing() -> Found:
    """No masks."""
    return Found([], *(np.zeros(shape, np.float32) for shape in ((0, 4), 0, 0, (0, 2), (0, 4))))


def to_xywh(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """(x, y, w, h) of (x0, y0, x1, y1)."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def handed_over(found: Found, size: tuple[int, int]) -> AutomaticMasks:
    """The typed form of what was found in an image (H, W)."""
    return AutomaticMasks(
        rles=found.rles,
        boxes=to_xywh(found.boxes),
        area=regions.areas(found.rles),
        predicted_iou=found.iou,
        stability_score=found.stability,
        points=found.points,
        size=size,
        crop_boxes=to_xywh(found.crops),
    )
