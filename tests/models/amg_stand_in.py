"""A stand-in for a model that sees round things: an image that tells where each of its crops lies, and the answers."""

from __future__ import annotations

import numpy as np
import torch

from samlet.frames import resized_size
from samlet.models.amg.predicting import Answers

GROWN = (0.6, 1.0, 1.7)  # radii of the three answers to a click


def scene(height: int, width: int) -> np.ndarray:
    """An image whose pixel (x, y) says so: red and green are the rests by 256, blue has the quotients' four bits."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=-1).astype(np.uint8)


class Blobs:
    """Answers a click with three sizes of the thing whose centre is nearest; `centres`: x, y, radius, height each."""

    def __init__(self, centres: np.ndarray, image_size: int = 1024) -> None:
        self.centres, self.image_size = centres, image_size
        self.asked: list[int] = []
        self.reset_image()

    def set_image(self, image: np.ndarray) -> None:
        red, green, blue = (int(value) for value in image[0, 0])
        self.corner = np.array([red + 256 * (blue % 16), green + 256 * (blue // 16)])
        self.original_size: tuple[int, int] | None = (image.shape[0], image.shape[1])
        self.input_size: tuple[int, int] | None = resized_size(*self.original_size, self.image_size)

    def reset_image(self) -> None:
        self.original_size = self.input_size = None

    def at_points(self, points: np.ndarray, min_iou: float | None) -> Answers:
        assert self.original_size is not None
        assert self.input_size is not None
        self.asked.append(len(points))
        points = points + self.corner
        away = np.linalg.norm(points[:, None] - self.centres[None, :, :2], axis=2)
        nearest = self.centres[away.argmin(axis=1)]
        cells = (np.arange(self.image_size // 4) + 0.5) * 4 * max(self.original_size) / self.image_size
        u, v = cells + self.corner[0], cells + self.corner[1]
        square = (u - nearest[:, :1])[:, None, :] ** 2 + (v - nearest[:, 1:2])[:, :, None] ** 2
        radius = nearest[:, 2, None] * np.array(GROWN)
        logits = np.exp(-square[:, None] / (2 * radius[..., None, None] ** 2)) - 0.5
        logits = torch.from_numpy(logits * nearest[:, 3, None, None, None]).float()
        iou = torch.from_numpy(1 - 0.1 * np.arange(3) - away.min(axis=1, keepdims=True) / 400).float()
        rows = torch.arange(len(points))[iou.max(dim=1).values > (-np.inf if min_iou is None else min_iou)]
        return Answers(rows, logits[rows], iou[rows])
