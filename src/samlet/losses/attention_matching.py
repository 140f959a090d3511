"""Distillation of attention: what each query looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from samlet.losses.reduction import (
    CELLS_FLOOR,
    Reduction,
    check_dims,
    check_same_shape,
    in_full_precision,
    reduce_items,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ATTENTION_FLOOR = 1e-8  # a weight below it counts as this, so that no logarithm runs away


@in_full_precision
def attention_matching_loss(
    student: Float[Tensor, "N H Q K"],
    teacher: Float[Tensor, "N H Q K"],
    queries: Float[Tensor, "N Q"] | None = None,
    keys: Float[Tensor, "N K"] | None = None,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "N"]:
    """Divergence of the rows of attention matrices, mean over heads and the queries that count.

    L = mean_hq KL(a_t || a_s),  a = the row's weights on the keys that both sides see, made to sum to 1

    As Wang et al. 2020 (MiniLM), arXiv:2002.10957, from the teacher's side. A key of weight 0 is one that its side
    cannot see: a window of the one against the whole map of the other is compared in that window. `queries` and `keys`
    are how much each counts, such as the share of a cell that the image covers; None: all alike. Gradient flows to
    `student` only.

    Raises:
        ValueError: shapes that differ; both are named.
    """
    check_dims(student, 4, "student")
    check_same_shape(student, teacher)
    for name, counted, axis in (("queries", queries, 2), ("keys", keys, 3)):
        if counted is not None and counted.shape != (student.shape[0], student.shape[axis]):
            raise ValueError(f"{name} must fit the maps {tuple(student.shape)}, got {tuple(counted.shape)}")
    teacher = teacher.detach()
    common = ((student > 0) & (teacher > 0)).to(student.dtype)
    if keys is not None:
        common = common * keys.to(student.dtype)[:, None, None]
    of_student, of_teacher = (_shares(weights * common) for weights in (student, teacher))
    logs = of_teacher.clamp_min(ATTENTION_FLOOR).log() - of_student.clamp_min(ATTENTION_FLOOR).log()
    rows = (of_teacher * logs).sum(dim=3).clamp_min(0).mean(dim=1)
    if queries is None:
        return reduce_items(rows.mean(dim=1), reduction)
    counts = queries.to(rows.dtype)
    return reduce_items((rows * counts).sum(dim=1) / counts.sum(dim=1).clamp_min(CELLS_FLOOR), reduction)


def _shares(weights: Float[Tensor, "N H Q K"]) -> Float[Tensor, "N H Q K"]:
    return weights / weights.sum(dim=3, keepdim=True).clamp_min(ATTENTION_FLOOR)


def on_common_grid(
    student: Float[Tensor, "B H Q h w"], teacher: Float[Tensor, "B G Q a b"]
) -> tuple[Float[Tensor, "B 1 Q c d"], Float[Tensor, "B 1 Q c d"]]:
    """Rows of any number of heads over any grids, averaged over heads and added up in the cells of the coarser grid.

    Raises:
        ValueError: another number of images or queries; both shapes are named.
    """
    if student.ndim != 5 or teacher.ndim != 5 or student.shape[::2][:2] != teacher.shape[::2][:2]:
        raise ValueError(
            f"attention over maps must be (B, heads, Q, h, w) with the same B and Q, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    grid = (min(student.shape[3], teacher.shape[3]), min(student.shape[4], teacher.shape[4]))
    one, other = (_summed(rows.mean(dim=1), grid)[:, None] for rows in (student, teacher))
    return one, other


def _summed(rows: Float[Tensor, "B Q h w"], grid: tuple[int, int]) -> Float[Tensor, "B Q c d"]:
    if rows.shape[2:] == torch.Size(grid):
        return rows
    return F.adaptive_avg_pool2d(rows, grid) * (rows.shape[2] * rows.shape[3] / (grid[0] * grid[1]))
