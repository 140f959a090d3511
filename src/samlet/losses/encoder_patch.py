"""Distillation of patch tokens of the image encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    check_same_shape,
    in_full_precision,
    mean_over_cells,
    reduce_items,
    unit_channels,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@in_full_precision
def encoder_patch_loss(
    student: Float[Tensor, "B C h w"],
    teacher: Float[Tensor, "B C h w"],
    valid: Float[Tensor, "B h w"] | None = None,
    *,
    w_l2: float = 1.0,
    w_cos: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "B"]:
    """Squared error and angle between patch features, mean over unpadded patches.

    L = w_l2 mean_c (f_s - f_t)^2 + w_cos (1 - cos(f_s, f_t)),  with 1 - cos = |f_s/|f_s| - f_t/|f_t||^2 / 2

    Norm and cosine run over channels. The squared error on the neck is how MobileSAM was distilled (Zhang et al.
    2023, arXiv:2306.14289). `valid` is the share of each patch that the image covers; None: all. Gradient
    flows to `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    check_cells(student, valid, "valid")
    teacher = teacher.detach()
    squared = (student - teacher).square().mean(dim=1, keepdim=True)
    one_minus_cos = (unit_channels(student) - unit_channels(teacher)).square().sum(dim=1, keepdim=True) / 2
    cells = w_l2 * squared + w_cos * one_minus_cos
    return reduce_items(mean_over_cells(cells, valid)[:, 0], reduction)
