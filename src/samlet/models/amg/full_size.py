"""From low-res logits to masks of the image, a few at a time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from samlet.frames import postprocess_masks
from samlet.models.amg import boxes as box
from samlet.models.amg import regions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from samlet.models.amg.boxes import Crop
    from samlet.models.amg.regions import Rle
    from samlet.models.amg.settings import AmgSettings

CPU_BUDGET = 16 * 2**20  # more goes through main memory, and takes half as long again


class FullSize(NamedTuple):
    """Of n candidates: the run lengths of those that pass, and of all whether they do, stability and boxes."""

    rles: list[Rle]
    passed: Bool[np.ndarray, "n"]
    stability: Float[np.ndarray, "n"]
    boxes: Float[np.ndarray, "n 4"]


class Enlarger(NamedTuple):
    """Makes candidates of one crop into masks of the image (H, W) = `size`."""

    crop: Crop
    size: tuple[int, int]
    input_size: tuple[int, int]
    image_size: int
    settings: AmgSettings
    memory_budget: int

    def __call__(self, low_res: Float[Tensor, "n h w"]) -> FullSize:
        """Masks where the enlarged logits exceed 0: not empty, stable enough, and not cut by an edge of the crop."""
        count = self.at_a_time(low_res.device)
        parts = [self._some(low_res[start : start + count]) for start in range(0, len(low_res), count)]
        none = FullSize([], np.zeros(0, dtype=bool), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
        rles, *columns = zip(none, *parts, strict=True)
        return FullSize(list(itertools.chain(*rles)), *map(np.concatenate, columns))

    def at_a_time(self, device: torch.device) -> int:
        """Masks whose logits, in the input frame and in the image, fit the memory budget; at least one."""
        budget = min(self.memory_budget, CPU_BUDGET) if device.type == "cpu" else self.memory_budget
        height, width = self.crop.y1 - self.crop.y0, self.crop.x1 - self.crop.x0
        return max(budget // (4 * (self.image_size**2 + height * width)), 1)

    def _some(self, low_res: Float[Tensor, "n h w"]) -> FullSize:
        crop, (height, width) = self.crop, self.size
        original = (crop.y1 - crop.y0, crop.x1 - crop.x0)
        logits = postprocess_masks(low_res[:, None], self.input_size, original, self.image_size)[:, 0]
        stability = regions.stability(logits, self.settings.stability_score_offset).cpu().numpy()
        masks = logits > 0
        boxes = box.boxes_of(masks) + np.array([crop.x0, crop.y0, crop.x0, crop.y0], np.float32)
        passed = ~box.cut_by_crop(boxes, crop, self.size) & (regions.pixels_of(masks) > 0).cpu().numpy()
        if self.settings.stability_score_thresh > 0:
            passed &= stability >= self.settings.stability_score_thresh
        by_column = masks[torch.from_numpy(passed).to(masks.device)].transpose(1, 2)
        around = (crop.y0, height - crop.y1, crop.x0, width - crop.x1)
        placed = F.pad(by_column, around).contiguous().cpu().numpy()
        return FullSize(regions.encode(placed) if len(placed) else [], passed, stability, boxes)
