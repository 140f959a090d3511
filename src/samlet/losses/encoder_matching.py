"""Distillation of several layers of the image encoder at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    check_same_shape,
    in_full_precision,
    mean_over_cells,
    reduce_items,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@in_full_precision
def layer_distance(
    student: Float[Tensor, "B C h w"],
    teacher: Float[Tensor, "B C h w"],
    valid: Float[Tensor, "B h w"] | None,
    *,
    lambda_mse: float,
    lambda_kl: float,
    temperature: float,
) -> Float[Tensor, "B"]:
    """The distance of one matched layer, image by image."""
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    check_cells(student, valid, "valid")
    teacher = teacher.detach()
    squared = (student - teacher).square().mean(dim=1, keepdim=True)
    log_student = (student / temperature).log_softmax(dim=1)
    log_teacher = (teacher / temperature).log_softmax(dim=1)
    divergence = (log_student.exp() * (log_student - log_teacher)).sum(dim=1, keepdim=True)
    cells = lambda_mse * squared + lambda_kl * temperature**2 * divergence
    return mean_over_cells(cells, valid)[:, 0]


def encoder_matching_loss(
    student: Sequence[Float[Tensor, "B _ _ _"]],
    teacher: Sequence[Float[Tensor, "B _ _ _"]],
    valid: Sequence[Float[Tensor, "B _ _"]] | None = None,
    *,
    lambda_mse: float = 1.0,
    lambda_kl: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "B"]:
    """Squared error and divergence of N matched layers, mean over layers, unpadded cells and channels.

    L = 1/N sum_i ( lambda_mse mean_c (f_s - f_t)^2 + lambda_kl T^2 KL(p_s || p_t) ),  p = softmax over channels (f / T)

    Intermediate layers as hints: Romero et al. 2015 (FitNets), arXiv:1412.6550. The divergence is taken from the
    student's side, as the objective was asked for: it bears hardest on channels that the student holds high and the
    teacher low. T^2 keeps the gradient's size (Hinton et al. 2015, arXiv:1503.02531). Layers may differ in channels and
    grid among each other, not between student and teacher. `valid`: for each layer the share of each cell that the
    image covers; None: all. Gradient flows to `student` only.

    Raises:
        ValueError: no layers or unlike numbers of them, or shapes that differ; both are named.
    """
    layers = len(student)
    if not layers or len(teacher) != layers or (valid is not None and len(valid) != layers):
        given = "none" if valid is None else len(valid)
        raise ValueError(f"as many layers are needed on each side, got {layers} and {len(teacher)}, valid for {given}")
    settings = {"lambda_mse": lambda_mse, "lambda_kl": lambda_kl, "temperature": temperature}
    distances = [
        layer_distance(student[i], teacher[i], None if valid is None else valid[i], **settings) for i in range(layers)
    ]
    return reduce_items(torch.stack(distances).mean(dim=0), reduction)
