"""The sweep over thresholds: what the generator itself would have kept, and the choice among them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samlet.engine.automatic_evaluation import Overlaps, decode, overlaps, summarize_masks
from samlet.engine.tuning import (
    Candidates,
    Cell,
    Sweep,
    best_cell,
    candidates,
    facts_of,
    nearest_cell,
    plot_sweep,
    sweep,
)
from samlet.models import build_sam
from samlet.models.amg import AmgSettings, AutomaticMaskGenerator
from samlet.models.amg.predicting import Answers
from tests.tiny import IMAGE_SIZE, STUDENT

SIZE = (48, 64)
UNFILTERED = AmgSettings(points_per_side=8, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1.0, fast=False)


class Blobs:
    """Answers a click with three discs around it, of drawn radius, sharpness and estimate."""

    image_size = 64

    def __init__(self) -> None:
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None

    def set_image(self, image: np.ndarray) -> None:
        self.original_size = self.input_size = (image.shape[0], image.shape[1])

    def reset_image(self) -> None:
        self.original_size = self.input_size = None

    def at_points(self, points: np.ndarray, min_iou: float | None) -> Answers:
        y, x = np.mgrid[2:64:4, 2:64:4]
        logits = np.zeros((len(points), 3, 16, 16), np.float32)
        iou = np.zeros((len(points), 3), np.float32)
        for row, point in enumerate(points):
            rng = np.random.default_rng(int(point[0] * 1000 + point[1]))
            for mask, (radius, sharpness) in enumerate(zip(rng.uniform(2, 14, 3), rng.uniform(0.3, 3, 3), strict=True)):
                logits[row, mask] = sharpness * (radius - np.hypot(x - point[0], y - point[1]))
            iou[row] = rng.uniform(0.2, 1, 3)
        return Answers(torch.arange(len(points)), torch.from_numpy(logits), torch.from_numpy(iou))


def blobs(settings: AmgSettings) -> AutomaticMaskGenerator:
    generator = AutomaticMaskGenerator.of(build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval(), settings)
    generator.predictor = Blobs()
    return generator


def test_the_sweep_says_what_the_generator_gives() -> None:
    images = [np.zeros((*SIZE, 3), np.uint8), np.zeros((40, 50, 3), np.uint8)]
    every = [blobs(UNFILTERED).find(image) for image in images]
    truth = [np.stack([decode(rle) for rle in masks.rles[5::11]]) for masks in every]
    crowds = [np.zeros((1, *image.shape[:2]), np.bool_) for image in images]
    crowds[0][0, :, 30:] = True
    found = [candidates(*each) for each in zip(every, truth, crowds, strict=True)]
    predicted, stability = (0.0, 0.5, 0.8), (0.0, 0.6, 0.85)
    table = sweep(found, 0.6, predicted, stability)
    assert np.ptp(table.f1) > 0.1
    assert np.ptp(table.ar) > 0.2
    for row, least in enumerate(stability):
        for column, over in enumerate(predicted):
            settings = dataclasses.replace(
                UNFILTERED, pred_iou_thresh=over, stability_score_thresh=least, box_nms_thresh=0.6
            )
            kept = [blobs(settings).find(image) for image in images]
            summary = summarize_masks(
                [
                    overlaps(one.rles, one.predicted_iou, objects, regions)
                    for one, objects, regions in zip(kept, truth, crowds, strict=True)
                ]
            )
            assert summary["masks"] < sum(len(one.rles) for one in kept)
            assert table.masks[row, column] == summary["masks"] / 2
            assert table.f1[row, column] == pytest.approx(summary["f1"])
            assert table.ar[row, column] == pytest.approx(summary["ar"]["1000"])
            assert table.recall[row, column] == pytest.approx(summary["matched"] / summary["objects"])


def test_more_masks_than_a_byte_counts() -> None:
    """pycocotools measures no more than 255 at once."""
    image = np.zeros((20, 20, 3), np.uint8)
    settings = dataclasses.replace(UNFILTERED, points_per_side=10)
    every = blobs(settings).find(image)
    assert len(every.rles) == 300
    assert candidates(every, np.ones((1, 20, 20), np.bool_)).iou.shape == (300, 1)


def by_hand() -> Candidates:
    """Two objects; the best mask of each, a duplicate of the first, a wrong one that is trusted most but unstable."""
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 0, 29, 9], [40, 0, 49, 9]], np.float32)
    iou = np.array([[0.7, 0], [0.9, 0], [0, 0.8], [0, 0]])
    return Candidates(boxes, np.array([0.8, 0.6, 0.5, 0.95]), np.array([0.9, 0.95, 0.9, 0.4]), iou, np.zeros(4))


def test_scores_by_hand() -> None:
    table = sweep([by_hand()], 0.7, predicted=(0.0, 0.5, 0.9), stability=(0.0, 0.5, 0.92))
    assert table.masks.tolist() == [[3, 2, 1], [2, 1, 0], [1, 1, 0]]  # 0.5 is not above 0.5; the duplicate is gone
    assert table.f1 == pytest.approx(np.array([[4 / 5, 2 / 4, 0], [1, 2 / 3, 0], [2 / 3, 2 / 3, 0]]))
    # The first object at 0.7 counts at 5 of the 10 IoU, its duplicate of 0.9 at 9, the second object at 7.
    assert table.ar == pytest.approx(np.array([[12, 5, 0], [12, 5, 0], [9, 9, 0]]) / 20)
    best = best_cell(table, "f1")
    assert facts_of(table, best) == {
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.5,
        "f1": 1.0,
        "precision": 1.0,
        "recall": 1.0,
        "ar": pytest.approx(0.6),
        "masks": 2.0,
    }
    assert best_cell(table, "ar") == Cell(1, 0)  # as good as without a threshold, with fewer masks


def test_of_equals_the_stricter_pair() -> None:
    zeros = np.zeros((2, 3))
    table = Sweep((0.1, 0.2), (0.1, 0.2, 0.3), zeros, zeros, zeros, zeros, zeros)
    assert best_cell(table, "f1") == Cell(1, 2)
    assert nearest_cell(table, 0.88, 0.14) == Cell(0, 2)


def test_no_masks_and_no_objects() -> None:
    none = Candidates(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0), np.zeros((0, 2)), np.zeros(0))
    bare = by_hand()._replace(iou=np.zeros((4, 0)))
    table = sweep([none, bare], 0.7, predicted=(0.0,), stability=(0.0,))
    assert (table.f1[0, 0], table.ar[0, 0], table.masks[0, 0]) == (0, 0, 1.5)


def test_the_heat_map_is_the_same_bytes_again(tmp_path: Path) -> None:
    table = sweep([by_hand()], 0.7, predicted=(0.0, 0.5, 0.88), stability=(0.5, 0.95))
    for name in ("a", "b"):
        plot_sweep(tmp_path / f"{name}.png", table, "f1", nearest_cell(table, 0.88, 0.95), best_cell(table, "f1"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 1000


def test_the_sweep_scores_as_coco_does() -> None:
    image = by_hand()
    kept = [3, 0, 2]
    plain = Overlaps(
        image.iou[kept],
        image.iou[kept],
        image.in_crowd[kept],
        image.predicted[kept],
        np.full(3, 100),
        np.full(2, 100),
    )
    table = sweep([image], 0.7, predicted=(0.0,), stability=(0.0,))
    summary = summarize_masks([plain])
    assert table.ar[0, 0] == pytest.approx(summary["ar"]["1000"])
    assert table.f1[0, 0] == pytest.approx(summary["f1"])
