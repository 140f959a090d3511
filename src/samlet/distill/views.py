"""What one model, student or teacher, made of a batch: the two values that every objective compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from samlet.types import ImageFeatures, MaskOutput

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam


NECK = "@neck"  # ends the name of a block that is wanted through the model's own frozen neck convolution
EMBED_DIM = 256


class View(NamedTuple):
    """One model's features of the images and its answers to the prompts."""

    features: ImageFeatures
    output: MaskOutput


def encode_tapped(
    sam: Sam, pixels: Float[Tensor, "B 3 S S"], taps: Sequence[str], places: Float[Tensor, "B Q 2"] | None = None
) -> ImageFeatures:
    """`Sam.encode`, with those taps that end in `@neck` brought to 256 channels by the frozen neck convolution."""
    asked = list(dict.fromkeys(name.removesuffix(NECK) for name in taps))
    features = sam.encode(pixels, asked, places)
    seen = {
        name: sam.project_to_neck(features.taps[name.removesuffix(NECK)])
        if name.endswith(NECK)
        else features.taps[name]
        for name in taps
    }
    return ImageFeatures(features.embedding, seen)


def channels_of(sam: Sam, tap: str) -> int:
    """Channels of a tap of `encode_tapped`.

    Raises:
        SamletError: a tap this model does not have.
    """
    channels = sam.tap_channels(tap.removesuffix(NECK))
    return EMBED_DIM if tap.endswith(NECK) else channels
