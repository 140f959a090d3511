"""Softmax attention with an added bias, by the kernel that is fastest where it runs, and some of its rows to see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def biased_attention(
    q: Float[Tensor, "n H L d"],
    k: Float[Tensor, "n H M d"],
    v: Float[Tensor, "n H M d"],
    bias: Float[Tensor, "#n H L M"],
) -> Float[Tensor, "n H L d"]:
    """softmax(q k / sqrt(d) + bias) v for a finite bias with four dimensions: a fused kernel takes no other.

    On a CPU no fused kernel gives the bias a gradient, and the way PyTorch falls back to looks for rows of nothing
    but -inf, three more passes over the scores; a finite bias has none.
    """
    if bias.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu":
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2) + bias
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def cells_at(places: Float[Tensor, "B Q 2"], size: tuple[int, int]) -> Int[Tensor, "B Q 2"]:
    """(row, column) of the cell of an h x w grid at each place; places are (y, x) as shares of the grid's sides."""
    sides = torch.tensor(size, device=places.device)
    return (places * sides).long().clamp_min(0).minimum(sides - 1)


def tokens_at(tokens: Float[Tensor, "B h w C"], cells: Int[Tensor, "B Q 2"]) -> Float[Tensor, "B Q C"]:
    """The tokens of some cells."""
    image = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[image, cells[..., 0], cells[..., 1]]


def within_windows(
    cells: Int[Tensor, "B Q 2"], size: tuple[int, int], window: int
) -> tuple[Int[Tensor, "B Q h"], Int[Tensor, "B Q w"], Bool[Tensor, "B Q h w"]]:
    """How far each cell lies from every row and column of the grid, and which cells share its window (0: all).

    Distances (cell - other) are those between places within the window.
    """
    steps, shared = [], []
    for axis, side in enumerate(size):
        own, other = cells[..., axis, None], torch.arange(side, device=cells.device)
        reach = window or side
        steps.append(own % reach - other % reach)
        shared.append(own // reach == other // reach)
    return steps[0], steps[1], shared[0][..., :, None] & shared[1][..., None, :]


def attention_rows(
    q: Float[Tensor, "B H Q d"],
    k: Float[Tensor, "B h w H d"],
    bias: Float[Tensor, "B H Q h w"],
    seen: Bool[Tensor, "B Q h w"],
) -> Float[Tensor, "B H Q h w"]:
    """softmax(q k / sqrt(d) + bias) over the cells that are `seen`, in full precision; 0 elsewhere and only there.

    The padding of windows that stick out of the map is left out, so a row sums to 1 over the map itself.
    """
    scores = torch.einsum("bmqd,bhwmd->bmqhw", q / math.sqrt(q.shape[-1]), k) + bias
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen[:, None], -torch.inf)
    rows = scores.flatten(3).softmax(dim=-1).view_as(scores)
    return rows.clamp_min(torch.finfo(rows.dtype).tiny) * seen[:, None]
