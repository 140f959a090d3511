"""Softmax attention with an added bias, by the kernel that is fastest where it runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Float
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
