"""Grids of points over the unit square, and the order in which the fast form asks for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int


def point_grid(per_side: int) -> Float[np.ndarray, "n 2"]:
    """The centres (x, y) of per_side x per_side equal cells of the unit square, row by row."""
    centres = np.linspace(0.5 / per_side, 1 - 0.5 / per_side, per_side)
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def point_grids(per_side: int, layers: int, downscale: int) -> list[Float[np.ndarray, "n 2"]]:
    """A grid for the image and one for the crops of each layer, there with per_side / downscale^layer points a side."""
    return [point_grid(max(int(per_side / downscale**layer), 1)) for layer in range(layers + 1)]


def coarse_to_fine(points: Float[np.ndarray, "n 2"], strides: Sequence[int]) -> list[Int[np.ndarray, "k"]]:
    """Rows of a grid in stages: every strides[0]-th point along each side, then the rest of every strides[1]-th, ...

    What no stride has reached comes last. A grid that is not square is sorted into the cells of one.
    """
    side = max(math.isqrt(len(points)), 1)
    cells = np.floor(points * side).astype(np.int64)
    stages, left = [], np.arange(len(points))
    for stride in strides:
        chosen = (cells[left] % stride == stride // 2).all(axis=1)
        stages.append(left[chosen])
        left = left[~chosen]
    return [stage for stage in (*stages, left) if len(stage)]
