"""The focal loss on mask logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    in_full_precision,
    mean_over_cells,
    reduce_items,
    soft_focal,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def focal_per_mask(
    logits: Float[Tensor, "P M h w"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None,
    alpha: float,
    gamma: float,
) -> Float[Tensor, "P M"]:
    """The focal loss of each of M masks against the prompt's one target."""
    target = masks.to(logits.dtype)[:, None].expand_as(logits)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return mean_over_cells(balance * soft_focal(logits, target, gamma), valid)


@in_full_precision
def focal_loss(
    logits: Float[Tensor, "P M h w"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """Focal loss against the covered share y of each cell, mean over unpadded cells and masks.

    L = (alpha y + (1 - alpha)(1 - y)) |y - p|^gamma (-y log p - (1 - y) log(1 - p)),  p = sigmoid(logits)

    For y = 0 or 1 this is the focal loss of RetinaNet (Lin et al. 2017, arXiv:1708.02002); for a cell on the
    outline it is the quality focal loss (Li et al. 2020, arXiv:2006.04388) with its minimum at p = y, where
    the mean of the two hard losses would lie lower for p < y and shrink every mask.

    Raises:
        ValueError: shapes that do not fit; both are named.
    """
    check_dims(logits, 4, "logits")
    check_cells(logits, masks, "masks")
    check_cells(logits, valid, "valid")
    return reduce_items(focal_per_mask(logits, masks, valid, alpha, gamma).mean(dim=1), reduction)
