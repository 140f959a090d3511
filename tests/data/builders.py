"""Small data sets on disk for the tests of the data room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from samlet.data.configs import DatasetConfig


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 <= radius**2)


def picture(size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array).save(path)
    return path


def write_split(
    place: Path, images: int = 4, objects: int = 3, size: tuple[int, int] = (48, 64), seed: int = 0
) -> Path:
    """Mask folders with discs that do not touch the border."""
    rng = np.random.default_rng(seed)
    for index in range(images):
        save(picture(size, seed * 1000 + index), place / "images" / f"im{index:03d}.png")
        for number in range(objects):
            x, y = rng.uniform(12, size[1] - 12), rng.uniform(12, size[0] - 12)
            save(disc(size, x, y, rng.uniform(5, 10)), place / "masks" / f"im{index:03d}" / f"{number}.png")
    return place


def write_small(root: Path, train: int = 6, val: int = 2) -> Path:
    write_split(root / "train", train, seed=1)
    write_split(root / "val", val, seed=2)
    return root


def config(root: Path, **changes: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"root": root, **changes})
