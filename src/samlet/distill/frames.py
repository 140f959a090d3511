"""From one model's input frame to another's: what is asked of a teacher of another size, and what it answers.

Both frames show the same padded square, so one scale, target / source, serves both axes. Maps are resized
bilinearly, antialiased on the way down; pixels (x, y) count from the centre of the first one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from samlet.types import ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAPS = ("prompted.", "upscaled")  # decoder taps that are maps over the image; all others stay as they are
ANSWERS = "answers."  # what a store holds of the prompts travels with the features, a row for each prompt
ATTENTION = "attention."  # encoder taps that are weights over a grid, which sum to 1 only on their own


def resized(maps: Float[Tensor, "N C h w"], side: int) -> Float[Tensor, "N C side side"]:
    """Square maps at another side; the maps themselves where the side is theirs."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False, antialias=side < maps.shape[-1])


def pixels_at(pixels: Float[Tensor, "B 3 S S"], image_size: int) -> Float[Tensor, "B 3 T T"]:
    """Preprocessed images at another input size; what the smaller frame has lost does not come back."""
    return resized(pixels, image_size)


def prompts_at(prompts: Prompts, source: int, target: int) -> Prompts:
    """Prompts of one input frame in the pixels of another."""
    if source == target:
        return prompts
    coords = (prompts.point_coords + 0.5) * (target / source) - 0.5
    mask = None if prompts.mask_input is None else resized(prompts.mask_input, target // 4)
    return prompts._replace(point_coords=coords, mask_input=mask)


def features_at(features: ImageFeatures, source: int, target: int) -> ImageFeatures:
    """Embedding and taps on the grids that a model of input size `target` would have."""
    if source == target:
        return features
    taps = {
        name: tap if name.startswith((ATTENTION, ANSWERS)) else _rescaled(tap, source, target)
        for name, tap in features.taps.items()
    }
    return ImageFeatures(_rescaled(features.embedding, source, target), taps)


def output_at(output: MaskOutput, source: int, target: int) -> MaskOutput:
    """Masks and maps on the grids that a model of input size `target` would have."""
    if source == target:
        return output
    taps = {name: _rescaled(tap, source, target) if name.startswith(MAPS) else tap for name, tap in output.taps.items()}
    return output._replace(low_res_logits=_rescaled(output.low_res_logits, source, target), taps=taps)


def _rescaled(maps: Float[Tensor, "N C h w"], source: int, target: int) -> Tensor:
    return resized(maps, round(maps.shape[-1] * target / source))
