"""Distillation of what the mask decoder multiplies into logits: the pixels' features and the masks' vectors."""

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
def decoder_matching_loss(
    student: Float[Tensor, "P C h w"],
    teacher: Float[Tensor, "P C h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    w_mse: float = 1.0,
    w_cos: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """Squared error, angle and divergence of the features before the logits, mean over unpadded cells.

    L = w_mse mean_c (f_s - f_t)^2 + w_cos (1 - cos(f_s, f_t)) + w_kl T^2 KL(p_t || p_s),  p = softmax(f / T)

    Cosine and softmax run over the C channels. The divergence is Hinton's (2015, arXiv:1503.02531), from the teacher's
    side as for the mask tokens: it bears hardest on what the teacher holds high. Vectors P x M x C are a map of one
    row, P x C x 1 x M. `valid` is the share of each cell that the prompt's image covers; None: all. Gradient flows to
    `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    check_cells(student, valid, "valid")
    teacher = teacher.detach()
    squared = (student - teacher).square().mean(dim=1, keepdim=True)
    one_minus_cos = (unit_channels(student) - unit_channels(teacher)).square().sum(dim=1, keepdim=True) / 2
    log_student = (student / temperature).log_softmax(dim=1)
    log_teacher = (teacher / temperature).log_softmax(dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1, keepdim=True)
    cells = w_mse * squared + w_cos * one_minus_cos + w_kl * temperature**2 * divergence
    return reduce_items(mean_over_cells(cells, valid)[:, 0], reduction)
