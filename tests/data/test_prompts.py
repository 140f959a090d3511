"""No degenerate prompt is ever emitted (pitfall 38); jitter is symmetric and clipped (39); draws are pure."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from samlet.data.prompts import (
    Mode,
    PromptRow,
    PromptSettings,
    draw_blind_prompt,
    draw_prompt,
    jitter_box,
    negative_clicks,
)
from samlet.data.streams import Stream, generator
from tests.data.builders import disc
from tests.data.test_masks import masks

modes = st.sampled_from(["point", "box", "mixed"])


def _check(row: PromptRow, frame: tuple[int, int]) -> None:
    """Upstream's rule: points, then a padding point or two corners with area; all of it on the image."""
    labels, coords = row.labels.tolist(), row.coords
    assert labels[-2:] == [2, 3] or labels[-1] == -1
    has_box = labels[-1] == 3
    points = labels[:-2] if has_box else labels[:-1]
    assert set(points) <= {0, 1}
    assert has_box or 1 in points
    assert np.isfinite(coords).all()
    inside = (coords[: len(points)] >= 0) & (coords[: len(points)] <= [frame[1] - 1, frame[0] - 1])
    assert inside.all()
    if has_box:
        (x0, y0), (x1, y1) = coords[-2:]
        assert 0 <= x0 < x1 <= frame[1]
        assert 0 <= y0 < y1 <= frame[0]
        assert min(x1 - x0, y1 - y0) >= 1 - 1e-4
    else:
        assert coords[-1].tolist() == [0, 0]


@given(masks, modes, st.integers(0, 2**31), st.tuples(st.integers(1, 5), st.integers(0, 4)), st.floats(0, 0.5))
@settings(deadline=None)
def test_prompts_are_never_degenerate(
    mask: np.ndarray, mode: Mode, seed: int, most: tuple[int, int], jitter: float
) -> None:
    settings = PromptSettings(mode, (1, most[0]), (0, most[1]), jitter)
    row = draw_prompt(generator(Stream.PROMPT, seed), mask, 64, settings)
    _check(row, (mask.shape[0], mask.shape[1]))
    for (x, y), label in zip(row.coords.astype(int), row.labels, strict=True):
        if label in {0, 1}:
            assert mask[y, x] == bool(label)
    again = draw_prompt(generator(Stream.PROMPT, seed), mask, 64, settings)
    assert np.array_equal(row.coords, again.coords)


@given(st.tuples(st.integers(1, 64), st.integers(1, 64)), modes, st.integers(0, 2**31))
@settings(deadline=None)
def test_blind_prompts_are_never_degenerate(frame: tuple[int, int], mode: Mode, seed: int) -> None:
    _check(draw_blind_prompt(generator(Stream.PROMPT, seed), frame, PromptSettings(mode)), frame)


def test_jitter_moves_edges_in_as_often_as_out_and_stays_in_the_image() -> None:
    box, frame = (20.0, 30.0, 60.0, 50.0), (64, 64)
    moved = np.array([jitter_box(generator(Stream.PROMPT, seed), box, 0.1, frame, 1024) for seed in range(4000)])
    shift = moved - box
    assert np.abs(shift.mean(axis=0)).max() < 0.1
    assert (np.abs(shift) <= [4, 2, 4, 2]).all()
    assert np.abs(shift).max(axis=0).tolist() > [3.9, 1.9, 3.9, 1.9]
    assert 0.45 < (shift[:, 0] < 0).mean() < 0.55
    at_border = np.array(
        [jitter_box(generator(Stream.PROMPT, seed), (0, 0, 64, 64), 0.5, frame, 64) for seed in range(50)]
    )
    assert at_border.min() >= 0
    assert at_border.max() <= 64


def test_jitter_is_bounded_by_20_pixels_at_1024() -> None:
    moved = np.array(
        [
            jitter_box(generator(Stream.PROMPT, seed), (200, 200, 900, 900), 0.1, (1024, 1024), 1024)
            for seed in range(500)
        ]
    )
    assert np.abs(moved - [200, 200, 900, 900]).max() <= 20


def test_mixed_draws_points_boxes_and_both_by_weight() -> None:
    mask = disc((64, 64), 30, 30, 12)
    settings = PromptSettings("mixed", mix=(0.5, 0.3, 0.2))
    rows = [draw_prompt(generator(Stream.PROMPT, seed), mask, 64, settings) for seed in range(2000)]
    kinds = ["both" if len(row.labels) == 3 else "point" if row.labels[-1] == -1 else "box" for row in rows]
    for kind, weight in (("point", 0.5), ("box", 0.3), ("both", 0.2)):
        assert abs(kinds.count(kind) / 2000 - weight) < 0.04


def test_point_counts_span_the_range_and_negatives_lie_near() -> None:
    mask = disc((128, 128), 30, 30, 10)
    settings = PromptSettings("point", (1, 3), (0, 2))
    rows = [draw_prompt(generator(Stream.PROMPT, seed), mask, 128, settings) for seed in range(300)]
    assert {int((row.labels == 1).sum()) for row in rows} == {1, 2, 3}
    assert {int((row.labels == 0).sum()) for row in rows} == {0, 1, 2}
    clicks = np.concatenate([row.coords[row.labels == 0] for row in rows])
    assert np.abs(clicks - 30).max() <= 21
    assert len(negative_clicks(generator(Stream.PROMPT, 0), np.ones((8, 8), np.bool_), 3)) == 0


def test_clicks_cover_the_object_uniformly() -> None:
    mask = np.zeros((10, 20), np.bool_)
    mask[2:8, 4:16] = True
    clicks = np.concatenate(
        [
            draw_prompt(generator(Stream.PROMPT, seed), mask, 64, PromptSettings("point")).coords[:1]
            for seed in range(3000)
        ]
    )
    assert np.abs(clicks.mean(axis=0) - [9.5, 4.5]).max() < 0.2
    assert len(np.unique(clicks, axis=0)) == mask.sum()
