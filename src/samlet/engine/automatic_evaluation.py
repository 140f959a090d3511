"""How good automatic masks are: COCO's AR and AP, boundary AP, false positives, by object size; class-agnostic.

Each object is matched by at most one mask and each mask matches at most one object. What is ranked is the model's
own predicted IoU. Only overlaps, areas and scores of an image are kept, never its masks.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import minimum_filter
from scipy.optimize import linear_sum_assignment

from samlet.data.dataset import NO_REGIONS
from samlet.data.masks import mask_box
from samlet.data.segmentations import to_mask
from samlet.engine.evaluation import SIZES
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64
    from numpy.typing import ArrayLike

Rle = dict[str, Any]

MAX_MASKS = (10, 100, 1000)  # of an image, the most trusted; AP is taken at the last
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
HIT = 0.5  # IoU from which a mask counts as the object's in F1, false positives and matched IoU
BOUNDARY = 0.02  # width of the boundary, as a share of the image's diagonal
_EVERY_AREA = (0, 2**62)


class Overlaps(NamedTuple):
    """What an image's M masks and O objects have in common; masks in any order."""

    iou: Float64[np.ndarray, "M O"]
    boundary_iou: Float64[np.ndarray, "M O"]  # never above `iou`
    in_crowd: Float64[np.ndarray, "M"]  # share of the mask that lies in a crowd region
    scores: Float64[np.ndarray, "M"]  # predicted IoU
    mask_area: Int64[np.ndarray, "M"]
    object_area: Int64[np.ndarray, "O"]


class Matches(NamedTuple):
    """Pairs of a mask and an object, one to one."""

    masks: Int64[np.ndarray, "N"]
    objects: Int64[np.ndarray, "N"]
    iou: Float64[np.ndarray, "N"]


def overlaps(
    rles: Sequence[Rle],
    scores: ArrayLike,
    truth: Bool[np.ndarray, "O H W"],
    crowds: Bool[np.ndarray, "K H W"] = NO_REGIONS,
) -> Overlaps:
    """Mask IoU and boundary IoU of an image's masks (compressed COCO RLE, original frame) with its objects.

    Boundary IoU = |(G_d & G) & (P_d & P)| / |(G_d & G) | (P_d & P)|, where X_d is what is within d = 2 % of the image's
    diagonal of X's contour, the image's border included; the lesser of it and mask IoU counts, as the authors have it
    [Cheng et al. 2021, arXiv:2103.16562].
    """
    objects = [encode(mask) for mask in truth]
    iou = pairwise_iou(rles, objects)
    width = boundary_width((truth.shape[1], truth.shape[2]))
    edges = pairwise_iou(
        [encode(boundary(decode(rle), width)) for rle in rles], [encode(boundary(mask, width)) for mask in truth]
    )
    return Overlaps(
        iou=iou,
        boundary_iou=np.minimum(iou, edges),
        in_crowd=share_in(rles, [encode(region) for region in crowds]),
        scores=np.asarray(scores, np.float64),
        mask_area=_areas(rles),
        object_area=_areas(objects),
    )


def pairwise_iou(rles: Sequence[Rle], objects: Sequence[Rle]) -> Float64[np.ndarray, "M O"]:
    """IoU of each mask with each object."""
    if not len(rles) or not len(objects):
        return np.zeros((len(rles), len(objects)))
    return np.asarray(coco_mask.iou(list(rles), list(objects), [0] * len(objects)), np.float64)


def share_in(rles: Sequence[Rle], regions: Sequence[Rle]) -> Float64[np.ndarray, "M"]:
    """The largest share of each mask that lies in one of the regions: COCO's IoU with a crowd."""
    if not len(rles) or not len(regions):
        return np.zeros(len(rles))
    shares = np.asarray(coco_mask.iou(list(rles), list(regions), [1] * len(regions)), np.float64)
    largest: Float64[np.ndarray, "M"] = shares.max(axis=1)
    return largest


def encode(mask: Bool[np.ndarray, "H W"]) -> Rle:
    """A mask as compressed COCO RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def decode(rle: Rle) -> Bool[np.ndarray, "H W"]:
    """A compressed COCO RLE as mask."""
    height, width = rle["size"]
    return to_mask(rle, (height, width))


def boundary_width(size: tuple[int, int]) -> int:
    """Pixels d of the boundary of masks in an image of size (H, W), at least one."""
    return max(round(BOUNDARY * float(np.hypot(*size))), 1)


def boundary(mask: Bool[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """The pixels of a mask within `width` pixels (eight neighbours) of what is not in it, or of the image's border."""
    edge = mask.copy()
    if mask.any():
        x0, y0, x1, y1 = mask_box(mask)
        inside = mask[y0:y1, x0:x1]
        inner = minimum_filter(inside.astype(np.uint8), 2 * width + 1, mode="constant", cval=0)
        edge[y0:y1, x0:x1] = inside & (inner == 0)
    return edge


def match(iou: Float64[np.ndarray, "M O"], threshold: float = HIT) -> Matches:
    """The one-to-one pairs of IoU >= `threshold` whose sum of IoU is largest [Kuhn 1955, the Hungarian method]."""
    gain = np.where(iou >= threshold, iou, 0.0)
    masks, objects = linear_sum_assignment(gain, maximize=True)
    counted = gain[masks, objects] > 0
    masks, objects = masks[counted], objects[counted]
    return Matches(masks.astype(np.int64), objects.astype(np.int64), iou[masks, objects])


def count_judged(in_crowd: Float64[np.ndarray, "M"], matches: Matches) -> int:
    """How many masks are right or wrong: one in a crowd region that matches no object is neither."""
    is_neither = in_crowd >= HIT
    is_neither[matches.masks] = False
    return len(in_crowd) - int(is_neither.sum())


