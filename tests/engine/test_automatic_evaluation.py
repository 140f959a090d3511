"""Scores of automatic masks: worked out by hand, and COCOeval's own."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samlet.engine.automatic_evaluation import (
    MAX_MASKS,
    Overlaps,
    boundary,
    boundary_width,
    encode,
    match,
    overlaps,
    summarize_masks,
)
from samlet.errors import DataError

SIZE = (40, 60)


def rectangle(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def scene(objects: list[np.ndarray], masks: list[np.ndarray], scores: list[float]) -> Overlaps:
    truth = np.stack(objects) if objects else np.zeros((0, *SIZE), np.bool_)
    return overlaps([encode(mask) for mask in masks], scores, truth)


def given(iou: list[list[float]], scores: list[float]) -> Overlaps:
    table = np.array(iou, np.float64).reshape(len(scores), -1)
    areas = np.full(table.shape[0], 100), np.full(table.shape[1], 100)
    return Overlaps(table, table, np.zeros(len(scores)), np.array(scores), *areas)


def test_perfect_masks_score_one() -> None:
    objects = [rectangle(0, 0, 10, 10), rectangle(20, 5, 58, 38)]
    scores = summarize_masks([scene(objects, objects, [0.8, 0.9])])
    assert scores["ar"] == {"10": 1.0, "100": 1.0, "1000": 1.0}
    assert [scores[name] for name in ("ap", "ap50", "ap75", "boundary_ap")] == pytest.approx([1, 1, 1, 1])
    assert (scores["false_positives"], scores["matched"], scores["matched_iou"]) == (0.0, 2, 1.0)
    assert [scores["by_size"][size]["objects"] for size in ("small", "medium", "large")] == [1, 1, 0]
    assert scores["by_size"]["medium"]["ar"] == 1.0
    assert scores["by_size"]["large"] == {"objects": 0, "ar": None, "ap": None, "boundary_ap": None}


def test_recall_and_precision_by_hand() -> None:
    """Objects A, B; masks by score: a miss, A at IoU 0.7, B at 0.5. A counts at 5 thresholds of 10, B at 1."""
    scores = summarize_masks([given([[0.0, 0.0], [0.7, 0.0], [0.0, 0.5]], [0.9, 0.8, 0.7])])
    assert scores["ar"]["1000"] == pytest.approx((2 / 2 + 4 * 1 / 2) / 10)
    # At 0.5: precision 1/2 at recall 1/2, 2/3 at recall 1; made falling, 2/3 at all 101 recalls. At 0.55 .. 0.7: 1/2 at
    # the 51 recalls 0 .. 0.5, then nothing.
    assert scores["ap50"] == pytest.approx(2 / 3)
    assert scores["ap"] == pytest.approx((2 / 3 + 4 * (1 / 2) * 51 / 101) / 10)
    assert scores["ap75"] == 0.0
    assert scores["false_positives"] == 1.0
    assert scores["matched_iou"] == pytest.approx((0.7 + 0.5) / 2)
    assert scores["f1"] == pytest.approx(2 / (1 / (2 / 3) + 1 / 1))


def test_one_mask_for_one_object() -> None:
    """Two masks on one object are one hit and one false positive; one mask on two objects is one hit and one miss."""
    twice = summarize_masks([given([[0.9], [0.95]], [0.9, 0.8])])
    assert (twice["matched"], twice["false_positives"]) == (1, 1.0)
    assert twice["matched_iou"] == pytest.approx(0.95)
    assert twice["ar"]["1000"] == pytest.approx(1.0)  # the worse one matches up to 0.9, the better one at 0.95
    both = summarize_masks([given([[0.6, 0.6]], [0.9])])
    assert (both["matched"], both["false_positives"]) == (1, 0.0)
    assert both["ar"]["1000"] == pytest.approx(3 / 10 / 2)


def test_the_pairs_are_those_of_the_largest_sum() -> None:
    found = match(np.array([[0.9, 0.8], [0.7, 0.4], [0.1, 0.45]]))
    assert [*zip(found.masks, found.objects, strict=True)] == [(0, 1), (1, 0)]
    assert found.iou == pytest.approx([0.8, 0.7])
    assert len(match(np.zeros((0, 3))).iou) == len(match(np.zeros((3, 0))).iou) == 0


def test_an_image_without_masks_counts_nothing_found() -> None:
    whole, none = given([[1.0]], [0.9]), scene([rectangle(0, 0, 5, 5)], [], [])
    scores = summarize_masks([whole, none])
    assert scores["ar"]["1000"] == pytest.approx(0.5)
    assert scores["ap"] == pytest.approx(51 / 101)
    nothing = summarize_masks([none])
    assert (nothing["ap"], nothing["ar"]["10"], nothing["matched_iou"], nothing["false_positives"]) == (0, 0, None, 0)


def test_masks_of_an_image_without_objects_are_false_positives() -> None:
    found = given([[1.0]], [0.5])
    empty = scene([], [rectangle(0, 0, 5, 5)], [0.9])
    scores = summarize_masks([found, empty])
    assert scores["false_positives"] == 0.5
    assert scores["ap"] == pytest.approx(0.5)  # the wrong mask is trusted more
    assert scores["ar"]["1000"] == pytest.approx(1.0)
    with pytest.raises(DataError, match="no object to score"):
        summarize_masks([empty])


def test_only_the_most_trusted_masks_count() -> None:
    rows = [[0.0]] * 15 + [[1.0]] + [[0.0]] * 1000
    scores = summarize_masks([given(rows, list(np.linspace(1, 0, len(rows))))])
    assert scores["ar"] == {"10": 0.0, "100": pytest.approx(1.0), "1000": pytest.approx(1.0)}
    assert scores["masks"] == 1000
    assert scores["false_positives"] == 999
    late = summarize_masks([given([*[[0.0]] * 1000, [1.0]], list(np.linspace(1, 0, 1001)))])
    assert (late["ar"]["1000"], late["matched"]) == (0.0, 0)


def test_the_boundary_of_a_mask() -> None:
    assert boundary_width((40, 60)) == 1  # 2 % of 72.1
    assert boundary_width((1080, 1920)) == 44
    block = rectangle(0, 0, 10, 8)
    ring = boundary(block, 2)
    assert ring.sum() == 10 * 8 - 6 * 4  # the border of the image is a boundary too
    assert (ring[2:6, 2:8] == 0).all()
    hole = block.copy()
    hole[4, 4] = False
    assert boundary(hole, 1)[3:6, 3:6].sum() == 8  # corners of the hole touch it
    assert not boundary(rectangle(0, 0, 0, 0), 2).any()


def test_boundary_overlap_by_hand() -> None:
    """A 20 x 20 square against itself moved right by 2, boundary 1 pixel wide: rings of 76 pixels."""
    one = scene([rectangle(5, 5, 25, 25)], [rectangle(7, 5, 27, 25)], [0.9])
    assert one.iou[0, 0] == pytest.approx(18 / 22)
    both = 2 * 18  # top and bottom edges overlap in 18 pixels each, the upright ones nowhere else
    assert one.boundary_iou[0, 0] == pytest.approx(both / (2 * 76 - both))
    assert summarize_masks([one])["ap50"] == pytest.approx(1.0)
    assert summarize_masks([one])["boundary_ap50"] == 0.0


def test_boundary_overlap_is_never_above_the_masks() -> None:
    ring = rectangle(5, 5, 35, 35) & ~rectangle(6, 6, 34, 34)
    one = scene([rectangle(5, 5, 35, 35)], [ring], [0.9])
    assert one.boundary_iou[0, 0] == one.iou[0, 0] == pytest.approx(116 / 900)


def test_a_mask_in_a_crowd_is_neither_right_nor_wrong() -> None:
    one, crowd = rectangle(0, 0, 10, 10), np.stack([rectangle(30, 0, 60, 40), rectangle(0, 20, 30, 40)])
    inside, straddling = rectangle(40, 5, 50, 15), rectangle(24, 0, 36, 10)  # half of it in the first region
    outside, in_and_right = rectangle(20, 0, 30, 10), rectangle(2, 25, 12, 35)
    objects, masks = np.stack([one, in_and_right]), [one, inside, straddling, outside, in_and_right]
    found = overlaps([encode(mask) for mask in masks], np.linspace(0.9, 0.5, 5), objects, crowd)
    assert found.in_crowd == pytest.approx([0, 1, 0.5, 0, 1])
    scores = summarize_masks([found])
    assert (scores["matched"], scores["masks"], scores["false_positives"]) == (2, 3, 1.0)
    assert scores["f1"] == pytest.approx(4 / 5)
    assert scores["ap50"] == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )  # the one wrong mask is trusted less than one object


def random_scene(rng: np.random.Generator, objects: int, masks: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    def draw() -> np.ndarray:
        x0, y0 = int(rng.integers(0, 45)), int(rng.integers(0, 28))
        return rectangle(x0, y0, x0 + int(rng.integers(3, 15)), y0 + int(rng.integers(3, 12)))

    truth = np.stack([draw() for _ in range(objects)]) if objects else np.zeros((0, *SIZE), np.bool_)
    found = [
        np.roll(truth[rng.integers(objects)], rng.integers(-2, 3, 2), (0, 1)) for _ in range(masks if objects else 0)
    ]
    return truth, [*found, draw()][:masks], rng.random(masks).round(1)


def plain_coco(scenes: list[tuple[np.ndarray, list[np.ndarray], np.ndarray]], crowds: list[np.ndarray]) -> COCOeval:
    truth, results = COCO(), []
    truth.dataset = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
    for number, (objects, masks, scores) in enumerate(scenes, start=1):
        truth.dataset["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        regions = [] if number == 3 else crowds
        for place, mask in enumerate([*objects, *regions]):
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": encode(mask),
                    "area": int(mask.sum()),
                    "iscrowd": int(place >= len(objects)),
                }
            )
        for mask, score in zip(masks, scores, strict=True):
            results.append({"image_id": number, "category_id": 1, "segmentation": encode(mask), "score": float(score)})
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.maxDets = list(MAX_MASKS)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("crowds", [[], [rectangle(0, 0, 20, 28), rectangle(16, 10, 33, 40)]])
def test_the_numbers_are_cocoeval_s(crowds: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, objects, masks) for objects, masks in ((3, 8), (1, 0), (0, 1), (5, 30), (2, 14))]
    plain = plain_coco(scenes, crowds)
    regions = [np.array([] if number == 3 else crowds, np.bool_).reshape(-1, *SIZE) for number in range(1, 6)]
    ours = summarize_masks(
        [
            overlaps([encode(mask) for mask in masks], s, truth, own)
            for (truth, masks, s), own in zip(scenes, regions, strict=True)
        ]
    )
    recall, precision = plain.eval["recall"][:, 0], plain.eval["precision"][:, :, 0]
    assert 0.1 < ours["ap"] < 0.9
    assert [ours["ar"][str(count)] for count in MAX_MASKS] == [recall[:, 0, at].mean() for at in range(3)]
    assert ours["ap"] == precision[..., 0, -1].mean()
    assert ours["ap50"] == precision[0, :, 0, -1].mean()
    assert ours["ap75"] == precision[5, :, 0, -1].mean()
    assert ours["by_size"]["small"]["ap"] == precision[..., 1, -1].mean()
    assert ours["by_size"]["small"]["ar"] == recall[:, 1, -1].mean()
