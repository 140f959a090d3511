"""Masks as pixels and as run lengths; their stability; small holes and islands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

_TOUCHING = np.ones((3, 3), dtype=bool)  # pixels that meet at a corner are one region

Rle = dict[str, Any]
"""COCO's compressed run lengths: `size` [H, W], `counts` as text."""


def stability(logits: Float[Tensor, "n H W"], offset: float) -> Float[Tensor, "n"]:
    """Share of the mask at cut-off -offset that is left at +offset: their IoU, as one holds the other; NaN: no mask."""
    inner, outer = (pixels_of(logits > level) for level in (offset, -offset))
    return inner / outer


def pixels_of(masks: Bool[Tensor, "n H W"]) -> Int[Tensor, "n"]:
    """How many pixels each mask has."""
    if masks.device.type == "cpu":  # summing truth values, torch takes ten times as long
        return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int64)
    return masks.flatten(1).sum(dim=1)


def encode(masks: Bool[np.ndarray, "n W H"]) -> list[Rle]:
    """Run lengths of masks that lie column by column, as COCO counts them: nothing is copied."""
    found = coco_mask.encode(masks.view(np.uint8).T)
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in found]


def decode(rle: Rle) -> Bool[np.ndarray, "H W"]:
    """The pixels of a mask."""
    height, width = rle["size"]
    runs = _runs(rle)
    by_column = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)
    return np.ascontiguousarray(by_column.T)


def counts(rle: Rle) -> list[int]:
    """The plain run lengths: pixels outside, inside, outside, ... column by column, the first of them perhaps 0."""
    return [int(run) for run in _runs(rle)]


def areas(rles: list[Rle]) -> Int[np.ndarray, "n"]:
    """Pixels of each mask."""
    return np.array([int(coco_mask.area(rle)) for rle in rles], np.int64)  # pycocotools fails on 256 and more at once


def _runs(rle: Rle) -> Int[np.ndarray, "runs"]:
    """COCO's text as numbers: five bits a character, low ones first; from the fourth on, less the one two before.

    pycocotools can decode too, but what it does with arrays is deprecated in NumPy 2.
    """
    codes = np.frombuffer(rle["counts"].encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((codes & 0x1F) << (5 * digit), starts)
    runs -= np.where(codes[ends] & 0x10, 1 << (5 * (ends - starts + 1)), 0)  # the last character bears the sign
    for step in (runs[1::2], runs[2::2]):
        np.cumsum(step, out=step)
    return runs


def without_small_regions(mask: Bool[np.ndarray, "H W"], area: float) -> tuple[Bool[np.ndarray, "H W"], bool]:
    """The mask with holes under `area` pixels filled and islands under it gone, and whether there were any.

    The largest island stays, however small. Regions are connected across corners, as in SAM.
    """
    holes, sizes = _regions(~mask)
    small_holes = sizes < area
    small_holes[0] = False
    filled = mask | small_holes[holes] if small_holes.any() else mask
    islands, sizes = _regions(filled)
    small = sizes < area
    small[0] = False
    changed = bool(small_holes.any() or small.any())
    if not small.any():
        return filled, changed
    kept = ~small
    kept[0] = False
    if not kept.any():
        kept[1 + int(np.argmax(sizes[1:]))] = True
    return kept[islands], changed


def _regions(pixels: Bool[np.ndarray, "H W"]) -> tuple[Int[np.ndarray, "H W"], Int[np.ndarray, "regions"]]:
    """Numbered regions, 0 where there is none, and the pixels of each."""
    labels, _ = ndimage.label(pixels, structure=_TOUCHING)
    return labels, np.bincount(labels.ravel())