def summarize_masks(images: Sequence[Overlaps]) -> dict[str, Any]:
    """Scores of a set of images, from 0 to 1; None where there is no object of a size, or no matched mask.

    AR@k = mean over IoU 0.5, 0.55 ... 0.95 of recall with the k masks of the highest score of each image. AP = area
    under precision over recall (101 points), mean over the same IoU; up to 1000 masks an image. An image without masks
    counts: its objects are missed. `false_positives`: masks an image that match no object at IoU 0.5, one to one;
    `f1` = 2 matched / (masks + objects), over all images together. As in COCO, a mask that matches no object does not
    count if a share of it lies in a crowd region that is no smaller than the threshold of IoU, here 0.5.

    Raises:
        DataError: there are no objects.
    """
    if not sum(len(image.object_area) for image in images):
        raise DataError("evaluation: there is no object to score; `samlet check-data` says what was found")
    plain, edges = (_evaluate(images, kind) for kind in ("iou", "boundary_iou"))
    areas = np.concatenate([image.object_area for image in images])
    trusted = [_most_trusted(image) for image in images]
    matched = [match(image.iou) for image in trusted]
    found = np.concatenate([one.iou for one in matched])
    masks = sum(count_judged(image.in_crowd, one) for image, one in zip(trusted, matched, strict=True))
    return {
        "images": len(images),
        "objects": len(areas),
        "masks": masks,
        "ar": {str(count): _recall(plain, at=place) for place, count in enumerate(MAX_MASKS)},
        **_precisions(plain),
        **{f"boundary_{name}": value for name, value in _precisions(edges).items()},
        "false_positives": (masks - len(found)) / len(images),
        "f1": f1(len(found), masks, len(areas)),
        "matched": len(found),
        "matched_iou": float(found.mean()) if len(found) else None,
        "by_size": {
            size: {
                "objects": int(((areas >= low) & (areas < high)).sum()),
                "ar": _recall(plain, area=1 + place),
                "ap": _precision(plain, area=1 + place),
                "boundary_ap": _precision(edges, area=1 + place),
            }
            for place, (size, (low, high)) in enumerate(SIZES.items())
        },
    }


def f1(matched: int, masks: int, objects: int) -> float:
    """Harmonic mean of precision matched / masks and recall matched / objects."""
    return 2 * matched / max(masks + objects, 1)


class _Evaluation(COCOeval):  # type: ignore[misc]
    """COCOeval on overlaps that are known already."""

    def __init__(self, images: Sequence[Overlaps], kind: str) -> None:
        super().__init__(iouType="segm")
        self._images, self._kind = images, kind
        self.params.imgIds, self.params.catIds = list(range(len(images))), [1]
        self.params.iouThrs, self.params.maxDets = IOU_THRESHOLDS, list(MAX_MASKS)
        sizes = [(low, high - 1) for low, high in SIZES.values()]  # COCO's ranges contain both ends
        self.params.areaRng, self.params.areaRngLbl = [_EVERY_AREA, *sizes], ["all", *SIZES]

    def _prepare(self) -> None:
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        for number, image in enumerate(self._images):  # ids start at 1: COCOeval means "unmatched" by 0
            self._gts[number, 1] = [
                {"id": 1 + place, "area": int(area), "ignore": 0, "iscrowd": 0}
                for place, area in enumerate(image.object_area)
            ] + [{"id": 1 + len(image.object_area), "area": 0, "ignore": 1, "iscrowd": 1}]
            self._dts[number, 1] = [
                {"id": 1 + place, "area": int(area), "score": float(score)}
                for place, (area, score) in enumerate(zip(image.mask_area, image.scores, strict=True))
            ]

    def computeIoU(self, imgId: int, catId: int) -> Float64[np.ndarray, "M O+1"]:  # noqa: N802 - COCOeval's name
        """The overlaps of an image with its objects and its crowd, the masks sorted as COCOeval sorts them."""
        image = self._images[imgId]
        table: Float64[np.ndarray, "M O+1"] = np.column_stack([getattr(image, self._kind), image.in_crowd])
        table = table[_by_score(image)]
        return table


def _evaluate(images: Sequence[Overlaps], kind: str) -> _Evaluation:
    evaluation = _Evaluation(images, kind)
    with redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _recall(evaluation: _Evaluation, *, area: int = 0, at: int = -1) -> float | None:
    return _mean(evaluation.eval["recall"][:, 0, area, at])


def _precision(evaluation: _Evaluation, *, area: int = 0, thresholds: slice = slice(None)) -> float | None:
    return _mean(evaluation.eval["precision"][thresholds, :, 0, area, -1])


def _precisions(evaluation: _Evaluation) -> dict[str, float | None]:
    """AP over all thresholds, and at IoU 0.5 and 0.75."""
    places = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}
    return {name: _precision(evaluation, thresholds=place) for name, place in places.items()}


def _mean(values: np.ndarray) -> float | None:
    return None if (values < 0).all() else float(values.mean())  # COCOeval's -1: no object of that size


def _by_score(image: Overlaps) -> Int64[np.ndarray, "N"]:
    return np.argsort(-image.scores, kind="stable")[: MAX_MASKS[-1]]


def _most_trusted(image: Overlaps) -> Overlaps:
    kept = _by_score(image)
    return image._replace(
        iou=image.iou[kept],
        boundary_iou=image.boundary_iou[kept],
        in_crowd=image.in_crowd[kept],
        scores=image.scores[kept],
        mask_area=image.mask_area[kept],
    )


def _areas(rles: Sequence[Rle]) -> Int64[np.ndarray, "N"]:
    return np.array([int(coco_mask.area(rle)) for rle in rles], np.int64)
