"""The fast form: few clicks first, and only what may stay is ever brought to the image's size.

1. On grids of 16 x 16 and more, clicks in stages: every third point along each side, then the others; of these none
   where a confident mask lies (hierarchical prompting as in TinySAM, arXiv:2312.13789), and none whose neighbours of
   the first stage saw nothing hopeful: no mask at the click, or next to it, of nearly the wanted estimate.
2. Stability on the low-res grid, with a margin under the threshold.
3. Duplicates by low-res boxes, with slack over the threshold. What survives is enlarged and measured exactly, and takes
   part with its own box from then on; what fails there gives free what it had suppressed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from samlet.frames import LOW_RES_STRIDE
from samlet.models.amg.boxes import boxes_of, nms
from samlet.models.amg.candidates import candidates
from samlet.models.amg.found import Found
from samlet.models.amg.points import coarse_to_fine, near
from samlet.models.amg.regions import stability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from samlet.models.amg.candidates import Candidates
    from samlet.models.amg.full_size import Enlarger
    from samlet.models.amg.predicting import PointPredictor
    from samlet.models.amg.regions import Rle

STRIDES = (3, 1)
LEAST_SIDE = 16  # points along each side from which they are clicked in stages: a coarser first stage sees too little
HOPE = 0.75  # share of the wanted estimate from which a mask says that there is something
CONFIDENCE = 0.5  # a mask that covers points is estimated so far from the wanted estimate to 1,
COVER = 0.1  # and no larger than this share of the crop: on a wall or a street there may be more to find
STABILITY_MARGIN = 0.2  # the low-res grid shows a small mask's stability roughly,
BOX_SLACK = 0.2  # and its box by a cell or so


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
    settings, wanted = enlarge.settings, enlarge.settings.min_iou
    cells = cells_of(points, enlarge)
    pool = nothing()
    asked, covered, hopeful = (np.zeros(len(points), dtype=bool) for _ in range(3))
    worth = ~asked
    strides = STRIDES if len(grid) >= LEAST_SIDE**2 else STRIDES[-1:]
    for stride, stage in zip(strides, coarse_to_fine(grid, strides), strict=True):
        rows = stage[worth[stage] & ~covered[stage]]
        asked[stage] = True
        min_iou = wanted if wanted is None or stride == STRIDES[-1] else HOPE * wanted
        for found in candidates(predictor, points, rows, settings.points_per_batch, min_iou):
            hopeful[found.point[at_click(found, cells)]] = True
            likely = looked_over(found if wanted is None else found.take(found.iou > wanted), enlarge)
            pool = pool.joined(likely)
            covered |= lies_in(covering(likely, enlarge), cells)
            if sum(logits.nbytes for logits in pool.low_res if logits is not None) > enlarge.memory_budget:
                pool = settled(pool, enlarge)
        worth = near(grid, asked, hopeful | covered, stride - 1)
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


def looked_over(found: Candidates, enlarge: Enlarger) -> Pool:
    """Candidates that may be stable enough, with their low-res boxes in the image."""
    image = unpadded(found.low_res, enlarge)
    settings = enlarge.settings
    measured = stability(image, settings.stability_score_offset).cpu().numpy()
    wanted = settings.stability_score_thresh
    rows = np.flatnonzero((measured >= wanted - STABILITY_MARGIN) | (wanted <= 0))
    here = torch.from_numpy(rows).to(image.device)
    count = len(rows)
    return Pool(
        list(found.low_res[here]),
        [None] * count,
        in_image(boxes_of(image[here] > 0), enlarge),
        found.iou[rows],
        measured[rows],
        found.point[rows],
        np.zeros(count, dtype=bool),
    )


def covering(pool: Pool, enlarge: Enlarger) -> list[Tensor]:
    """The candidates, none of them enlarged yet, under which no further point is clicked."""
    settings = enlarge.settings
    least = settings.pred_iou_thresh + CONFIDENCE * max(1 - settings.pred_iou_thresh, 0)
    sure = (pool.iou >= least) & (pool.stability >= settings.stability_score_thresh)
    chosen = [logits for logits, is_sure in zip(pool.low_res, sure, strict=True) if is_sure and logits is not None]
    return [logits for logits in chosen if (unpadded(logits, enlarge) > 0).float().mean() <= COVER]


def unpadded(low_res: Float[Tensor, "*n h w"], enlarge: Enlarger) -> Float[Tensor, "*n h w"]:
    """The part of low-res logits that the image takes up."""
    height, width = (-(-side // LOW_RES_STRIDE) for side in enlarge.input_size)
    return low_res[..., :height, :width]


def in_image(boxes: Float[np.ndarray, "n 4"], enlarge: Enlarger) -> Float[np.ndarray, "n 4"]:
    """Boxes of low-res cells as boxes of the pixels that these cover."""
    x0, y0, x1, y1 = enlarge.crop.box
    scale = LOW_RES_STRIDE * np.array([(x1 - x0) / enlarge.input_size[1], (y1 - y0) / enlarge.input_size[0]])
    first, last = boxes[:, :2] * scale, (boxes[:, 2:] + 1) * scale - 1
    placed = np.concatenate([first, np.clip(last, first, [x1 - x0 - 1, y1 - y0 - 1])], axis=1)
    return np.asarray(placed + np.array([x0, y0, x0, y0]), dtype=np.float32)


def cells_of(points: Float[np.ndarray, "P 2"], enlarge: Enlarger) -> Int[np.ndarray, "P 2"]:
    """The low-res cell (column, row) that each point lies in."""
    x0, y0, x1, y1 = enlarge.crop.box
    scale = np.array([enlarge.input_size[1] / (x1 - x0), enlarge.input_size[0] / (y1 - y0)])
    last = enlarge.image_size // LOW_RES_STRIDE - 1
    return np.asarray(np.clip(points * scale / LOW_RES_STRIDE, 0, last), dtype=np.int64)


def at_click(found: Candidates, cells: Int[np.ndarray, "P 2"]) -> Bool[np.ndarray, "n"]:
    """Which masks have a box that holds their own click, or passes it by no more than the grid's next point."""
    around, clicks = boxes_of(found.low_res > 0), cells[found.point]
    reach = np.ptp(cells, axis=0) / max(math.isqrt(len(cells)) - 1, 1)
    inside: Bool[np.ndarray, "n"] = ((clicks >= around[:, :2] - reach) & (clicks <= around[:, 2:] + reach)).all(axis=1)
    return inside


def lies_in(masks: Sequence[Float[Tensor, "h w"]], cells: Int[np.ndarray, "P 2"]) -> Bool[np.ndarray, "P"]:
    """Which cells any of the masks covers."""
    if not masks:
        return np.zeros(len(cells), dtype=bool)
    columns, rows = torch.from_numpy(cells).to(masks[0].device).unbind(1)
    return np.asarray((torch.stack(list(masks))[:, rows, columns] > 0).any(dim=0).cpu())


def nothing() -> Pool:
    """No candidates."""
    columns = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Pool([], [], *columns, np.zeros(0, np.int64), np.zeros(0, dtype=bool))
