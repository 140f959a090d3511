"""Masks follow exactly; without augmentation the dataset's pixels are the predictor's (pitfall 41)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlet.data.streams import Stream, generator
from samlet.data.transforms import (
    Augmentation,
    Colour,
    Geometry,
    change_colour,
    coverage,
    draw_colour,
    draw_geometry,
    fit,
    transform_image,
    transform_mask,
    whole,
)
from samlet.frames import normalize_and_pad, preprocess, resized_size
from tests.data.builders import disc, picture

STRONG = Augmentation(0.5, 0.5, (0.3, 3.0), 0.5, 0.4, 0.4, 0.4)
sizes = st.tuples(st.integers(8, 150), st.integers(8, 150))


@given(sizes, st.integers(0, 2**31), st.sampled_from([32, 64, 96]))
@settings(deadline=None)
def test_a_mask_follows_an_image_that_shows_it(size: tuple[int, int], seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    mask = disc(size, rng.uniform(0, size[1]), rng.uniform(0, size[0]), rng.uniform(1, 40))
    mask[rng.integers(size[0]), rng.integers(size[1])] = True
    geometry = draw_geometry(generator(Stream.GEOMETRY, seed), size, side, STRONG)
    shown = transform_image(np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2), geometry)[..., 0]
    moved = transform_mask(mask, geometry)
    assert moved.shape == geometry.size == shown.shape
    differs = moved != (shown > 127)
    assert not (differs & (np.abs(shown.astype(int) - 127.5) > 1)).any()  # pixels covered by half may fall either way


@given(sizes, st.integers(0, 2**31))
@settings(deadline=None)
def test_windows_lie_in_the_image_and_results_in_the_input_frame(size: tuple[int, int], seed: int) -> None:
    geometry = draw_geometry(generator(Stream.GEOMETRY, seed), size, 64, STRONG)
    x0, y0, x1, y1 = geometry.window
    assert 0 <= x0 < x1 <= size[1]
    assert 0 <= y0 < y1 <= size[0]
    assert 1 <= min(geometry.size) <= max(geometry.size) <= 64


def test_pixels_keep_their_shape_under_scale_and_crop() -> None:
    for seed in range(50):
        geometry = draw_geometry(generator(Stream.GEOMETRY, seed), (300, 400), 128, STRONG)
        x0, y0, x1, y1 = geometry.window
        assert (x1 - x0) / geometry.size[1] == pytest.approx((y1 - y0) / geometry.size[0], rel=0.05)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (200, 131), (33, 33), (7, 90), (128, 128), (1, 600)])
def test_without_augmentation_it_is_preprocess_to_the_bit(size: tuple[int, int]) -> None:
    image = picture(size)
    geometry = draw_geometry(generator(Stream.GEOMETRY, 3), size, 128, Augmentation())
    assert geometry == whole(size, 128)
    pixels = normalize_and_pad(transform_image(image, geometry), 128)
    expected, input_size = preprocess(image, 128)
    assert geometry.size == input_size == resized_size(*size, 128)
    assert torch.equal(pixels, expected)
    colour = draw_colour(generator(Stream.COLOUR, 3), Augmentation())
    assert change_colour(image, colour) is image


def test_padding_is_zero_after_normalisation() -> None:
    geometry = whole((32, 64), 64)
    pixels = normalize_and_pad(transform_image(picture((32, 64)), geometry), 64)
    assert not pixels[:, 32:].any()
    assert pixels[:, :32].std() > 0.5


def test_scale_below_one_pads_and_above_one_fills() -> None:
    small = draw_geometry(generator(Stream.GEOMETRY, 0), (60, 80), 64, Augmentation(scale=(0.5, 0.5)))
    assert small.size == (24, 32)
    assert small.window == (0, 0, 80, 60)
    large = draw_geometry(generator(Stream.GEOMETRY, 0), (60, 80), 64, Augmentation(scale=(2.0, 2.0)))
    assert large.size == (64, 64)
    assert large.window[2] - large.window[0] == pytest.approx(40)


def test_flips_come_at_their_rate_and_mirror() -> None:
    draws = [
        draw_geometry(generator(Stream.GEOMETRY, 0, 0, index), (8, 8), 8, Augmentation(0.5, 0.25))
        for index in range(1000)
    ]
    assert abs(sum(draw.flip_x for draw in draws) / 1000 - 0.5) < 0.05
    assert abs(sum(draw.flip_y for draw in draws) / 1000 - 0.25) < 0.05
    image = picture((8, 8))
    geometry = Geometry((0, 0, 8, 8), (8, 8), True, False)
    assert np.array_equal(transform_image(image, geometry), image[:, ::-1])


def test_switching_one_setting_leaves_the_other_draws() -> None:
    with_flip = draw_geometry(generator(Stream.GEOMETRY, 5), (60, 80), 64, STRONG)
    without = draw_geometry(generator(Stream.GEOMETRY, 5), (60, 80), 64, STRONG._replace(horizontal_flip=0.0))
    assert with_flip.window == without.window


def test_colours_change_as_named() -> None:
    image = picture()
    brighter = change_colour(image, Colour(brightness=1.5)).astype(float)
    assert np.abs(brighter - np.minimum(image * 1.5, 255)).max() <= 1
    grey = change_colour(image, Colour(saturation=0.0))
    assert np.ptp(grey.astype(int), axis=2).max() <= 1
    flat = change_colour(image, Colour(contrast=0.0))
    assert np.ptp(flat) <= 1
    assert abs(float(flat.mean()) - image.mean()) < 8


@given(sizes, st.integers(0, 2**31))
@settings(deadline=None)
def test_coverage_is_the_covered_share_of_each_cell(size: tuple[int, int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(size) < 0.5
    grid = coverage(mask, 152)
    padded = np.zeros((152, 152))
    padded[: size[0], : size[1]] = mask
    assert np.array_equal(grid, padded.reshape(38, 4, 38, 4).mean(axis=(1, 3)).astype(np.float32))


def test_the_longest_side_fits_and_no_side_vanishes() -> None:
    assert fit(3000, 4000, 1024) == (768, 1024)
    assert fit(1, 2000, 64) == (1, 64)
