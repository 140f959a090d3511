"""Augmentation as one resize: a window of the original frame is laid into the input frame, colours follow.

Image and masks go through the same window, size and filter, so masks follow exactly; without augmentation the
window is the whole image, and the result is `frames.preprocess` to the bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from samlet.data.masks import mask_box

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, UInt8

LOW_RES_STRIDE = 4  # as frames.LOW_RES_STRIDE, which would bring torch along
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


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
    variants: int | None = None  # different draws of an image; epochs take turns. None: a new one each epoch

    def of(self, epoch: int) -> int:
        """The epoch whose draw this epoch takes."""
        return epoch if self.variants is None else epoch % self.variants


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


def _resize(picture: np.ndarray, size: tuple[int, int], window: tuple[float, float, float, float]) -> np.ndarray:
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=window)
    return np.asarray(resized)


def _flip(picture: np.ndarray, geometry: Geometry) -> np.ndarray:
    return np.ascontiguousarray(picture[:: -1 if geometry.flip_y else 1, :: -1 if geometry.flip_x else 1])


def _reach(low: int, high: int, start: float, end: float, size: int) -> tuple[int, int]:
    """The range of resized pixels that source pixels low..high can touch, along one axis."""
    scale = (end - start) / size
    margin = max(1.0, 1 / scale) + 1  # the filter reaches one source pixel, or one resized one where those are larger
    first, last = (low - start) / scale - margin, (high - start) / scale + margin
    return min(size, max(0, math.floor(first))), max(0, min(size, math.ceil(last)))


def transform_image(image: UInt8[np.ndarray, "H W 3"], geometry: Geometry) -> UInt8[np.ndarray, "h w 3"]:
    """The image's window in the input frame, before normalising and padding."""
    return _flip(_resize(image, geometry.size, geometry.window), geometry)


def transform_mask(mask: Bool[np.ndarray, "H W"], geometry: Geometry) -> Bool[np.ndarray, "h w"]:
    """The mask's window in the input frame: its share of each pixel, cut at one half.

    Only the part that the object can touch is resized; the rest is empty anyway.
    """
    moved = np.zeros(geometry.size, np.bool_)
    x0, y0, x1, y1 = mask_box(mask)
    (wx0, wy0, wx1, wy1), (height, width) = geometry.window, geometry.size
    left, right = _reach(x0, x1, wx0, wx1, width)
    top, bottom = _reach(y0, y1, wy0, wy1, height)
    if left < right and top < bottom:
        step_x, step_y = (wx1 - wx0) / width, (wy1 - wy0) / height
        part = (
            wx0 + left * step_x,
            wy0 + top * step_y,
            wx1 if right == width else wx0 + right * step_x,
            wy1 if bottom == height else wy0 + bottom * step_y,
        )
        values = mask.astype(np.uint8) * 255
        moved[top:bottom, left:right] = _resize(values, (bottom - top, right - left), part) > 127
    return _flip(moved, geometry)


def change_colour(image: UInt8[np.ndarray, "h w 3"], colour: Colour) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast around the mean grey and saturation as one affine map of (R, G, B), then cut to 0..255."""
    if colour == Colour():
        return image
    mean_grey = float(image[::4, ::4].reshape(-1, 3).mean(axis=0) @ _LUMA)
    saturate = colour.saturation * np.eye(3) + (1 - colour.saturation) * _LUMA
    offset = (1 - colour.contrast) * colour.brightness * mean_grey
    matrix = np.column_stack([colour.contrast * colour.brightness * saturate, [offset] * 3])
    mapped = Image.fromarray(image).convert("RGB", tuple(float(value) for value in matrix.ravel()))
    return np.asarray(mapped)


def coverage(mask: Bool[np.ndarray, "h w"], image_size: int) -> Float32[np.ndarray, "S/4 S/4"]:
    """Covered share, 0..1, of each cell of the low-res grid; padding is not covered."""
    cells = image_size // LOW_RES_STRIDE
    rows, columns = -(-mask.shape[0] // LOW_RES_STRIDE), -(-mask.shape[1] // LOW_RES_STRIDE)
    padded = np.zeros((rows * LOW_RES_STRIDE, columns * LOW_RES_STRIDE), np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    quads = padded.view(np.uint32)  # four pixels a word: bytes add up without carries, then across the word
    bands = quads[0::4] + quads[1::4] + quads[2::4] + quads[3::4]
    grid = np.zeros((cells, cells), np.float32)
    grid[:rows, :columns] = ((bands * np.uint32(0x01010101)) >> np.uint32(24)) / np.float32(LOW_RES_STRIDE**2)
    return grid
