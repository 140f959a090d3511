"""Simulated users: clicks and boxes for an object, as pure functions of its mask and a generator.

Everything is in pixels of the input frame. A drawn prompt is a row of tokens by upstream's rule: points first;
without a box one padding point (label -1) follows; with a box its two corners do, and no padding point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from samlet.data.masks import mask_box
from samlet.types import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, PADDING, POSITIVE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int64

Mode = Literal["point", "box", "mixed"]
Box = tuple[float, float, float, float]

_MAX_JITTER = 20 / 1024  # of the input frame's side: SAM 2's bound of 20 pixels at 1024
_NEIGHBOURHOOD = 0.5  # negative clicks fall within a box enlarged by this share of its sides ...
_NEIGHBOURHOOD_LEAST = 8  # ... and by this many pixels at least
_LEAST_SIDE = 1 / 16  # of the image: the smallest box that is drawn without ground truth


class PromptRow(NamedTuple):
    """One prompt's T tokens."""

    coords: Float32[np.ndarray, "T 2"]  # (x, y)
    labels: Int64[np.ndarray, "T"]


class PromptSettings(NamedTuple):
    """How prompts are drawn; counts are inclusive ranges."""

    mode: Mode = "mixed"
    positive_points: tuple[int, int] = (1, 1)
    negative_points: tuple[int, int] = (0, 0)
    box_jitter: float = 0.1  # share of the side
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # weights of points, box, box and points in mode "mixed"
    fixed: bool = False  # an object of an image-variant has the same prompt in every epoch


def make_row(points: np.ndarray, labels: np.ndarray, box: Box | None) -> PromptRow:
    """Points and an optional box as tokens, by upstream's rule."""
    if box is None:
        tail, marks = np.zeros((1, 2)), [PADDING]
    else:
        tail, marks = np.array(box).reshape(2, 2), [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
    coords = np.concatenate([np.asarray(points, np.float64).reshape(-1, 2), tail])
    return PromptRow(coords.astype(np.float32), np.concatenate([labels, marks]).astype(np.int64))


def sample_pixels(
    rng: np.random.Generator, allowed: Bool[np.ndarray, "h w"], count: int, origin: tuple[int, int] = (0, 0)
) -> Float32[np.ndarray, "n 2"]:
    """At most `count` different true pixels as (x, y), uniformly; `origin` is where `allowed` lies."""
    places = np.flatnonzero(allowed)
    chosen = places[rng.choice(len(places), min(count, len(places)), replace=False)] if len(places) else places
    rows, columns = np.divmod(chosen, allowed.shape[1])
    return np.stack([columns + origin[0], rows + origin[1]], axis=1).astype(np.float32)


def positive_clicks(rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], count: int) -> Float32[np.ndarray, "n 2"]:
    """Clicks on the object, uniformly over its pixels."""
    x0, y0, x1, y1 = mask_box(mask)
    return sample_pixels(rng, mask[y0:y1, x0:x1], count, (x0, y0))


def negative_clicks(rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], count: int) -> Float32[np.ndarray, "n 2"]:
    """Clicks beside the object, uniformly over its neighbourhood; none where the object fills the image."""
    x0, y0, x1, y1 = mask_box(mask)
    reach_x = max(_NEIGHBOURHOOD_LEAST, int(_NEIGHBOURHOOD * (x1 - x0)))
    reach_y = max(_NEIGHBOURHOOD_LEAST, int(_NEIGHBOURHOOD * (y1 - y0)))
    left, top = max(0, x0 - reach_x), max(0, y0 - reach_y)
    around = mask[top : y1 + reach_y, left : x1 + reach_x]
    return sample_pixels(rng, ~around, count, (left, top))


def jitter_box(rng: np.random.Generator, box: Box, share: float, frame: tuple[int, int], image_size: int) -> Box:
    """Move each edge by a uniform draw from +-min(share of the side, 20 px at 1024), clipped to the image.

    Edges move outwards as often as inwards. A side that would fall under one pixel stays as it was.
    """
    x0, y0, x1, y1 = box
    reach = np.minimum(share * np.array([x1 - x0, y1 - y0]), _MAX_JITTER * image_size)
    moved = np.array(box) + rng.uniform(-1, 1, 4) * np.tile(reach, 2)
    limit = np.array([frame[1], frame[0]])
    low, high = np.clip(moved[:2], 0, limit), np.clip(moved[2:], 0, limit)
    collapsed = high - low < 1
    low, high = np.where(collapsed, box[:2], low), np.where(collapsed, box[2:], high)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _kind(rng: np.random.Generator, settings: PromptSettings) -> tuple[bool, bool]:
    """(with points, with box)."""
    edges = np.cumsum(settings.mix) / sum(settings.mix)
    draw = int(np.searchsorted(edges, rng.random(), side="right"))
    if settings.mode == "mixed":
        return draw != 1, draw != 0
    return settings.mode == "point", settings.mode == "box"


def _count(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1], endpoint=True))


def draw_prompt(
    rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], image_size: int, settings: PromptSettings
) -> PromptRow:
    """A prompt for the object of a mask that is not empty, over the unpadded part of the input frame."""
    with_points, with_box = _kind(rng, settings)
    positive = positive_clicks(rng, mask, _count(rng, settings.positive_points) * with_points)
    negative = negative_clicks(rng, mask, _count(rng, settings.negative_points) * with_points)
    box = None
    if with_box:
        size = (mask.shape[0], mask.shape[1])
        box = jitter_box(rng, mask_box(mask), settings.box_jitter, size, image_size)
    labels = np.array([POSITIVE] * len(positive) + [NEGATIVE] * len(negative), np.int64)
    return make_row(np.concatenate([positive, negative]), labels, box)


def _blind_box(rng: np.random.Generator, frame: tuple[int, int]) -> Box:
    """A box with log-uniform sides, uniformly placed."""
    height, width = frame
    sides = np.array([width, height]) * _LEAST_SIDE ** rng.random(2)
    sides = np.clip(sides, 1, [width, height])
    start = rng.random(2) * (np.array([width, height]) - sides)
    return float(start[0]), float(start[1]), float(start[0] + sides[0]), float(start[1] + sides[1])


def draw_blind_prompt(rng: np.random.Generator, frame: tuple[int, int], settings: PromptSettings) -> PromptRow:
    """A prompt where no mask is known: one click anywhere on the (H, W) image, or a box of any size, or both.

    A box with a click has the click inside.
    """
    with_points, with_box = _kind(rng, settings)
    box = _blind_box(rng, frame)
    x0, y0, x1, y1 = box if with_box else (0.0, 0.0, float(frame[1]), float(frame[0]))
    point = np.array([[x0, y0]]) + rng.random((1, 2)) * np.array([[x1 - x0, y1 - y0]])
    point = np.floor(point).clip(0, [frame[1] - 1, frame[0] - 1])
    points = point if with_points else point[:0]
    return make_row(points, np.full(len(points), POSITIVE), box if with_box else None)
