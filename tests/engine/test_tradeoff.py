"""The picture of an interpolation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlet.engine.tradeoff import Curve, Scored, plot_interpolation, spread

ALPHAS = [0.0, 0.5, 1.0]
DATA = Scored(
    "data",
    [
        Curve("mean", [0.4, 0.6, 0.5]),
        Curve("point", [0.3, 0.5, 0.45], [(0.2, 0.4), (0.4, 0.6), (0.4, 0.5)]),
        Curve("box", [0.5, 0.7, 0.55]),
    ],
)
OLD = Scored("retention", [Curve("mean", [0.8, 0.7, 0.4])])


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_picture_of_one_set_and_a_wider_one_of_two(tmp_path: Path) -> None:
    plot_interpolation(tmp_path / "one.png", ALPHAS, 0.5, DATA)
    plot_interpolation(tmp_path / "two.png", ALPHAS, 0.5, DATA, OLD)
    one, two = _pixels(tmp_path / "one.png"), _pixels(tmp_path / "two.png")
    assert two.shape[1] > 2.5 * one.shape[1]
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 50


def test_the_same_picture_is_the_same_bytes_and_the_choice_shows(tmp_path: Path) -> None:
    for name, chosen in (("a", 0.5), ("b", 0.5), ("c", 1.0)):
        plot_interpolation(tmp_path / name, ALPHAS, chosen, DATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.0, 10.0], [0.0, 10.0]),
        ([5.0, 5.0], [4.0, 6.0]),
        ([1.0, 9.0, 1.0], [0.0, 9.0, 2.0]),
        ([0.0, 1.0, 2.0], [-1.0, 1.0, 3.0]),
    ],
)
def test_labels_stand_apart_in_their_order(wanted: list[float], placed: list[float]) -> None:
    assert spread(wanted, 2.0) == pytest.approx(placed)
