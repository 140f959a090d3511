"""The nouns that every room shares: named tuples of tensors, so that they compile, export and collate.

Two frames: the *original frame* is the image as it lies on disk, (H, W) pixels; the *input frame* is the
S x S square that the encoder sees: the image resized by its longest side, padded right and below.
`low-res` is the input frame at a quarter of the resolution, S/4 x S/4: the mask decoder's own grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# Labels of prompt points: SAM's own, spelled as in its ONNX export.
NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, PADDING = 0, 1, 2, 3, -1


class Prompts(NamedTuple):
    """P prompts on B images, each one a row of at most T points; a box is two points labelled 2 and 3.

    `point_labels` 1: positive, 0: negative, 2/3: top-left / bottom-right corner of the box, -1: SAM's padding
    point, which upstream appends to prompts without a box and which takes part in attention.
    """

    image_index: Int[Tensor, "P"]
    point_coords: Float[Tensor, "P T 2"]  # (x, y) pixels in the input frame
    point_labels: Int[Tensor, "P T"]
    mask_input: Float[Tensor, "P 1 h w"] | None = None  # low-res logits of an earlier answer
    absent: Bool[Tensor, "P T"] | None = None  # True: a hole that is no token at all; None: there are no holes


class ImageFeatures(NamedTuple):
    """What `Sam.encode` returns: the image embedding, and the taps that were asked for, by name."""

    embedding: Float[Tensor, "B 256 h w"]
    taps: dict[str, Float[Tensor, "B C th tw"]]


class MaskOutput(NamedTuple):
    """What `Sam.decode` returns for P prompts and M masks each (M = 4: the single mask, then the three).

    Asked with `min_iou`, it has rows for the prompts marked in `kept` only.
    """

    low_res_logits: Float[Tensor, "P M h w"]  # a mask is where logits > 0
    iou_predictions: Float[Tensor, "P M"]  # raw regression, no sigmoid
    mask_tokens: Float[Tensor, "P 4 256"]
    taps: dict[str, Tensor]
    kept: Bool[Tensor, "P"] | None = None


class Sample(NamedTuple):
    """One image in the input frame with the objects that were drawn from it and a prompt for each."""

    pixels: Float[Tensor, "3 S S"]  # normalised, then padded with zeros
    input_size: tuple[int, int]  # (H, W) of the unpadded part of the input frame
    prompts: Prompts  # image_index is 0 throughout
    masks: Float[Tensor, "O h w"]  # ground truth on the low-res grid: covered share of each cell, 0..1
    labelled: Bool[Tensor, "P"]  # False: the prompt was drawn without ground truth, its mask is zero
    image_id: str
    skipped: tuple[str, ...] = ()  # what could not be used on the way to this sample, one sentence each
    embedding: Float[Tensor, "256 h w"] | None = None  # the frozen student's, where it was computed before
    stored: dict[str, Tensor] | None = None  # what teachers' stores hold of it, as stored: "teacher/feature"
    answers: dict[str, Tensor] | None = None  # and of its prompts, a row each
    target_of: Int[Tensor, "P"] | None = None  # which of `masks` is whose; None: one a prompt, in their order
    background: Bool[Tensor, "P"] | None = None  # True: known to lie on no object; None: no prompt is


class Objects(NamedTuple):
    """Objects of several images on the low-res grid."""

    masks: Float[Tensor, "O h w"]
    image: Int[Tensor, "O"]  # whose each is


class Batch(NamedTuple):
    """Samples side by side; prompts of all images in one list."""

    pixels: Float[Tensor, "B 3 S S"]
    input_sizes: Int[Tensor, "B 2"]
    prompts: Prompts
    masks: Float[Tensor, "O h w"]
    labelled: Bool[Tensor, "P"]
    image_ids: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # of all its samples
    draw: int = 0  # names what is drawn while it is learnt from: the same for all micro-batches of one optimizer step
    embedding: Float[Tensor, "B 256 h w"] | None = None  # the frozen student's, in place of running its image encoder
    stored: dict[str, Tensor] | None = None  # what teachers' stores hold of its images, as stored: "teacher/feature"
    answers: dict[str, Tensor] | None = None  # and of its prompts, a row each
    target_of: Int[Tensor, "P"] | None = None  # which of `masks` is whose; None: one a prompt, in their order
    background: Bool[Tensor, "P"] | None = None  # True: known to lie on no object; None: no prompt is
    mask_image: Int[Tensor, "O"] | None = None  # whose image each of `masks` is; None: a prompt is about its own alone
    objects: Objects | None = None  # of a part: all that the whole has; None: a prompt is about its own alone


class Terms(NamedTuple):
    """The terms of one loss by name: `raw` as measured, `weighted` as they enter the sum; `seen` is measured only."""

    raw: dict[str, Float[Tensor, ""]]
    weighted: dict[str, Float[Tensor, ""]]
    seen: dict[str, Float[Tensor, ""]]
