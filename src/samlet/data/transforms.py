"""Augmentation as one resize: a window of the original frame is laid into the input frame, colours follow.

Image and masks go through the same window, size and filter, so masks follow exactly; without augmentation the
window is the whole image, and the result is `frames.preprocess` to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, UInt8

LOW_RES_STRIDE = 4  # as frames.LOW_RES_STRIDE, which would bring torch along


class Geometry(NamedTuple):
    """Where a piece of the original frame comes to lie at the top left of the input frame."""

    window: tuple[float, float, float, float]  # (x0, y0, x1, y1) in the original frame
    size: tuple[int, int]  # (H, W) it takes up in the input frame
    flip_x: bool = False
    flip_y: bool = False


class Colour(NamedTuple):
    """Factors on brightness, contrast and saturation; 1 changes nothing."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


class Augmentation(NamedTuple):
    """How far a draw may go; the default draws the identity."""

    horizontal_flip: float = 0.0  # probability
    vertical_flip: float = 0.0  # probability
    scale: tuple[float, float] = (1.0, 1.0)  # log-uniform factor on the fit to the input frame
    crop: float = 0.0  # largest share of each side that is cut away before
    brightness: float = 0.0  # factors are drawn from 1 - strength .. 1 + strength
    contrast: float = 0.0
    saturation: float = 0.0


def fit(height: float, width: float, target: float) -> tuple[int, int]:
    """(H, W) with the longest side brought to `target`; rounds as `frames.resized_size`, and at least 1 pixel."""
    scale = target / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def whole(original_size: tuple[int, int], image_size: int) -> Geometry:
    """The identity: the whole image with its longest side at `image_size`."""
    height, width = original_size
    return Geometry((0.0, 0.0, float(width), float(height)), fit(height, width, image_size))


def draw_geometry(
    rng: np.random.Generator, original_size: tuple[int, int], image_size: int, augmentation: Augmentation
) -> Geometry:
    """Crop, then scale relative to the fit, then flip.

    A scale below 1 leaves more padding; above 1 the enlarged image no longer fits and a window of it is drawn.
    Every number is drawn whatever the settings are, so switching one off leaves the others as they were.
    """
    height, width = original_size
    shares, places, (scale_draw, flip_x, flip_y) = rng.random(2), rng.random(4), rng.random(3)
    crop_h, crop_w = np.array([height, width]) * (1 - augmentation.crop * shares)
    low, high = augmentation.scale
    target = image_size * low * (high / low) ** scale_draw
    full = fit(crop_h, crop_w, target)
    size = min(full[0], image_size), min(full[1], image_size)
    window_h, window_w = crop_h * size[0] / full[0], crop_w * size[1] / full[1]
    y0 = places[0] * (height - crop_h) + places[1] * (crop_h - window_h)
    x0 = places[2] * (width - crop_w) + places[3] * (crop_w - window_w)
    window = (float(x0), float(y0), float(min(x0 + window_w, width)), float(min(y0 + window_h, height)))
    flips = bool(flip_x < augmentation.horizontal_flip), bool(flip_y < augmentation.vertical_flip)
    return Geometry(window, size, *flips)


def draw_colour(rng: np.random.Generator, augmentation: Augmentation) -> Colour:
    """Three factors around 1."""
    strengths = np.array([augmentation.brightness, augmentation.contrast, augmentation.saturation])
    return Colour(*(float(factor) for factor in 1 + strengths * rng.uniform(-1, 1, 3)))


def _resize(picture: np.ndarray, geometry: Geometry) -> np.ndarray:
    height, width = geometry.size
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR, box=geometry.window)
    moved = np.asarray(resized)
    return moved[:: -1 if geometry.flip_y else 1, :: -1 if geometry.flip_x else 1]


def transform_image(image: UInt8[np.ndarray, "H W 3"], geometry: Geometry) -> UInt8[np.ndarray, "h w 3"]:
    """The image's window in the input frame, before normalising and padding."""
    return np.ascontiguousarray(_resize(image, geometry))


def transform_mask(mask: Bool[np.ndarray, "H W"], geometry: Geometry) -> Bool[np.ndarray, "h w"]:
    """The mask's window in the input frame: its share of each pixel, cut at one half."""
    return np.ascontiguousarray(_resize(mask.astype(np.uint8) * 255, geometry) > 127)


def change_colour(image: UInt8[np.ndarray, "h w 3"], colour: Colour) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, then contrast around the mean grey, then saturation."""
    picture = Image.fromarray(image)
    if colour.brightness != 1:
        picture = ImageEnhance.Brightness(picture).enhance(colour.brightness)
    if colour.contrast != 1:
        picture = ImageEnhance.Contrast(picture).enhance(colour.contrast)
    if colour.saturation != 1:
        picture = ImageEnhance.Color(picture).enhance(colour.saturation)
    return np.asarray(picture)


def coverage(mask: Bool[np.ndarray, "h w"], image_size: int) -> Float32[np.ndarray, "S/4 S/4"]:
    """Covered share, 0..1, of each cell of the low-res grid; padding is not covered."""
    cells = image_size // LOW_RES_STRIDE
    rows, columns = -(-mask.shape[0] // LOW_RES_STRIDE), -(-mask.shape[1] // LOW_RES_STRIDE)
    padded = np.zeros((rows * LOW_RES_STRIDE, columns * LOW_RES_STRIDE), np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    blocks = padded.reshape(rows, LOW_RES_STRIDE, columns, LOW_RES_STRIDE)
    grid = np.zeros((cells, cells), np.float32)
    grid[:rows, :columns] = blocks.sum(axis=(1, 3), dtype=np.uint8) / np.float32(LOW_RES_STRIDE**2)
    return grid
