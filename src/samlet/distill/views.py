"""What one model, student or teacher, made of a batch: the two values that every objective compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from samlet.types import ImageFeatures, MaskOutput

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam


class View(NamedTuple):
    """One model's features of the images and its answers to the prompts."""

    features: ImageFeatures
    output: MaskOutput


def encode_projected(sam: Sam, pixels: Float[Tensor, "B 3 S S"], taps: Sequence[str]) -> ImageFeatures:
    """`Sam.encode` with block taps brought to 256 channels by the model's own frozen neck convolution."""
    features = sam.encode(pixels, taps=taps)
    projected = {
        name: sam.project_to_neck(value) if name.startswith("blocks.") else value
        for name, value in features.taps.items()
    }
    return ImageFeatures(features.embedding, projected)
