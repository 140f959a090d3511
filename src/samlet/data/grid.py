"""Segment everything: a grid of points over the image, each one prompt of one click, and what lies under each.

Coordinates are (x, y) pixels of the input frame, over the unpadded part; a point lies on the pixel whose centre is
nearest, as the prompt encoder places it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from samlet.data.prompts import PromptRow, make_row
from samlet.types import POSITIVE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

Unlabelled = Literal["ignore", "teacher", "negative"]
MOST_TARGETS = 3  # of one point: as many as an ambiguous click has answers
NO_OBJECT = -1


class GridSettings(NamedTuple):
    """The grid, and which of its points a step sees."""

    points_per_side: int = 32
    unlabelled: Unlabelled = "ignore"  # points beside all objects
    max_points: int | None = 64
    object_share: float = 0.5  # of the drawn points, as far as there are so many
    jitter: bool = True
    boxes: int = 0  # objects that get a box beside the grid's points


class GridPrompts(NamedTuple):
    """A prompt a row; a point on nested objects comes once for each of them, smallest first."""

    rows: list[PromptRow]
    masks: list[Bool[np.ndarray, "H W"]]  # those that are asked for, with negatives all, and an empty one for these
    target_of: Int64[np.ndarray, "P"]  # whose each prompt is, in `masks`
    labelled: Bool[np.ndarray, "P"]  # False: it lies beside all objects
    background: Bool[np.ndarray, "P"]  # True: nor does it lie on anything else


class GridClicks(NamedTuple):
    """A click and its target for each prompt."""

    points: Float[np.ndarray, "P 2"]
    objects: Int64[np.ndarray, "P"]  # NO_OBJECT: none lies there


def ask_everywhere(
    rng: np.random.Generator,
    size: tuple[int, int],
    masks: Sequence[Bool[np.ndarray, "H W"]],
    settings: GridSettings,
    boxed: Sequence[PromptRow] = (),
    *,
    unknown: Sequence[Bool[np.ndarray, "H W"]] | None = (),
) -> GridPrompts:
    """A click for each drawn point and each object under it, after them `boxed`, prompts of the first masks.

    Points beside all objects are negatives, but for those on what is `unknown`; None: nobody knows where that is. Where
    there is no mask at all, points anywhere are drawn for what a teacher says.
    """
    negative = settings.unlabelled == "negative" and unknown is not None and len(masks) > 0
    left_out = unknown if negative and unknown is not None else ()
    clicks = draw_clicks(
        rng, size, masks, settings, beside=negative or settings.unlabelled == "teacher", left_out=left_out
    )
    whose = np.concatenate([clicks.objects, np.arange(len(boxed))])
    kept = [*masks, np.zeros(size, np.bool_)]
    used, target_of = np.unique(np.where(whose == NO_OBJECT, len(masks), whose), return_inverse=True)
    if negative:  # what is found there is compared with every object
        used, target_of = np.arange(len(kept)), used[target_of]
    labelled = whose != NO_OBJECT
    return GridPrompts(
        rows=[make_row(point, np.array([POSITIVE]), None) for point in clicks.points] + list(boxed),
        masks=[kept[place] for place in used],
        target_of=target_of.astype(np.int64),
        labelled=labelled,
        background=~labelled & negative,
    )


def point_grid(count: int, size: tuple[int, int], shift: tuple[float, float] = (0.0, 0.0)) -> Float[np.ndarray, "N 2"]:
    """The count x count cell centres over (H, W) pixels, row by row, as SamAutomaticMaskGenerator places them.

    `shift` moves the whole grid, in cells: x, y within -0.5 .. 0.5.
    """
    x, y = ((np.arange(count) + 0.5 + move) / count for move in shift)
    return np.stack(np.meshgrid(x * size[1], y * size[0]), axis=2).reshape(-1, 2)


def draw_clicks(
    rng: np.random.Generator,
    size: tuple[int, int],
    masks: Sequence[Bool[np.ndarray, "H W"]],
    settings: GridSettings,
    *,
    beside: bool,
    left_out: Sequence[Bool[np.ndarray, "H W"]] = (),
) -> GridClicks:
    """The points that a step sees and their targets: never none. Points on objects apart, none on what is `left_out`.

    Of the points on objects those are drawn that spread evenly over the objects; the rest comes from the points beside
    them, where `beside` lets them take part. Where no point of the grid lies on any of several masks, the grid is
    shifted so that one does.
    """
    points = point_grid(settings.points_per_side, size, _shift(rng, settings))
    under = objects_under(points, masks)
    if len(masks) and not under.any():
        points = point_grid(settings.points_per_side, size, _shift_onto(rng, size, masks, settings.points_per_side))
        under = objects_under(points, masks)
    order = np.argsort([np.count_nonzero(mask) for mask in masks], kind="stable")
    nested = [order[under[order, point]][:MOST_TARGETS] for point in range(len(points))]
    may_be_beside = np.full(len(points), beside or not len(masks))
    free = np.logical_and(may_be_beside, ~objects_under(points, left_out).any(axis=0))
    chosen = _drawn(rng, nested, settings, free)
    targets = [nested[point] if len(nested[point]) else np.array([NO_OBJECT]) for point in chosen]
    repeats = [len(own) for own in targets]
    return GridClicks(points[np.repeat(chosen, repeats)].astype(np.float32), np.concatenate(targets).astype(np.int64))


def objects_under(
    points: Float[np.ndarray, "N 2"], masks: Sequence[Bool[np.ndarray, "H W"]]
) -> Bool[np.ndarray, "O N"]:
    """Which masks cover which points."""
    if not len(masks):
        return np.zeros((0, len(points)), np.bool_)
    height, width = masks[0].shape
    columns, rows = np.floor(points + 0.5).astype(np.int64).clip(0, [width - 1, height - 1]).T
    return np.stack([mask[rows, columns] for mask in masks])


def _shift(rng: np.random.Generator, settings: GridSettings) -> tuple[float, float]:
    drawn = rng.random(2) - 0.5
    return (float(drawn[0]), float(drawn[1])) if settings.jitter else (0.0, 0.0)


def _shift_onto(
    rng: np.random.Generator, size: tuple[int, int], masks: Sequence[Bool[np.ndarray, "H W"]], count: int
) -> tuple[float, float]:
    """The shift that brings a point of the grid onto a pixel of a mask, both drawn."""
    rows, columns = np.nonzero(masks[int(rng.integers(len(masks)))])
    place = rng.integers(len(rows))
    cells = columns[place] / size[1] * count, rows[place] / size[0] * count
    return float(cells[0] % 1 - 0.5), float(cells[1] % 1 - 0.5)


def _drawn(
    rng: np.random.Generator,
    nested: Sequence[Int64[np.ndarray, "T"]],
    settings: GridSettings,
    beside: Bool[np.ndarray, "N"],
) -> Int64[np.ndarray, "n"]:
    """The numbers of the points that are seen, rising; `beside`: those that may be though they lie on no object."""
    smallest = np.array([own[0] if len(own) else NO_OBJECT for own in nested])
    on = _evenly(rng, smallest, np.flatnonzero(smallest != NO_OBJECT))
    off = rng.permutation(np.flatnonzero((smallest == NO_OBJECT) & beside))
    most = len(nested) if settings.max_points is None else settings.max_points
    wanted = min(len(on), max(math.ceil(most * settings.object_share), most - len(off)))
    return np.sort(np.concatenate([on[:wanted], off[: most - wanted]]))


def _evenly(
    rng: np.random.Generator, owners: Int64[np.ndarray, "N"], points: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Points in an order whose every beginning has, as far as they go, equally many of each owner."""
    shuffled = rng.permutation(points)
    turn = np.zeros(len(shuffled), np.int64)
    for owner in np.unique(owners[shuffled]):
        own = owners[shuffled] == owner
        turn[own] = np.arange(np.count_nonzero(own))
    return shuffled[np.argsort(turn, kind="stable")]
