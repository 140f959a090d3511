"""Masks load whatever they are stored as (pitfall 37), and what is measured on them is never degenerate (38, 40)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter

from samlet.data.masks import binarize, centre_point, holds_labels, mask_box, object_labels, read_mask
from samlet.errors import DataError
from tests.data.builders import disc, save

SIZE = (40, 56)
MASK = disc(SIZE, 20, 18, 9)

masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans()).filter(
    lambda mask: bool(mask.any())
)


@pytest.mark.parametrize("top", [1, 2, 127, 255])
def test_any_two_values_are_a_mask(tmp_path: Path, top: int) -> None:
    path = save(MASK.astype(np.uint8) * top, tmp_path / "m.png")
    assert np.array_equal(read_mask(path, SIZE), MASK)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_any_mode_is_a_mask(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "m.png"
    if mode == "I;16":
        Image.fromarray(MASK.astype(np.uint16) * 65535).save(path)
    elif mode == "P":
        image = Image.fromarray(MASK.astype(np.uint8))
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.save(path)
    else:
        Image.fromarray(MASK.astype(np.uint8) * 255).convert(mode).save(path)
    assert np.array_equal(read_mask(path, SIZE), MASK)


def test_a_mask_drawn_in_the_alpha_channel_is_read() -> None:
    values = np.dstack([np.zeros((*SIZE, 3), np.uint8), MASK.astype(np.uint8) * 255])
    assert np.array_equal(binarize(values), MASK)


def test_soft_edges_are_cut_at_half_and_numbers_are_refused(tmp_path: Path) -> None:
    soft = np.asarray(Image.fromarray(MASK.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.7)))
    assert not holds_labels(soft)
    assert np.count_nonzero(read_mask(save(soft, tmp_path / "soft.png"), SIZE) ^ MASK) <= 4
    numbered = MASK.astype(np.uint8) + disc(SIZE, 45, 30, 5) * np.uint8(2)
    assert holds_labels(numbered)
    with pytest.raises(DataError, match="instance_labels"):
        read_mask(save(numbered, tmp_path / "labels.png"), SIZE)
    assert holds_labels(np.where(disc(SIZE, 2, 2, 1), 255, numbered).astype(np.uint8))


def test_sizes_must_agree_and_a_turned_mask_is_recognised(tmp_path: Path) -> None:
    path = save(MASK, tmp_path / "m.png")
    with pytest.raises(DataError, match=r"56 x 40 pixels but its image is 40 x 56.*EXIF"):
        read_mask(path, SIZE[::-1])
    with pytest.raises(DataError, match=r"m\.png.*but its image is 9 x 8"):
        read_mask(path, (8, 9))
    with pytest.raises(DataError, match="empty"):
        read_mask(save(np.zeros(SIZE, np.uint8), tmp_path / "e.png"), SIZE)


def test_255_is_void_unless_numbers_run_through_to_it() -> None:
    assert object_labels(np.array([[0, 1, 7, 255]], np.uint8)) == [1, 7]
    assert object_labels(np.array([[0, 255]], np.uint8)) == [255]
    assert object_labels(np.arange(256, dtype=np.uint8)[None]) == list(range(1, 256))
    assert object_labels(np.array([[0, 1, 255, 300]], np.uint16)) == [1, 255, 300]


@given(masks)
def test_boxes_have_area_and_hold_the_mask_tightly(mask: np.ndarray) -> None:
    x0, y0, x1, y1 = mask_box(mask)
    assert 0 <= x0 < x1 <= mask.shape[1]
    assert 0 <= y0 < y1 <= mask.shape[0]
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    for edge in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]):
        assert edge.any()


@given(masks)
@settings(deadline=None)
def test_the_centre_point_is_a_pixel_of_the_mask_and_the_deepest(mask: np.ndarray) -> None:
    x, y = centre_point(mask)
    assert mask[y, x]
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded) - 1

    def depth(row: int, column: int) -> float:
        return float(np.hypot(*(outside - [row, column]).T).min())

    assert depth(y, x) >= max(depth(*pixel) for pixel in np.argwhere(mask)) - 1e-9
    assert centre_point(mask) == (x, y)


def test_the_centre_of_an_off_diagonal_box_is_its_centre() -> None:
    mask = np.zeros((50, 90), np.bool_)
    mask[10:21, 40:81] = True  # pitfall 40: ((x0 + y0) / 2, (x1 + y1) / 2) would be (25, 50)
    assert centre_point(mask) == (60, 15)


def test_at_the_border_the_image_ends_the_object() -> None:
    mask = np.zeros((30, 30), np.bool_)
    mask[:11, :11] = True
    assert centre_point(mask) == (5, 5)
    assert centre_point(np.ones((1, 1), np.bool_)) == (0, 0)
