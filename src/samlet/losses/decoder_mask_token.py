"""Distillation of the mask decoder's mask tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samlet.losses.reduction import Reduction, check_dims, check_same_shape, in_full_precision, reduce_items

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@in_full_precision
def decoder_mask_token_loss(
    student: Float[Tensor, "P M C"],
    teacher: Float[Tensor, "P M C"],
    *,
    w_kl: float = 1.0,
    temperature: float = 0.5,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """Divergence of the softmax over a token's channels, mean over the M tokens of a prompt.

    L = w_kl mean_m KL(softmax(z_t / T) || softmax(z_s / T))

    After Hinton et al. 2015, arXiv:1503.02531, without their factor T^2. Gradient flows to `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 3, "student")
    check_same_shape(student, teacher)
    log_student = (student / temperature).log_softmax(dim=-1)
    log_teacher = (teacher.detach() / temperature).log_softmax(dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return reduce_items(w_kl * divergence.mean(dim=1), reduction)
