"""A teacher's automatic masks as objects to learn: alone, beside the ground truth, or where the ground truth is silent.

replace_gt         objects = teacher's masks; no mask of the ground truth is opened
gt_override        objects = ground truth, then each mask m of the teacher with max IoU(m, g) < threshold over objects g
dual_supervision   objects = ground truth, then all of the teacher's masks

They are objects like any other, in the original frame: augmentation, prompts, losses and terms know no difference. In
dual_supervision one pixel may belong to an object of each, and a point on it learns both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from samlet.data.records import ObjectMasks, OpenMasks, Record
from samlet.data.records import read_masks as read_objects
from samlet.distill.kept_masks import Kept, KeptMasks, read_masks
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Method = Literal["replace_gt", "dual_supervision", "gt_override"]
READING_THREADS = 4


class Together(NamedTuple):
    """The objects of several sources, one source after the other."""

    parts: tuple[ObjectMasks, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def name(self, index: int) -> str:
        """As its source calls it."""
        part, own = self._place(index)
        return part.name(own)

    def read(self, index: int) -> Bool[np.ndarray, "H W"]:
        """Decode one mask.

        Raises:
            DataError: as its source.
        """
        part, own = self._place(index)
        return part.read(own)

    def _place(self, index: int) -> tuple[ObjectMasks, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(f"there are {len(self)} masks")


def open_pseudo_labels(
    place: Path, chosen: tuple[int, ...] | None, truth: OpenMasks | None, size: tuple[int, int]
) -> ObjectMasks:
    """The objects of an image of (H, W): those of the ground truth, where it is given, then the teacher's.

    Args:
        place: the file of the teacher's masks.
        chosen: which of them; all for None.
        truth: opens the ground truth; None: there is none, or it is not wanted.
        size: of the image.

    Raises:
        DataError: the file is damaged, or the image is of another size than when the teacher saw it.
    """
    kept = read_masks(place)
    if kept.size != size:
        raise DataError(
            f"{place}: the teacher's masks are {kept.size[1]} x {kept.size[0]} pixels but the image is "
            f"{size[1]} x {size[0]}; start again, and they are made anew"
        )
    masks = kept.segmentations(chosen)
    return masks if truth is None else Together((truth(size), masks))


def pseudo_labelled(
    records: Sequence[Record],
    kept: Mapping[str, Kept],
    method: Method,
    iou_threshold: float,
    *,
    broken: Literal["refuse", "skip"] = "refuse",
    advance: Callable[[int], object] = lambda _: None,
) -> list[Record]:
    """The records with the objects of a method; an image that has none of either kind is unlabelled.

    A teacher may have missed some: only with the ground truth's objects among them they are complete.

    Args:
        records: the images; one may stand there several times.
        kept: the teacher's masks by image id; an image without stays without.
        method: which objects.
        iou_threshold: of gt_override.
        broken: what to do where a mask of the ground truth cannot be read, which gt_override compares with.
        advance: called with the number of images done.

    Raises:
        DataError: a mask of the ground truth cannot be read and the policy is to refuse.
    """

    def label(record: Record) -> OpenMasks | None:
        masks, truth = kept.get(record.image_id), None if method == "replace_gt" else record.open_masks
        if masks is None or not masks.number_of_masks:
            return truth
        chosen = None
        if method == "gt_override" and truth is not None:
            chosen = tuple(outside_truth(read_masks(masks.place), truth, iou_threshold, broken))
        return partial(open_pseudo_labels, masks.place, chosen, truth)

    distinct = {record.image_id: record for record in records}
    with ThreadPoolExecutor(READING_THREADS) as pool:
        found = dict[str, OpenMasks | None]()
        for image_id, opened in zip(distinct, pool.map(label, distinct.values()), strict=True):
            found[image_id] = opened
            advance(1)
    return [
        record._replace(
            open_masks=found[record.image_id],
            is_complete=record.is_complete and method != "replace_gt" and record.open_masks is not None,
        )
        for record in records
    ]


def outside_truth(
    kept: KeptMasks, truth: OpenMasks, iou_threshold: float, broken: Literal["refuse", "skip"]
) -> Iterator[int]:
    """Which of the teacher's masks have an IoU below the threshold with every object of the ground truth.

    Raises:
        DataError: a mask of the ground truth cannot be read and `broken` is "refuse".
    """
    objects = list[np.ndarray]()
    for mask in read_objects(truth, kept.size):
        if not isinstance(mask, DataError):
            objects.append(mask)
        elif broken == "refuse":
            raise mask
    best = best_iou(kept, objects)
    return (number for number in range(len(kept)) if best[number] < iou_threshold)


def best_iou(kept: KeptMasks, objects: Sequence[Bool[np.ndarray, "H W"]]) -> Float[np.ndarray, "N"]:
    """Each mask's largest IoU with any object; 0 where there are none."""
    from pycocotools import mask as coco_mask

    if not objects or not len(kept):
        return np.zeros(len(kept))
    runs = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in objects]
    overlaps = np.asarray(coco_mask.iou(list(kept.rles), runs, [0] * len(runs)), np.float64)
    best: Float[np.ndarray, "N"] = overlaps.reshape(len(kept), len(runs)).max(axis=1)
    return best
