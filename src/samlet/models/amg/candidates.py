"""Low-res masks that a grid of clicks gives, before anything is brought to the image's size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from torch import Tensor

    from samlet.models.amg.predicting import PointPredictor
    from samlet.models.amg.settings import AmgSettings


class Candidates(NamedTuple):
    """n masks on the low-res grid, the click that each answers as a row of the grid of points, and their estimates."""

    low_res: Float[Tensor, "n h w"]
    point: Int[np.ndarray, "n"]
    iou: Float[np.ndarray, "n"]


def candidates(
    predictor: PointPredictor,
    points: Float[np.ndarray, "P 2"],
    rows: Int[np.ndarray, "k"],
    settings: AmgSettings,
) -> Iterator[Candidates]:
    """What `rows` of the points, (x, y) in pixels of the crop, give with estimates above the threshold, by batches."""
    min_iou = settings.pred_iou_thresh if settings.pred_iou_thresh > 0 else None
    for start in range(0, len(rows), settings.points_per_batch):
        batch = rows[start : start + settings.points_per_batch]
        answers = predictor.at_points(points[batch], min_iou)
        iou = answers.iou.flatten()
        low_res = answers.low_res_logits.flatten(0, 1)
        point = batch[answers.rows.cpu().numpy()].repeat(answers.iou.shape[1])
        if min_iou is None:
            yield Candidates(low_res, point, iou.cpu().numpy())
        else:
            above = iou > min_iou
            yield Candidates(low_res[above], point[above.cpu().numpy()], iou[above].cpu().numpy())
