"""Distillation of the low-res mask logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from samlet.losses.dice import SMOOTHING
from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    check_same_shape,
    in_full_precision,
    mean_over_cells,
    reduce_items,
    soft_focal,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def _bernoulli_kl(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    probability = teacher.sigmoid()
    foreground = F.logsigmoid(teacher) - F.logsigmoid(student)
    background = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return probability * foreground + (1 - probability) * background


def _relative_distance(
    p: Float[Tensor, "P M h w"], q: Float[Tensor, "P M h w"], valid: Float[Tensor, "P h w"] | None
) -> Float[Tensor, "P M"]:
    sizes = mean_over_cells(p.square() + q.square(), valid)
    return mean_over_cells((p - q).square(), valid) / (sizes + SMOOTHING)


@in_full_precision
def dense_mask_logits_loss(
    student: Float[Tensor, "P M h w"],
    teacher: Float[Tensor, "P M h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    w_kl: float = 0.6,
    w_focal: float = 0.4,
    w_dice: float = 0.0,
    gamma: float = 2.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """Divergence of the masks' probabilities, same prompt and same mask index, mean over unpadded cells.

    L = w_kl T^2 KL(Bern(sigmoid(z_t / T)) || Bern(sigmoid(z_s / T))) + w_focal |p_t - p_s|^gamma BCE(p_s, p_t)
        + w_dice mean((p_t - p_s)^2) / (mean(p_t^2) + mean(p_s^2) + e),  e = 1/256^2

    p = sigmoid(z); KL after Hinton et al. 2015, arXiv:1503.02531, with both halves of the Bernoulli: the
    foreground's half alone is least where all is foreground. The second term is the quality focal loss (Li et al.
    2020, arXiv:2006.04388): 0 at p_s = p_t, though BCE is not, and rising to either side. The third is one minus the
    soft Dice coefficient with squares below (Milletari et al. 2016, arXiv:1606.04797), written as a distance: a small
    object weighs as much as a large one, while the means of the others fade with its area. Mean over the M masks.
    Logits lie on the low-res grid of the input frame; `valid` is the share of each cell that the image covers;
    None: all. Gradient flows to `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    check_cells(student, valid, "valid")
    teacher = teacher.detach()
    divergence = temperature**2 * _bernoulli_kl(student / temperature, teacher / temperature)
    cells = w_kl * divergence + w_focal * soft_focal(student, teacher.sigmoid(), gamma)
    per_mask = mean_over_cells(cells, valid)
    if w_dice:
        per_mask = per_mask + w_dice * _relative_distance(student.sigmoid(), teacher.sigmoid(), valid)
    return reduce_items(per_mask.mean(dim=1), reduction)
