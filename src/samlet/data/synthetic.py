"""Procedurally drawn scenes with exact instance masks: textured shapes that overlap, and clutter that is no object.

An object is a closed shape with a texture and a shadow of its own; neither colour nor texture alone gives it
away, for the ground is textured from the same palette, and lines, rings and specks lie about on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter, zoom

from samlet.data.streams import Stream, generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

Grid = tuple[np.ndarray, np.ndarray]  # x and y of every pixel, -1..1 over the longest side

_LEAST_SHARE = 0.003  # of the image: objects that show less are not kept as objects


class Scene(NamedTuple):
    """A drawn image and the visible part of each object on it."""

    image: UInt8[np.ndarray, "H W 3"]
    masks: Bool[np.ndarray, "O H W"]


def _colour(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    return rng.uniform(0.08, 0.95, 3)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> Float[np.ndarray, "H W"]:
    """Smooth noise in 0..1 with about `cells` bumps a side."""
    coarse = rng.random((cells + 3, cells + 3)).astype(np.float32)
    factor = [(side + 1) / cells for side in shape]
    smooth: Float[np.ndarray, "H W"] = zoom(coarse, factor, order=1)[: shape[0], : shape[1]]
    return smooth.clip(0, 1)


def _stripes(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(12, 45)
    wave = np.sin((np.cos(angle) * grid[0] + np.sin(angle) * grid[1]) * frequency + rng.uniform(0, 6))
    return np.asarray(wave * 2 + 0.5).clip(0, 1)


def _checker(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return np.where(_stripes(rng, grid) > 0.5, 0.6, 0.0) + _stripes(rng, grid) * 0.4


def _speckle(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return _noise(rng, grid[0].shape, int(rng.integers(18, 50)))


def _clouds(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return _noise(rng, grid[0].shape, int(rng.integers(3, 9)))


def _ramp(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(0.5 + 0.8 * (np.cos(angle) * grid[0] + np.sin(angle) * grid[1])).clip(0, 1)


def _plain(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return np.full_like(grid[0], rng.random())


_TEXTURES: tuple[Callable[[np.random.Generator, Grid], np.ndarray], ...] = (
    _stripes,
    _checker,
    _speckle,
    _clouds,
    _ramp,
    _plain,
)


def _paint(rng: np.random.Generator, grid: Grid, spread: float) -> Float[np.ndarray, "H W 3"]:
    """A texture between two colours; `spread` says how far apart they may be."""
    first = _colour(rng)
    second = np.clip(first + spread * (_colour(rng) - first), 0, 1)
    blend = _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng, grid)[..., None].astype(np.float32)
    return np.asarray(first * (1 - blend) + second * blend, np.float32)


def _outline(rng: np.random.Generator) -> Float[np.ndarray, "n 2"]:
    """A closed curve around the origin with mean radius about 1: ellipse, polygon, star or blob."""
    kind = int(rng.integers(4))
    if kind == 1:  # a polygon
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        spaced = np.linspace(0, 2 * np.pi, len(angles), endpoint=False)
        angles = 0.35 * angles + 0.65 * spaced
        radius = rng.uniform(0.8, 1.25, len(angles))
    else:
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        radius = np.ones(96)
        if kind == 2:  # a star
            radius += rng.uniform(0.2, 0.45) * np.sin(angles * int(rng.integers(3, 7)))
        if kind == 3:  # a blob
            for wave in range(2, 6):
                radius += rng.normal(0, 0.22 / wave) * np.sin(wave * angles + rng.uniform(0, 6))
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _shape(rng: np.random.Generator, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """A placed, stretched and turned outline, sometimes with a hole, as a mask."""
    height, width = size
    reach = max(size) * rng.uniform(0.055, 0.2) * (1.3 if rng.random() < 0.15 else 1.0)
    stretch, turn = rng.uniform(0.5, 1.0), rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    curve = _outline(rng) * [reach, reach * stretch] @ rotation
    centre = rng.uniform(0.02, 0.98, 2) * [width, height]
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    draw.polygon([tuple(point) for point in curve + centre], fill=255)
    if rng.random() < 0.12:
        draw.polygon([tuple(point) for point in 0.45 * curve + centre], fill=0)
    return np.asarray(picture) > 0


def _clutter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Lines, rings and specks that belong to no object."""
    height, width = image.shape[:2]
    picture = Image.fromarray((image * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(6, 22))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        ink = tuple(int(255 * part) for part in _colour(rng))
        reach = rng.uniform(0.02, 0.35) * max(height, width)
        kind = int(rng.integers(3))
        if kind == 0:
            angle = rng.uniform(0, 2 * np.pi)
            end = (x + reach * np.cos(angle), y + reach * np.sin(angle))
            draw.line([(x, y), end], fill=ink, width=int(rng.integers(1, 3)))
        elif kind == 1:
            draw.ellipse([x - reach / 3, y - reach / 3, x + reach / 3, y + reach / 3], outline=ink, width=1)
        else:
            speck = rng.uniform(0.5, 0.008 * max(height, width) + 0.6)
            draw.ellipse([x - speck, y - speck, x + speck, y + speck], fill=ink)
    return np.asarray(picture).astype(np.float32) / 255


def _cast_shadow(rng: np.random.Generator, image: np.ndarray, shape: Bool[np.ndarray, "H W"]) -> np.ndarray:
    offset = rng.integers(1, 5, 2)
    soft = gaussian_filter(np.roll(shape, tuple(offset), (0, 1)).astype(np.float32), 2.5, truncate=2)
    return np.asarray(image * (1 - 0.45 * soft[..., None]))


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """One scene of (H, W) pixels with 3 to 9 objects, back to front; masks are what is left visible."""
    height, width = size
    longest = max(size)
    grid = tuple(np.meshgrid(np.arange(width) / longest * 2 - 1, np.arange(height) / longest * 2 - 1))
    assert len(grid) == 2
    image = _clutter(rng, _paint(rng, grid, 0.45))
    owner = np.zeros(size, np.int32)
    for number in range(1, int(rng.integers(3, 10)) + 1):
        shape = _shape(rng, size)
        if rng.random() < 0.7:
            image = _cast_shadow(rng, image, shape)
        shade = 1 + rng.uniform(0, 0.35) * _ramp(rng, grid)[..., None] - 0.15
        image = np.where(shape[..., None], np.clip(_paint(rng, grid, 0.8) * shade, 0, 1), image)
        owner[shape] = number
    light = 0.75 + 0.5 * _noise(rng, size, 2)[..., None]
    image = np.clip(image * light + rng.normal(0, 0.015, (*size, 1)), 0, 1)
    picture = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    masks = [owner == number for number in range(1, int(owner.max()) + 1)]
    kept = [mask for mask in masks if mask.sum() >= max(16, _LEAST_SHARE * height * width)]
    if not kept:
        return draw_scene(rng, size)
    return Scene(np.asarray(picture), np.stack(kept))


def write_scene(folder: Path, name: str, scene: Scene) -> None:
    """Write a scene in the layout of mask folders: `image/<name>.png` and `mask/<name>/<k>.png`."""
    masks = folder / "mask" / name
    masks.mkdir(parents=True, exist_ok=True)
    (folder / "image").mkdir(exist_ok=True)
    Image.fromarray(scene.image).save(folder / "image" / f"{name}.png", compress_level=1)
    for number, mask in enumerate(scene.masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{number:02d}.png", compress_level=1)


def write_dataset(root: Path, num_train: int, num_val: int, image_size: int = 256, seed: int = 0) -> None:
    """Draw a data set: `train/` and `val/` with `image/` and `mask/<name>/*.png`, a pure function of the seed.

    The longest side of every image is `image_size`; a third each are square, wide and tall.
    """
    short = image_size * 3 // 4
    shapes = ((image_size, image_size), (short, image_size), (image_size, short))
    for part, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        for index in range(count):
            scene = draw_scene(generator(Stream.SCENE, seed, part, index), shapes[index % 3])
            write_scene(root / split, f"scene_{index:04d}", scene)
