"""Boxes of the automatic generator: crops of an image, boxes of masks, suppression of duplicates.

Boxes of masks are SAM's: (x0, y0, x1, y1) of the first and the last pixel; a mask n pixels wide has a box n - 1 wide.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

EDGE = 20.0  # pixels within which a box counts as touching the edge of its crop


class Crop(NamedTuple):
    """A part of an image that is searched by itself, in pixels of the image; layer 0 is the whole."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part without its layer."""
        return (self.x0, self.y0, self.x1, self.y1)


def crops_of(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[Crop]:
    """The image (H, W) and, in layer i, 2^i x 2^i overlapping parts of it, column by column.

    Neighbours overlap by `overlap_ratio` of the image's short side in layer 1, by half of that in each further one.
    Parts of an image so small that they hold no pixel are left out.
    """
    height, width = size
    crops = [Crop(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        across, down = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        for i, j in itertools.product(range(count), range(count)):
            x0, y0 = (across - overlap) * i, (down - overlap) * j
            if x0 < width and y0 < height:
                crops.append(Crop(x0, y0, min(x0 + across, width), min(y0 + down, height), layer))
    return crops


def boxes_of(masks: Bool[Tensor, "n H W"]) -> Float[np.ndarray, "n 4"]:
    """The box of each mask; zeros for one without a pixel."""
    sides = []
    for along in (1, 2):  # columns that hold a pixel, then rows
        held = masks.view(torch.uint8).amax(dim=along)  # on a CPU twenty times as fast as `any`
        last = held.shape[1] - 1 - held.flip(1).argmax(dim=1)
        sides += [held.argmax(dim=1), last * held.amax(dim=1)]
    x0, x1, y0, y1 = sides
    return torch.stack([x0, y0, x1, y1], dim=1).cpu().numpy().astype(np.float32)


def cut_by_crop(boxes: Float[np.ndarray, "n 4"], crop: Crop, size: tuple[int, int]) -> Bool[np.ndarray, "n"]:
    """Which boxes, in pixels of the image (H, W), touch an edge of the crop that is no edge of the image."""
    image = np.array([0, 0, size[1], size[0]], np.float32)
    at_crop = np.abs(boxes - np.array(crop.box, np.float32)) <= EDGE
    at_image = np.abs(boxes - image) <= EDGE
    touching: Bool[np.ndarray, "n"] = (at_crop & ~at_image).any(axis=1)
    return touching


def nms(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, "n"],
    threshold: float,
    slack: Float[np.ndarray, "n"] | None = None,
) -> Int[np.ndarray, "k"]:
    """Greedy suppression: rows by falling score, equal ones as they came, less those that overlap an earlier one.

    Two overlap when intersection / union > threshold + the larger `slack` of both; float32 as in torchvision.ops.nms,
    whose answer this is without slack. Boxes without area overlap nothing.
    """
    boxes = boxes.astype(np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    slack = np.zeros(len(boxes)) if slack is None else slack
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        inside = np.maximum(high - low, 0).prod(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = inside / (areas[best] + areas[left] - inside)
        left = left[~(iou.astype(np.float64) > threshold + np.maximum(slack[best], slack[left]))]
    return np.array(kept, dtype=np.int64)
