"""Distillation of the prompt-conditioned image stream of the two-way transformer."""

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
def prompt_embed_loss(
    student: Float[Tensor, "P C h w"],
    teacher: Float[Tensor, "P C h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    w_mse: float = 0.7,
    w_cos: float = 0.3,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """Angle between the image streams of the same prompt, mean over unpadded cells; blind to their length.

    L = w_mse mean_c (f_s/|f_s| - f_t/|f_t|)^2 + w_cos (1 - cos(f_s, f_t))      [norm and cos over the C channels]

    The first is 2/C of the second: with 256 channels, nearly all of the term is w_cos. `valid` is the share of
    each cell that the prompt's image covers; None: all. Gradient flows to `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    check_cells(student, valid, "valid")
    difference = (unit_channels(student) - unit_channels(teacher.detach())).square()
    chord = difference.sum(dim=1, keepdim=True)
    cells = w_mse * chord / student.shape[1] + w_cos * chord / 2
    return reduce_items(mean_over_cells(cells, valid)[:, 0], reduction)
