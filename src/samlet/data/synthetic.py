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

from samlet.data.masks import mask_box
from samlet.data.streams import Stream, generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

Grid = tuple[np.ndarray, np.ndarray]  # x and y of every pixel, -1..1 over the longest side

_SHADOW_REACH = 10  # pixels
_LEAST_SHARE = 0.003  # of the image: objects that show less are not kept as objects


class Scene(NamedTuple):
    """A drawn image and the visible part of each object on it."""

    image: UInt8[np.ndarray, "H W 3"]
    masks: Bool[np.ndarray, "O H W"]


def _colour(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    return rng.uniform(0.08, 0.95, 3)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> Float[np.ndarray, "H W"]:
    """Smooth noise in 0..1 with about `cells` bumps along the longest side."""
    rows, columns = (max(2, round(cells * side / max(shape)) + 1) for side in shape)
    coarse = Image.fromarray(rng.random((rows, columns), np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)).clip(0, 1)


def _share(grid: Grid) -> float:
    """The part of the image's longest side that a piece of the grid spans."""
    return max(float(np.ptp(axis)) for axis in grid) / 2


def _stripes(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(12, 45)
    along = np.float32(np.cos(angle) * frequency) * grid[0] + np.float32(np.sin(angle) * frequency) * grid[1]
    wave = np.sin(along + np.float32(rng.uniform(0, 6)))
    return np.asarray(wave * 2 + 0.5).clip(0, 1)


def _checker(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return np.where(_stripes(rng, grid) > 0.5, np.float32(0.6), np.float32(0)) + _stripes(rng, grid) * 0.4


def _speckle(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return _noise(rng, grid[0].shape, rng.uniform(18, 50) * _share(grid))


def _clouds(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    return _noise(rng, grid[0].shape, rng.uniform(4, 10) * _share(grid))


def _ramp(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    angle, share = rng.uniform(0, 2 * np.pi), _share(grid) or 1.0
    along = np.cos(angle) * (grid[0] - grid[0].mean()) + np.sin(angle) * (grid[1] - grid[1].mean())
    return np.asarray(0.5 + 0.8 / share * along).clip(0, 1)


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
    difference = (spread * (_colour(rng) - first)).astype(np.float32)
    blend = _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng, grid)[..., None].astype(np.float32)
    return np.asarray(first + blend * difference, np.float32)


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


def _around(shape: Bool[np.ndarray, "H W"], margin: int) -> tuple[slice, slice]:
    """Rows and columns around a shape; what is drawn for it stays within."""
    x0, y0, x1, y1 = mask_box(shape)
    return slice(max(0, y0 - margin), y1 + margin), slice(max(0, x0 - margin), x1 + margin)


def _shadow(rng: np.random.Generator, shape: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 1"]:
    """What an object leaves of the light beside it."""
    down, right = (int(offset) for offset in rng.integers(1, 5, 2))
    cast = np.zeros(shape.shape, np.uint8)
    cast[down:, right:] = shape[:-down, :-right] * np.uint8(115)
    soft = Image.fromarray(cast).filter(ImageFilter.GaussianBlur(2.5))
    return 1 - np.asarray(soft, np.float32)[..., None] / 255


def _draw_object(
    rng: np.random.Generator, image: Float[np.ndarray, "H W 3"], grid: Grid, shape: Bool[np.ndarray, "H W"]
) -> None:
    """Shadow, texture and a slant of light, in place."""
    place = _around(shape, _SHADOW_REACH)
    inside, piece = shape[place], (grid[0][place], grid[1][place])
    if rng.random() < 0.7:
        image[place] *= _shadow(rng, inside)
    light = 0.85 + np.float32(rng.uniform(0, 0.35)) * _ramp(rng, piece)[..., None]
    paint = (_paint(rng, piece, 0.8) * light).clip(0, 1)
    image[place] = np.where(inside[..., None], paint, image[place])


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """One scene of (H, W) pixels with 3 to 9 objects, back to front; masks are what is left visible."""
    height, width = size
    grid = _grid(size)
    image = _clutter(rng, _paint(rng, grid, 0.45))
    owner = np.zeros(size, np.uint8)
    for number in range(1, int(rng.integers(3, 10)) + 1):
        shape = _shape(rng, size)
        if shape.any():
            _draw_object(rng, image, grid, shape)
            owner[shape] = number
    image *= 0.75 + 0.5 * _noise(rng, size, 2)[..., None]
    image += 0.015 * rng.standard_normal((*size, 1), np.float32)
    picture = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    masks = [owner == number for number in range(1, int(owner.max()) + 1)]
    kept = [mask for mask in masks if mask.sum() >= max(16, _LEAST_SHARE * height * width)]
    return Scene(np.asarray(picture), np.stack(kept)) if kept else draw_scene(rng, size)


def _grid(size: tuple[int, int]) -> Grid:
    rows, columns = (np.arange(side, dtype=np.float32) / max(size) * 2 - 1 for side in size)
    x, y = np.meshgrid(columns, rows)
    return x, y


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
