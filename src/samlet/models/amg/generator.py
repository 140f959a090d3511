"""Masks of everything in an image, with the interface of SamAutomaticMaskGenerator. arXiv:2304.02643, section 7.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from samlet.errors import SamletError
from samlet.models.amg import regions
from samlet.models.amg.boxes import boxes_of, crops_of, nms
from samlet.models.amg.candidates import candidates
from samlet.models.amg.fast import search_coarse_to_fine
from samlet.models.amg.found import AutomaticMasks, Found, handed_over, joined
from samlet.models.amg.full_size import Enlarger
from samlet.models.amg.points import point_grids
from samlet.models.amg.predicting import PointPredictor, SamPredictor
from samlet.models.amg.settings import AmgSettings
from samlet.models.predictor import check_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, UInt8

    from samlet.models.amg.boxes import Crop
    from samlet.models.sam import Sam

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
MEMORY_BUDGET = 256 * 2**20


class AutomaticMaskGenerator:
    """Clicks a grid of points, keeps what is confident and stable, and removes duplicates.

    `fast=False` gives SAM's answer: every point is decoded; every mask whose estimated IoU passes is brought to the
    image's size; stability, boxes and duplicates are judged there. `fast=True` differs from it where

    * a point is not clicked because a mask from the coarser grid covers it that is confident (estimated half way from
      the threshold to 1, or higher), stable, and no larger than a tenth of the crop: of things in such a mask, those
      that only this point would have shown are missing, and the mask may not be the best that any click gives;
    * a point is not clicked because none of the coarser clicks around it gave a mask there that is estimated above 3/4
      of the threshold: a thing smaller than the coarser grid's meshes, a tenth of the side, may be missed;
    * a mask is dropped whose stability on the low-res grid is more than 0.2 under the threshold;
    * a mask is dropped as a duplicate whose low-res box overlaps a better one's by 0.2 more than the threshold.

    What is kept has, in either form, its exact mask, box, stability and estimate: no threshold is loosened.
    """

    predictor: PointPredictor

    def __init__(  # noqa: PLR0917 - SamAutomaticMaskGenerator's signature
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Float[np.ndarray, "n 2"]] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        *,
        fast: bool = True,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        """SamAutomaticMaskGenerator's arguments; AmgSettings explains them.

        `point_grids`, in place of `points_per_side`: points (x, y) over the unit square for the image and for the crops
        of each layer. `output_mode`: what `segmentation` is. `memory_budget`: bytes of logits at full size, and of
        low-res logits that wait; one mask is always made.

        Raises:
            SamletError: an argument out of range, both or neither kind of grid, an unknown output mode.
        """
        if (points_per_side is None) == (point_grids is None):
            raise SamletError("points_per_side and point_grids: give one of them and None for the other")
        if output_mode not in get_args(OutputMode):
            raise SamletError(f"output_mode '{output_mode}': must be one of {', '.join(get_args(OutputMode))}")
        self.settings = AmgSettings(
            points_per_side=AmgSettings.points_per_side if points_per_side is None else points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area,
            fast=fast,
        )
        self.point_grids = _grids(self.settings, point_grids)
        self.output_mode = output_mode
        self.memory_budget = memory_budget
        self.predictor = SamPredictor(model)

    @classmethod
    def of(cls, model: Sam, settings: AmgSettings, output_mode: OutputMode = "binary_mask") -> AutomaticMaskGenerator:
        """A generator of these settings."""
        return cls(model, **settings.as_dict(), output_mode=output_mode)

    def generate(self, image: UInt8[np.ndarray, "H W 3"]) -> list[dict[str, Any]]:
        """The masks of an RGB image, each a dictionary with SAM's keys.

        `segmentation` (H, W) of bool or run lengths, `area`, `bbox` (x, y, w, h), `predicted_iou`, `point_coords`
        [[x, y]], `stability_score`, `crop_box` (x, y, w, h).

        Raises:
            SamletError: not an (H, W, 3) array of uint8; a model in training mode.
        """
        found = self.find(image)
        shown: dict[str, Callable[[regions.Rle], Any]]
        shown = {"binary_mask": regions.decode, "uncompressed_rle": _plain_rle, "coco_rle": dict}
        return [
            {
                "segmentation": shown[self.output_mode](rle),
                "area": int(found.area[i]),
                "bbox": found.boxes[i].tolist(),
                "predicted_iou": float(found.predicted_iou[i]),
                "point_coords": [found.points[i].tolist()],
                "stability_score": float(found.stability_score[i]),
                "crop_box": found.crop_boxes[i].tolist(),
            }
            for i, rle in enumerate(found.rles)
        ]

    @torch.no_grad()
    def find(self, image: UInt8[np.ndarray, "H W 3"]) -> AutomaticMasks:
        """The masks of an RGB image, typed.

        Raises:
            SamletError: not an (H, W, 3) array of uint8; a model in training mode.
        """
        check_image(image)
        settings, size = self.settings, (image.shape[0], image.shape[1])
        crops = crops_of(size, settings.crop_n_layers, settings.crop_overlap_ratio)
        found = joined([self._search(image, crop) for crop in crops])
        if len(crops) > 1:
            sides = found.crops[:, 2:] - found.crops[:, :2]
            found = found.take(nms(found.boxes, 1 / sides.prod(axis=1), settings.crop_nms_thresh))
        if settings.min_mask_region_area > 0:
            found = self._without_small_regions(found)
        return handed_over(found, size)

    def _search(self, image: UInt8[np.ndarray, "H W 3"], crop: Crop) -> Found:
        """Encode a crop once and search it."""
        self.predictor.set_image(image[crop.y0 : crop.y1, crop.x0 : crop.x1])
        assert self.predictor.input_size is not None
        size = (image.shape[0], image.shape[1])
        enlarge = Enlarger(
            crop, size, self.predictor.input_size, self.predictor.image_size, self.settings, self.memory_budget
        )
        grid = self.point_grids[crop.layer]
        points = grid * np.array([crop.x1 - crop.x0, crop.y1 - crop.y0])
        search = search_coarse_to_fine if self.settings.fast else search_every_point
        found = search(self.predictor, grid, points, enlarge)
        self.predictor.reset_image()
        return found

    def _without_small_regions(self, found: Found) -> Found:
        """Masks less small holes and islands, then less duplicates; those that needed no change are preferred."""
        settings = self.settings
        rles, boxes, untouched = list(found.rles), found.boxes.copy(), np.ones(len(found.rles), np.float32)
        for i, rle in enumerate(found.rles):
            mask, changed = regions.without_small_regions(regions.decode(rle), settings.min_mask_region_area)
            if changed:
                pixels = torch.from_numpy(mask)[None]
                rles[i], boxes[i], untouched[i] = regions.encode(pixels.mT.contiguous().numpy())[0], boxes_of(pixels), 0
        cleaned = found._replace(rles=rles, boxes=boxes)
        return cleaned.take(nms(boxes, untouched, max(settings.box_nms_thresh, settings.crop_nms_thresh)))


def search_every_point(
    predictor: PointPredictor,
    grid: Float[np.ndarray, "P 2"],
    points: Float[np.ndarray, "P 2"],
    enlarge: Enlarger,
) -> Found:
    """The masks of a crop by the plain form; `grid` is `points`, (x, y) in its pixels, over the unit square."""
    parts = []
    settings = enlarge.settings
    for some in candidates(predictor, points, np.arange(len(grid)), settings.points_per_batch, settings.min_iou):
        full = enlarge(some.low_res)
        rows = np.flatnonzero(full.passed)
        clicks = (points[some.point[rows]] + np.array(enlarge.crop[:2])).astype(np.float32)
        crops = np.tile(np.array(enlarge.crop.box, np.float32), (len(rows), 1))
        parts.append(Found(full.rles, full.boxes[rows], some.iou[rows], full.stability[rows], clicks, crops))
    found = joined(parts)
    return found.take(nms(found.boxes, found.iou, settings.box_nms_thresh))


def _grids(settings: AmgSettings, given: Sequence[Float[np.ndarray, "n 2"]] | None) -> list[Float[np.ndarray, "n 2"]]:
    layers = settings.crop_n_layers
    if given is None:
        return point_grids(settings.points_per_side, layers, settings.crop_n_points_downscale_factor)
    grids = [np.asarray(grid, dtype=np.float64) for grid in given]
    for number, grid in enumerate(grids):
        if grid.ndim != 2 or grid.shape[1] != 2 or not ((grid >= 0) & (grid <= 1)).all():
            raise SamletError(f"point_grids[{number}]: must be points (x, y) over the unit square, not {grid.shape}")
    if len(grids) <= layers:
        raise SamletError(f"point_grids: {len(grids)} given, crop_n_layers {layers} needs {layers + 1}")
    return grids


def _plain_rle(rle: regions.Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": regions.counts(rle)}
