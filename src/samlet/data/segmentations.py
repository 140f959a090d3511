"""COCO's three ways to write one mask (polygons, counted runs, compressed runs), checked before C code sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool

_FAR = 4  # polygons may reach this many image sides beyond the image; rasterising costs time by their length


def flaw(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a segmentation for an image of (H, W), or None; cheap, nothing is decoded."""
    if isinstance(segmentation, list):
        return _polygons_flaw(segmentation, size)
    if isinstance(segmentation, dict):
        return _runs_flaw(segmentation, size)
    return "its segmentation is neither polygons nor runs (RLE)"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _polygons_flaw(polygons: list[Any], size: tuple[int, int]) -> str | None:
    if not polygons:
        return "its segmentation is empty"
    far = _FAR * max(size)
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
            return "its polygon holds something else than numbers (NaN counts)"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"its polygon has {len(polygon)} numbers; at least 3 points (6 numbers) are needed, in pairs"
        if max(map(abs, polygon)) > far:
            return "its polygon reaches far beyond the image"
    return None


def _runs_flaw(runs: dict[str, Any], size: tuple[int, int]) -> str | None:
    if runs.get("size") != list(size):
        return f"its RLE is for size {runs.get('size')}, the image has [height, width] {list(size)}"
    counts = runs.get("counts")
    if isinstance(counts, str):
        try:
            counts = decode_counts(counts)
        except ValueError as error:
            return f"its compressed RLE is damaged ({error})"
    elif not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        return "its RLE counts are not a list of non-negative integers"
    if sum(counts) != size[0] * size[1]:
        return f"its RLE counts {sum(counts)} pixels, the image has {size[0] * size[1]}"
    return None


def decode_counts(text: str) -> list[int]:
    """Run lengths of COCO's compressed RLE: base 32 with continuation bits, from the third as differences.

    Raises:
        ValueError: the text is cut off, holds foreign characters, or runs backwards.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(f"foreign character {character!r}")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        if counts[-1] < 0:
            raise ValueError("a run of negative length")
        value = shift = 0
    if shift:
        raise ValueError("it ends within a number")
    return counts


def _runs_to_mask(counts: Sequence[int], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[1], size[0]).T  # runs go down the columns


def to_mask(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of a segmentation that `flaw` found nothing wrong with."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return _runs_to_mask(decode_counts(counts) if isinstance(counts, str) else counts, size)
    from pycocotools import mask as coco_mask

    runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    return _runs_to_mask(decode_counts(runs["counts"].decode()), size)


class Segmentations(NamedTuple):
    """The masks of one image as an annotation file writes them."""

    items: Sequence[tuple[str, Any]]  # (where it is written, segmentation)
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """The file and the annotation's id in it."""
        return self.items[index][0]

    def read(self, index: int) -> Bool[np.ndarray, "H W"]:
        """Decode one segmentation."""
        name, segmentation = self.items[index]
        reason = flaw(segmentation, self.size)
        if reason is not None:
            raise DataError(f"{name}: {reason}; mend or remove the annotation")
        mask = to_mask(segmentation, self.size)
        if not mask.any():
            raise DataError(f"{name}: the mask is empty; remove the annotation")
        return mask
