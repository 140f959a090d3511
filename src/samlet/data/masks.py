"""Masks as booleans, whatever numbers they were stored with, and what is measured on them: box and centre."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlet.data.images import read_values
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer

_CLEAR = 0.8  # of a soft-edged mask's pixels are fully in or fully out
VOID = 255  # Pascal VOC's border value in 8-bit label images


def check_size(path: str | Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    """Refuse a mask that is not the image's size.

    Raises:
        DataError: it is not.
    """
    if found != size:
        turned = (
            " (turned: the image's EXIF orientation is applied, so turn the mask too)" if found == size[::-1] else ""
        )
        raise DataError(
            f"{path}: the mask is {found[1]} x {found[0]} pixels but its image is {size[1]} x {size[0]}{turned}; "
            "save it at the image's size"
        )


def single_channel(values: np.ndarray) -> Integer[np.ndarray, "H W"]:
    """One number per pixel: colours give their largest channel, or alpha where only alpha differs."""
    if values.ndim == 2:
        return values.astype(np.uint8) if values.dtype == np.bool_ else values
    colours = values[..., :3] if values.shape[2] > 2 else values[..., :1]
    if values.shape[2] in {2, 4} and (colours == colours[:1, :1]).all():
        return np.asarray(values[..., -1])
    return np.asarray(colours.max(axis=2))


def binarize(values: np.ndarray) -> Bool[np.ndarray, "H W"]:
    """Foreground is what exceeds half of the largest value: right for 0/1, 0/255, 16 bits and soft edges."""
    channel = single_channel(values)
    foreground: Bool[np.ndarray, "H W"] = channel > channel.max(initial=0) / 2
    return foreground


def value_counts(values: Integer[np.ndarray, "H W"]) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur, rising, and how often; bytes are counted rather than sorted."""
    if values.dtype != np.uint8:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel(), minlength=256)
    present = np.flatnonzero(counts)
    return present, counts[present]


def holds_labels(values: np.ndarray) -> bool:
    """Whether a mask image numbers several objects, rather than showing one with soft edges.

    Soft edges have 255 at the top and little in between; numbers that run from 1 without a gap are labels.
    """
    if values.ndim == 3 or values.dtype == np.bool_ or not ((values > 0) & (values < values.max())).any():
        return False
    present, counts = value_counts(values)
    between = present[(present > 0) & (present < VOID)]
    numbered = len(between) < VOID // 2 and np.array_equal(between, np.arange(1, len(between) + 1))
    clear = int(counts[(present == 0) | (present == VOID)].sum())
    soft_edged = values.dtype == np.uint8 and present[-1] == VOID and clear >= _CLEAR * values.size
    return numbered or not soft_edged


def read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """One object's mask file.

    Raises:
        DataError: it cannot be read, has another size than the image (H, W), numbers objects, or shows nothing.
    """
    values = read_values(path)
    check_size(path, (values.shape[0], values.shape[1]), size)
    if holds_labels(values):
        raise DataError(
            f"{path}: holds several values, as if it numbered objects; set dataset.format to instance_labels, "
            "or save one black-and-white file an object"
        )
    mask = binarize(values)
    if not mask.any():
        raise DataError(f"{path}: the mask is empty; remove the file")
    return mask


def object_labels(labels: Integer[np.ndarray, "H W"]) -> list[int]:
    """The numbers of the objects in a label image: all but 0, and but 255 where 8 bits mean it as void.

    255 is void (Pascal VOC's border) when other objects are there and 254 is not: numbers that run through to
    255 are objects all.
    """
    present = [int(value) for value in value_counts(labels)[0] if value != 0]
    void = labels.dtype == np.uint8 and VOID in present and len(present) > 1 and VOID - 1 not in present
    return [value for value in present if not (void and value == VOID)]


def mask_box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) around a mask that is not empty, from pixel edge to pixel edge.

    A single pixel (x, y) has the box (x, y, x + 1, y + 1): no mask gives a box without area.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(np.bitwise_or.reduce(mask[top:bottom], axis=0))
    return int(columns[0]), top, int(columns[-1]) + 1, bottom


def centre_point(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int]:
    """The pixel (x, y) farthest inside a mask: the largest Euclidean distance to what is not the object.

    What lies beyond the image's border is not the object. Of several equally deep pixels the one nearest to
    their mean wins, then the upper, then the left one.
    """
    from scipy.ndimage import distance_transform_edt

    x0, y0, x1, y1 = mask_box(mask)
    depth = distance_transform_edt(np.pad(mask[y0:y1, x0:x1], 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= depth.max() - 1e-6)
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(np.argmin(np.round(distance, 6)))
    return x0 + int(columns[best]), y0 + int(rows[best])
