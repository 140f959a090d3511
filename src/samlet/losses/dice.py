"""The dice loss on mask logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    in_full_precision,
    mean_over_cells,
    reduce_items,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SMOOTHING = 1 / 256**2  # SAM's 1, as a share of its 256 x 256 grid: the same on every grid


def dice_per_mask(
    logits: Float[Tensor, "P M h w"], masks: Float[Tensor, "P h w"], valid: Float[Tensor, "P h w"] | None
) -> Float[Tensor, "P M"]:
    """The dice loss of each of M masks against the prompt's one target."""
    probability = logits.sigmoid()
    target = masks.to(logits.dtype)[:, None]
    overlap = mean_over_cells(probability * target, valid)
    areas = mean_over_cells(probability, valid) + mean_over_cells(target, valid)
    return 1 - (2 * overlap + SMOOTHING) / (areas + SMOOTHING)


@in_full_precision
def dice_loss(
    logits: Float[Tensor, "P M h w"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """One minus the soft overlap of prediction and target, over unpadded cells; mean over masks.

    L = 1 - (2 mean(p y) + e) / (mean(p) + mean(y) + e),  p = sigmoid(logits), e = 1/256^2

    Milletari et al. 2016, arXiv:1606.04797, with SAM's linear denominator (Kirillov et al. 2023, arXiv:2304.02643)
    in means instead of sums, so that the smoothing weighs the same on every grid.

    Raises:
        ValueError: shapes that do not fit; both are named.
    """
    check_dims(logits, 4, "logits")
    check_cells(logits, masks, "masks")
    check_cells(logits, valid, "valid")
    return reduce_items(dice_per_mask(logits, masks, valid).mean(dim=1), reduction)
