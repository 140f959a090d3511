"""Low-res masks that a grid of clicks gives, before anything is brought to the image's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from samlet.models.amg.predicting import PointPredictor


class Candidates(NamedTuple):
    """n masks on the low-res grid, the click that each answers as a row of the grid of points, and their estimates."""

    low_res: Float[Tensor, "n h w"]
    point: Int[np.ndarray, "n"]
    iou: Float[np.ndarray, "n"]

    def take(self, rows: Bool[np.ndarray, "n"]) -> Candidates:
        """Those that are marked."""
        if rows.all():
            return self
        return Candidates(
            self.low_res[torch.from_numpy(rows).to(self.low_res.device)], self.point[rows], self.iou[rows]
        )


def candidates(
    predictor: PointPredictor,
    points: Float[np.ndarray, "P 2"],
    rows: Int[np.ndarray, "k"],
    at_a_time: int,
    min_iou: float | None,
) -> Iterator[Candidates]:
    """What `rows` of the points, (x, y) in pixels of the crop, give with estimates above `min_iou`, by batches."""
    for start in range(0, len(rows), at_a_time):
        batch = rows[start : start + at_a_time]
        answers = predictor.at_points(points[batch], min_iou)
        iou = answers.iou.flatten().cpu().numpy()
        point = batch[answers.rows.cpu().numpy()].repeat(answers.iou.shape[1])
        found = Candidates(answers.low_res_logits.flatten(0, 1), point, iou)
        yield found if min_iou is None else found.take(iou > min_iou)
