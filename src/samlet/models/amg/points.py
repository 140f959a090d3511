"""Grids of points over the unit square, and the order in which the fast form asks for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import maximum_filter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int


def point_grid(per_side: int) -> Float[np.ndarray, "n 2"]:
    """The centres (x, y) of per_side x per_side equal cells of the unit square, row by row."""
    centres = np.linspace(0.5 / per_side, 1 - 0.5 / per_side, per_side)
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def point_grids(per_side: int, layers: int, downscale: int) -> list[Float[np.ndarray, "n 2"]]:
    """A grid for the image and one for the crops of each layer, there with per_side / downscale^layer points a side."""
    return [point_grid(max(int(per_side / downscale**layer), 1)) for layer in range(layers + 1)]


def coarse_to_fine(points: Float[np.ndarray, "n 2"], strides: Sequence[int]) -> list[Int[np.ndarray, "k"]]:
    """Rows of a grid in stages: every strides[0]-th point along each side, then the rest of every strides[1]-th, ...

    Each stride divides the one before, the last is 1. A stage may be empty. A grid that is not square is sorted into
    the cells of one.
    """
    cells, left, stages = cells_of_square(points), np.arange(len(points)), []
    for stride in strides:
        chosen = (cells[left] % stride == strides[0] // 2 % stride).all(axis=1)
        stages.append(left[chosen])
        left = left[~chosen]
    return stages


def near(
    points: Float[np.ndarray, "n 2"], asked: Bool[np.ndarray, "n"], hopeful: Bool[np.ndarray, "n"], reach: int
) -> Bool[np.ndarray, "n"]:
    """Which points have a hopeful one within `reach` cells along either side, or none that was asked."""
    cells = cells_of_square(points)
    side = cells.max(initial=0) + 1
    around = []
    for marked in (asked, hopeful):
        plane = np.zeros((side, side), dtype=bool)
        plane[tuple(cells[marked].T)] = True
        around.append(maximum_filter(plane, size=2 * reach + 1, mode="constant")[tuple(cells.T)])
    found: Bool[np.ndarray, "n"] = around[1] | ~around[0]
    return found


def cells_of_square(points: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 2"]:
    """The cell of each point, (x, y) over the unit square, if as many cells as points lie in a square."""
    return np.asarray(np.floor(points * max(math.isqrt(len(points)), 1)), dtype=np.int64)
