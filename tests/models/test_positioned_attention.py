"""Attention with decomposed relative positions, without the bias of all heads ever being in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samlet.models.attention import FEW_TOKENS, attention_by_indicators, positioned_attention

HEADS, WIDTH = 3, 10


def drawn(h: int, w: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    last = (WIDTH, WIDTH, WIDTH, h, w)
    return [torch.randn(2, HEADS, h * w, size, dtype=dtype) for size in last]


def with_a_bias(q: Tensor, k: Tensor, v: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """The formula, pair by pair of query and key."""
    rows = torch.arange(q.shape[2]) // along_w.shape[3]
    columns = torch.arange(q.shape[2]) % along_w.shape[3]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + along_h[..., rows] + along_w[..., columns]
    return scores.softmax(dim=3) @ v


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.numel = max(self.numel, *made)
        return out


@pytest.mark.parametrize("size", [(5, 7), (36, 30)])
def test_is_the_formula(size: tuple[int, int]) -> None:
    given = drawn(*size, dtype=torch.float64)
    assert (size[0] * size[1] > FEW_TOKENS) == (size == (36, 30))
    torch.testing.assert_close(positioned_attention(*given), with_a_bias(*given), rtol=1e-12, atol=1e-12)


def test_head_by_head_changes_no_bit() -> None:
    q, k, v, along_h, along_w = drawn(36, 30)
    bias = (along_h[..., :, None] + along_w[..., None, :]).flatten(3)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.equal(positioned_attention(q, k, v, along_h, along_w), whole)


def test_the_bias_of_all_heads_is_never_there() -> None:
    given = drawn(36, 30)
    tokens = 36 * 30
    with torch.no_grad(), Largest() as largest:
        positioned_attention(*given)
    assert largest.numel == 2 * tokens * tokens  # one head of both images; with all heads three times as much


def test_a_form_without_bias_is_the_formula_and_makes_nothing_of_its_size() -> None:
    given = drawn(6, 4, torch.float64)
    torch.testing.assert_close(attention_by_indicators(*given), with_a_bias(*given), rtol=1e-12, atol=1e-12)
    large = drawn(36, 30)
    with torch.no_grad(), Largest() as largest:
        attention_by_indicators(*large)
    assert largest.numel < (36 * 30) ** 2


def test_a_form_without_bias_has_the_formulas_gradients() -> None:
    given = [x.requires_grad_() for x in drawn(6, 4, torch.float64)]
    weights = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    wanted = torch.autograd.grad((with_a_bias(*given) * weights).sum(), given)
    found = torch.autograd.grad((attention_by_indicators(*given) * weights).sum(), given)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
