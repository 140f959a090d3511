"""What every loss shares: full precision, shape checks, and means that no batch split or padding can change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Reduction = Literal["mean", "none"]
P = ParamSpec("P")
R = TypeVar("R")

NORM_FLOOR = 1e-6  # a shorter feature is not stretched to length 1, so that its gradient stays bounded
CELLS_FLOOR = 1e-6  # cells of a grid: far below what any image covers, far above what overflows when inverted


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a loss outside autocast, on tensors widened to at least float32 (float64 stays)."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        wide_args = [_widened(value) for value in args]
        wide_kwargs = {name: _widened(value) for name, value in kwargs.items()}
        with torch.autocast(first.device.type, enabled=False):
            return function(*wide_args, **wide_kwargs)

    return run


def check_same_shape(first: Tensor, second: Tensor, names: str = "student and teacher") -> None:
    """Refuse what would broadcast in silence.

    Raises:
        ValueError: the shapes differ; both are named.
    """
    if first.shape != second.shape:
        raise ValueError(f"{names} must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}")


def check_dims(value: Tensor, dims: int, name: str) -> None:
    """Refuse a tensor with another number of dimensions.

    Raises:
        ValueError: names the tensor and its shape.
    """
    if value.ndim != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")


def check_cells(values: Tensor, cells: Tensor | None, name: str) -> None:
    """Refuse `cells` (N, h, w) that do not fit `values` (N, ..., h, w).

    Raises:
        ValueError: the shapes do not fit; both are named.
    """
    if cells is not None and cells.shape != (values.shape[0], *values.shape[-2:]):
        raise ValueError(
            f"{name} must be (N, h, w) of the values (N, ..., h, w), got {tuple(cells.shape)} for {tuple(values.shape)}"
        )


def mean_over_cells(values: Float[Tensor, "N M h w"], valid: Float[Tensor, "N h w"] | None) -> Float[Tensor, "N M"]:
    """Mean over the grid, each cell counted by its `valid` share; 0 where nothing is valid."""
    if valid is None:
        return values.mean(dim=(-2, -1))
    weight = valid.to(values.dtype)[:, None]
    total = weight.sum(dim=(-2, -1)).clamp_min(CELLS_FLOOR)
    return (values * weight).sum(dim=(-2, -1)) / total


def reduce_items(items: Float[Tensor, "N"], reduction: Reduction) -> Tensor:
    """The items themselves ("none"), or their mean, which is 0 for no items at all.

    Raises:
        ValueError: another word.
    """
    if reduction == "none":
        return items
    if reduction == "mean":
        return items.sum() / max(items.shape[0], 1)
    raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def unit_channels(features: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C h w"]:
    """Each cell's feature scaled to length 1 over channels."""
    return F.normalize(features, dim=1, eps=NORM_FLOOR)


def bernoulli_cross_entropy(
    logits: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """-y log p - (1 - y) log(1 - p) with p = sigmoid(logits), finite for every logit."""
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))


def soft_focal(
    logits: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], gamma: float
) -> Float[Tensor, "*shape"]:
    """|y - p|^gamma (-y log p - (1 - y) log(1 - p)): the focal loss for a target y anywhere in 0..1.

    At y = 0 or 1 it is the focal loss itself (Lin et al. 2017, arXiv:1708.02002); in between it is the quality
    focal loss (Li et al. 2020, arXiv:2006.04388). Both factors grow with the distance of p from y and the first
    is 0 at p = y, so the minimum, 0, lies there and the gradient points to it from either side.
    """
    distance = (target - logits.sigmoid()).abs()
    return distance.pow(gamma) * bernoulli_cross_entropy(logits, target)
