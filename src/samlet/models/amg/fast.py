"""The fast form: few clicks first, and only what may stay is ever brought to the image's size.

1. Clicks in stages: every fourth point along each side, every second, all. A point is not clicked where a confident
   mask of an earlier stage lies. (Hierarchical prompting as in TinySAM, arXiv:2312.13789, there in two stages.)
2. Stability on the low-res grid, with a margin under the threshold.
3. Duplicates by low-res boxes, with slack over the threshold. What survives is enlarged and measured exactly, and takes
   part with its own box from then on; what fails there gives free what it had suppressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from samlet.frames import LOW_RES_STRIDE
from samlet.models.amg.boxes import boxes_of, nms
from samlet.models.amg.candidates import candidates
from samlet.models.amg.found import Found
from samlet.models.amg.points import coarse_to_fine
from samlet.models.amg.regions import stability

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from samlet.models.amg.candidates import Candidates
    from samlet.models.amg.full_size import Enlarger
    from samlet.models.amg.predicting import PointPredictor
    from samlet.models.amg.regions import Rle

STRIDES = (4, 2)
STABILITY_MARGIN = 0.1  # the low-res grid shows a small mask's stability roughly,
BOX_SLACK = 0.1  # and its box by a cell or so


class Pool(NamedTuple):
    """Candidates of a crop: enlarged ones (`exact`) have run lengths, the others logits."""

    low_res: list[Tensor | None]
    rles: list[Rle | None]
    boxes: Float[np.ndarray, "n 4"]
    iou: Float[np.ndarray, "n"]
    stability: Float[np.ndarray, "n"]
    point: Int[np.ndarray, "n"]
    exact: Bool[np.ndarray, "n"]

    def take(self, rows: Int[np.ndarray, "k"]) -> Pool:
        """Some rows, in this order."""
        low_res, rles, *columns = self
        return Pool([low_res[i] for i in rows], [rles[i] for i in rows], *(column[rows] for column in columns))

    def joined(self, other: Pool) -> Pool:
        """Both, in the order of their points."""
        columns = [np.concatenate([mine, theirs]) for mine, theirs in zip(self[2:], other[2:], strict=True)]
        both = Pool(self.low_res + other.low_res, self.rles + other.rles, *columns)
        return both.take(np.argsort(both.point, kind="stable"))


def search_coarse_to_fine(
    predictor: PointPredictor,
    grid: Float[np.ndarray, "P 2"],
    points: Float[np.ndarray, "P 2"],
    enlarge: Enlarger,
) -> Found:
    """The masks of a crop; `grid` are its points over the unit square, `points` the same in its pixels."""
    pool = settled(nothing(), enlarge)
    cells = cells_of(points, enlarge)
    covered = np.zeros(len(points), dtype=bool)
    for stage in coarse_to_fine(grid, STRIDES):
        for found in candidates(predictor, points, stage[~covered[stage]], enlarge.settings):
            fresh, sure = looked_over(found, enlarge)
            covered |= lies_in(found.low_res[torch.from_numpy(sure).to(found.low_res.device)], cells)
            pool = pool.joined(fresh)
            if sum(logits.nbytes for logits in pool.low_res if logits is not None) > enlarge.memory_budget:
                pool = settled(pool, enlarge)
    pool = settled(pool, enlarge)
    count = len(pool.iou)
    clicks = points[pool.point] + np.array(enlarge.crop[:2])
    crops = np.tile(np.array(enlarge.crop.box, np.float32), (count, 1))
    rles = [rle for rle in pool.rles if rle is not None]
    return Found(rles, pool.boxes, pool.iou, pool.stability, clicks.astype(np.float32), crops)


def settled(pool: Pool, enlarge: Enlarger) -> Pool:
    """Those that stay, all of them enlarged, the best estimate first."""
    while True:
        slack = np.where(pool.exact, 0, BOX_SLACK)
        kept = nms(pool.boxes, pool.iou, enlarge.settings.box_nms_thresh, slack)
        fresh = kept[~pool.exact[kept]]
        if not len(fresh):
            return pool.take(kept)
        full = enlarge(torch.stack([logits for i in fresh if (logits := pool.low_res[i]) is not None]))
        pool.exact[fresh], pool.boxes[fresh], pool.stability[fresh] = True, full.boxes, full.stability
        for i, rle in zip(fresh[full.passed], full.rles, strict=True):
            pool.low_res[i], pool.rles[i] = None, rle
        pool = pool.take(np.setdiff1d(np.arange(len(pool.iou)), fresh[~full.passed]))


def looked_over(found: Candidates, enlarge: Enlarger) -> tuple[Pool, Bool[np.ndarray, "n"]]:
    """Candidates that may be stable enough, with their low-res boxes in the image; and which of all surely are."""
    height, width = (-(-side // LOW_RES_STRIDE) for side in enlarge.input_size)
    image = found.low_res[:, :height, :width]  # what lies beyond is padding
    settings = enlarge.settings
    measured = stability(image, settings.stability_score_offset).cpu().numpy()
    wanted = settings.stability_score_thresh
    sure, may = measured >= wanted, measured >= wanted - STABILITY_MARGIN
    if wanted <= 0:
        sure = may = np.ones(len(measured), dtype=bool)
    rows = np.flatnonzero(may)
    here = torch.from_numpy(rows).to(image.device)
    count = len(rows)
    pool = Pool(
        list(found.low_res[here]),
        [None] * count,
        in_image(boxes_of(image[here] > 0), enlarge),
        found.iou[rows],
        measured[rows],
        found.point[rows],
        np.zeros(count, dtype=bool),
    )
    return pool, sure


def in_image(boxes: Float[np.ndarray, "n 4"], enlarge: Enlarger) -> Float[np.ndarray, "n 4"]:
    """Boxes of low-res cells as boxes of the pixels that these cover."""
    x0, y0, x1, y1 = enlarge.crop.box
    scale = LOW_RES_STRIDE * np.array([(x1 - x0) / enlarge.input_size[1], (y1 - y0) / enlarge.input_size[0]])
    first, last = boxes[:, :2] * scale, (boxes[:, 2:] + 1) * scale - 1
    placed = np.concatenate([first, np.clip(last, first, [x1 - x0 - 1, y1 - y0 - 1])], axis=1)
    return (placed + np.array([x0, y0, x0, y0])).astype(np.float32)


def cells_of(points: Float[np.ndarray, "P 2"], enlarge: Enlarger) -> Int[np.ndarray, "P 2"]:
    """The low-res cell (column, row) that each point lies in."""
    x0, y0, x1, y1 = enlarge.crop.box
    scale = np.array([enlarge.input_size[1] / (x1 - x0), enlarge.input_size[0] / (y1 - y0)])
    last = enlarge.image_size // LOW_RES_STRIDE - 1
    return np.clip(points * scale / LOW_RES_STRIDE, 0, last).astype(np.int64)


def lies_in(low_res: Float[Tensor, "n h w"], cells: Int[np.ndarray, "P 2"]) -> Bool[np.ndarray, "P"]:
    """Which cells any of the masks covers."""
    columns, rows = torch.from_numpy(cells).to(low_res.device).unbind(1)
    return np.asarray((low_res[:, rows, columns] > 0).any(dim=0).cpu())


def nothing() -> Pool:
    """No candidates."""
    columns = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Pool([], [], *columns, np.zeros(0, np.int64), np.zeros(0, dtype=bool))
