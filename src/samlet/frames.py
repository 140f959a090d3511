"""The two frames and the way between them: THE preprocessing of every image, mask, point and box.

Original frame: the image on disk, (H, W) pixels. Input frame: S x S; the image is resized by its longest side,
normalised, then padded right and below with zeros (padding before normalising is a well-known trap).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, on the scale 0..255, RGB, as SAM was trained
PIXEL_STD = (58.395, 57.12, 57.375)
PREPROCESSING = f"longest side, PIL bilinear, mean {PIXEL_MEAN}, std {PIXEL_STD}, then zero padding"
"""What features of an image depend on besides its pixels; stores of features compare it word by word."""
LOW_RES_STRIDE = 4  # the mask decoder answers on a grid of S/4 x S/4


def resized_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(H, W) of an image whose longest side is brought to `image_size`; halves round up, as in SAM.

    No side falls under one pixel, so that a strip of 1 x 2000 pixels stays an image.
    """
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_longest_side(image: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resize as SAM does: PIL's antialiased bilinear filter, longest side to `image_size`."""
    height, width = resized_size(image.shape[0], image.shape[1], image_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalize_and_pad(resized: UInt8[np.ndarray, "h w 3"], image_size: int) -> Float[torch.Tensor, "3 S S"]:
    """Subtract SAM's mean, divide by its deviation, then pad right and below with zeros."""
    height, width = resized.shape[:2]
    pixels = torch.zeros(3, image_size, image_size)
    inside = pixels[:, :height, :width]  # filled in place: a third of the time of permuting, scaling and padding
    inside.copy_(torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))))
    inside.sub_(torch.tensor(PIXEL_MEAN).view(3, 1, 1)).div_(torch.tensor(PIXEL_STD).view(3, 1, 1))
    return pixels


def preprocess(
    image: UInt8[np.ndarray, "H W 3"], image_size: int
) -> tuple[Float[torch.Tensor, "3 S S"], tuple[int, int]]:
    """An RGB image as the encoder wants it, and the (H, W) that it takes up in the input frame."""
    resized = resize_longest_side(image, image_size)
    return normalize_and_pad(resized, image_size), (resized.shape[0], resized.shape[1])


def to_input_coords(
    coords: Float[torch.Tensor, "*batch 2"], original_size: tuple[int, int], input_size: tuple[int, int]
) -> Float[torch.Tensor, "*batch 2"]:
    """(x, y) pixels of the original frame in pixels of the input frame; boxes as two points."""
    scale = (input_size[1] / original_size[1], input_size[0] / original_size[0])
    return coords * torch.tensor(scale, dtype=coords.dtype, device=coords.device)


def postprocess_masks(
    low_res_logits: Float[torch.Tensor, "P M h w"],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
) -> Float[torch.Tensor, "P M H W"]:
    """Low-res logits in the original frame: enlarge to S x S, cut the padding away, resize; all bilinear."""
    logits = F.interpolate(low_res_logits, (image_size, image_size), mode="bilinear", align_corners=False)
    logits = logits[..., : input_size[0], : input_size[1]]
    return F.interpolate(logits, original_size, mode="bilinear", align_corners=False)


def valid_cells(input_sizes: torch.Tensor, grid: int, image_size: int) -> Float[torch.Tensor, "B grid grid"]:
    """Share of each cell of a grid over the input frame that the image covers: 1 inside, 0 in the padding.

    A cell cut by the image's edge counts by its covered share, so losses do not depend on the grid's resolution.
    """
    cell = image_size / grid
    starts = torch.arange(grid, device=input_sizes.device) * cell
    covered = ((input_sizes[..., None].float() - starts) / cell).clamp(0, 1)  # (B, 2, grid)
    return covered[:, 0, :, None] * covered[:, 1, None, :]
