"""Calibration of the IoU head: worked out by hand, and asked of a model that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from samlet.data.dataset import EvalImage
from samlet.engine.calibration import (
    Guesses,
    ask,
    expected_calibration_error,
    grid_points,
    join_guesses,
    plot_reliability,
    summarize_calibration,
)
from samlet.models import Predictor, build_sam
from tests.tiny import IMAGE_SIZE, STUDENT


def guesses(predicted: list[float], actual: list[float], on: list[bool]) -> Guesses:
    return Guesses(np.array(predicted), np.array(actual), np.array(on))


def test_the_error_by_hand() -> None:
    """Bins 0.2: three masks, mean 0.25 against 0.4; 0.9: one mask, 0.95 against 0.45."""
    predicted, actual = np.array([0.2, 0.25, 0.3 - 1e-9, 0.95]), np.array([0.4, 0.6, 0.2, 0.45])
    error = expected_calibration_error(predicted, actual)
    assert error == pytest.approx(3 / 4 * 0.15 + 1 / 4 * 0.5)
    assert expected_calibration_error(predicted, actual, bins=1) == pytest.approx(abs(predicted.mean() - actual.mean()))
    assert expected_calibration_error(predicted, predicted) == 0.0


def test_predictions_outside_0_to_1_are_clipped() -> None:
    summary = summarize_calibration(guesses([1.3, -0.4, 1.0], [1.0, 0.0, 0.7], [True, False, True]))
    assert summary["ece"] == pytest.approx(2 / 3 * 0.15)
    assert summary["mae"] == pytest.approx(0.1)
    assert summary["on_objects"] == {"masks": 2, "ece": pytest.approx(0.15), "mae": pytest.approx(0.15)}
    assert [(row["low"], row["high"], row["masks"]) for row in summary["bins"]] == [(0.0, 0.1, 1), (0.9, 1.0, 2)]


def test_no_point_on_an_object_has_no_error_there() -> None:
    summary = summarize_calibration(guesses([0.5], [0.0], [False]))
    assert (summary["ece"], summary["on_objects"]["ece"]) == (0.5, None)


def test_the_grid_lies_in_the_middle_of_its_cells() -> None:
    assert grid_points((40, 60), 2).tolist() == [[15, 10], [45, 10], [15, 30], [45, 30]]


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    return build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval()


def scene(objects: list[tuple[int, int, int, int]]) -> EvalImage:
    rng = np.random.default_rng(0)
    masks = np.zeros((len(objects), 40, 56), np.bool_)
    for mask, (x0, y0, x1, y1) in zip(masks, objects, strict=True):
        mask[y0:y1, x0:x1] = True
    points = np.array([((x0 + x1) // 2, (y0 + y1) // 2) for x0, y0, x1, y1 in objects], np.float32).reshape(-1, 2)
    boxes = np.array(objects, np.float32).reshape(-1, 4)
    return EvalImage("a", rng.integers(0, 256, (40, 56, 3), np.uint8), masks, points, boxes)


def test_what_is_asked_is_what_the_predictor_answers(tiny: Any) -> None:
    item = scene([(2, 2, 30, 30), (40, 10, 50, 36)])
    found = ask(tiny.train(), item, grid_side=3)
    assert tiny.training
    points = np.concatenate([grid_points((40, 56), 3), item.points])
    assert len(found.predicted) == 3 * (9 + 2)
    predictor = Predictor(tiny.eval())
    predictor.set_image(item.image)
    for number, (x, y) in enumerate(points):
        masks, iou, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
        best = [max((m & t).sum() / max((m | t).sum(), 1) for t in item.masks) for m in masks]
        rows = slice(3 * number, 3 * number + 3)
        assert found.predicted[rows] == pytest.approx(iou, abs=1e-5)
        assert found.actual[rows] == pytest.approx(best, abs=1e-9)
        assert found.on_object[rows].tolist() == [bool(item.masks[:, int(y), int(x)].any())] * 3
    assert found.on_object.any()
    assert not found.on_object.all()
    assert found.actual.max() > 0


def test_without_objects_every_mask_fits_nothing(tiny: Any) -> None:
    found = ask(tiny, scene([]), grid_side=2)
    assert found.actual.tolist() == [0.0] * 12
    both = join_guesses([found, found])
    assert len(both.predicted) == len(both.on_object) == 24


def test_the_grid_asks_nothing_of_crowds(tiny: Any) -> None:
    item = scene([(2, 2, 30, 30)])
    crowds = np.zeros((2, 40, 56), np.bool_)
    crowds[0, :, :28] = crowds[1, :20, 20:] = True
    every, some = ask(tiny, item, grid_side=2), ask(tiny, item._replace(crowds=crowds), grid_side=2)
    rows = np.r_[9:12, 12:15]  # the last point of the grid and the object's centre
    assert some.predicted == pytest.approx(every.predicted[rows], abs=1e-6)
    nothing = ask(tiny, scene([])._replace(crowds=np.ones((1, 40, 56), np.bool_)))
    assert [len(column) for column in nothing] == [0, 0, 0]


def test_the_picture_is_the_same_bytes_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    predicted = rng.random(500)
    summary = summarize_calibration(Guesses(predicted, predicted**2, rng.random(500) > 0.5))
    for name in ("a", "b"):
        plot_reliability(tmp_path / f"{name}.png", {"base": summary, "tuned": summary})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
