"""Relational distillation: how the patches of an image lie to each other, whatever space they lie in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from samlet.losses.reduction import NORM_FLOOR, Reduction, check_dims, in_full_precision, reduce_items

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NEAR = (
    0.01  # patches nearer than this share of the mean distance span no full angle, so that its gradient stays bounded
)


@in_full_precision
def rkd_loss(
    student: Float[Tensor, "B N C"],
    teacher: Float[Tensor, "B N D"],
    counted: Float[Tensor, "B N"] | None = None,
    *,
    w_distance: float = 1.0,
    w_angle: float = 2.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "B"]:
    """Distances and angles among N patches of each image, mean over pairs and over triplets of different patches.

    L = w_distance mean_ij l(d_s, d_t) + w_angle mean_ijk l(cos_s, cos_t)
    d_ij = |f_i - f_j| / mean distance,  cos_ijk = cosine of the angle at j between i and k,  l = Huber with delta 1

    Park et al. 2019, arXiv:1904.05068, between the patches of one image instead of the images of a batch; weights
    1 : 2 as theirs. Blind to shift, rotation and scale of the whole, so student and teacher may differ in channels.
    Time and memory grow with N^3. `counted` is 1 for patches that count and 0 for others; None: all count. Gradient
    flows to `student` only.

    Raises:
        ValueError: another number of images or patches; both shapes are named.
    """
    check_dims(student, 3, "student")
    check_dims(teacher, 3, "teacher")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher must have the same images and patches, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    counted = student.new_ones(student.shape[:2]) if counted is None else counted.to(student.dtype)
    if counted.shape != student.shape[:2]:
        raise ValueError(f"counted must be (B, N) of {tuple(student.shape)}, got {tuple(counted.shape)}")
    apart = 1 - torch.eye(student.shape[1], dtype=student.dtype, device=student.device)
    pairs = counted[:, :, None] * counted[:, None, :] * apart
    distances, cosines = _relations(student, pairs)
    with torch.no_grad():
        wanted_distances, wanted_cosines = _relations(teacher, pairs)
    triplets = pairs[:, :, :, None] * pairs[:, :, None, :] * apart  # (j, i, k): the corner first
    value = w_distance * _mean(_huber(distances, wanted_distances), pairs)
    value = value + w_angle * _mean(_huber(cosines, wanted_cosines), triplets)
    return reduce_items(value, reduction)


def _relations(
    patches: Float[Tensor, "B N C"], pairs: Float[Tensor, "B N N"]
) -> tuple[Float[Tensor, "B N N"], Float[Tensor, "B N N N"]]:
    """Distances in units of their mean, and the cosines at corner j (first) between i and k."""
    steps = patches[:, None, :, :] - patches[:, :, None, :]  # (j, i): from j to i
    length = steps.square().sum(dim=3).clamp_min(NORM_FLOOR**2).sqrt()
    mean = _mean(length, pairs)[:, None, None].clamp_min(NORM_FLOOR)
    directions = steps / torch.maximum(length, NEAR * mean.detach())[..., None]
    return length / mean, directions @ directions.transpose(2, 3)


def _huber(one: Tensor, other: Tensor) -> Tensor:
    return F.smooth_l1_loss(one, other, reduction="none")


def _mean(values: Tensor, counted: Tensor) -> Float[Tensor, "B"]:
    return (values * counted).flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(1)
