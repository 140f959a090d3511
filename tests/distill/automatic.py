"""Automatic masks made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from samlet.distill.kept_masks import MaskFacts
from samlet.models.amg import AmgSettings, AutomaticMasks

FACTS = MaskFacts.of("vit_b", "ab" * 32, 64, AmgSettings())


def block(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def found(masks: Sequence[np.ndarray], size: tuple[int, int]) -> AutomaticMasks:
    """As a generator would give them."""
    runs = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    rles = [{"size": list(run["size"]), "counts": run["counts"].decode()} for run in runs]
    count = len(masks)
    return AutomaticMasks(
        rles=rles,
        boxes=np.zeros((count, 4), np.float32),
        area=np.array([int(mask.sum()) for mask in masks], np.int64),
        predicted_iou=np.linspace(0.9, 1.0, count, dtype=np.float32),
        stability_score=np.full(count, 0.97, np.float32),
        points=np.full((count, 2), 1.5, np.float32),
        size=size,
        crop_boxes=np.zeros((count, 4), np.float32),
    )
