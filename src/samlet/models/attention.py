"""Softmax attention with an added bias, by the kernel that is fastest where it runs, and some of its rows to see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


FEW_TOKENS = 1024  # a map, or window, whose bias is small
WIDEST_HEAD = 256  # that fused kernels take


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


def positioned_attention(
    q: Float[Tensor, "n H L d"],
    k: Float[Tensor, "n H L d"],
    v: Float[Tensor, "n H L d"],
    along_h: Float[Tensor, "n H L h"],
    along_w: Float[Tensor, "n H L w"],
) -> Float[Tensor, "n H L d"]:
    """softmax(q k / sqrt(d) + along_h[row of the key] + along_w[its column]) v over a map of h x w = L tokens.

    The L x L bias of all heads, 805 MB for ViT-B at 1024, is never whole in memory where the map is large: a CPU
    takes one head at a time, to the same bits, and a GPU the form without a bias.
    """
    on_cpu = q.device.type == "cpu"
    too_wide = q.shape[3] + sum(_sides(along_h, along_w)) > WIDEST_HEAD
    if q.shape[2] <= FEW_TOKENS or (too_wide and not on_cpu):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=summed_bias(along_h, along_w))
    if not on_cpu:
        return attention_by_indicators(q, k, v, along_h, along_w)
    heads = [slice(head, head + 1) for head in range(q.shape[1])]
    parts = [
        F.scaled_dot_product_attention(
            q[:, head], k[:, head], v[:, head], summed_bias(along_h[:, head], along_w[:, head])
        )
        for head in heads
    ]
    return torch.cat(parts, dim=1)


def attention_by_indicators(
    q: Float[Tensor, "n H L d"],
    k: Float[Tensor, "n H L d"],
    v: Float[Tensor, "n H L d"],
    along_h: Float[Tensor, "n H L h"],
    along_w: Float[Tensor, "n H L w"],
) -> Float[Tensor, "n H L d"]:
    """`positioned_attention` as plain attention, which fused kernels compute without ever writing the scores.

    [q, sqrt(d) along_h, sqrt(d) along_w] . [k, e_row, e_column] / sqrt(d) = q k / sqrt(d) + along_h + along_w, with
    unit vectors e: d + h + w channels (208 for ViT-H at 1024) in place of d and a bias. Values are padded to as many.
    """
    h, w = _sides(along_h, along_w)
    width = q.shape[3]
    rows = torch.eye(h, dtype=k.dtype, device=k.device).repeat_interleave(w, dim=0)
    columns = torch.eye(w, dtype=k.dtype, device=k.device).repeat(h, 1)
    places = torch.cat([rows, columns], dim=1).expand(*k.shape[:2], -1, -1)
    queries = torch.cat([q, along_h * math.sqrt(width), along_w * math.sqrt(width)], dim=3)
    values = F.pad(v, (0, h + w))
    keys = torch.cat([k, places], dim=3)
    return F.scaled_dot_product_attention(queries, keys, values, scale=1 / math.sqrt(width))[..., :width]


def _sides(along_h: Tensor, along_w: Tensor) -> tuple[int, int]:
    return along_h.shape[3], along_w.shape[3]


def summed_bias(along_h: Float[Tensor, "n H L h"], along_w: Float[Tensor, "n H L w"]) -> Float[Tensor, "n H L L"]:
    """The bias of every pair (query, key)."""
    return (along_h[..., :, None] + along_w[..., None, :]).flatten(3)


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
