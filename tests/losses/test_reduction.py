from __future__ import annotations

import pytest
import torch

from samlet.losses.reduction import in_full_precision, mean_over_cells, reduce_items


def test_autocast_is_off_inside_and_half_precision_widened() -> None:
    @in_full_precision
    def product(first: torch.Tensor, *, second: torch.Tensor) -> torch.Tensor:
        return first @ second

    values = torch.linspace(0, 1, 9).view(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (values @ values).dtype == torch.bfloat16
        torch.testing.assert_close(product(values, second=values), values.double().matmul(values.double()).float())
        assert product(values.bfloat16(), second=values).dtype == torch.float32
    assert product(values.double(), second=values.double()).dtype == torch.float64


def test_cells_count_by_their_share() -> None:
    values = torch.tensor([[[[1.0, 5.0]]], [[[2.0, 8.0]]]])
    valid = torch.tensor([[[1.0, 0.5]], [[0.0, 0.0]]])
    assert mean_over_cells(values, valid).tolist() == [[pytest.approx(3.5 / 1.5)], [0.0]]
    assert mean_over_cells(values, None).tolist() == [[3.0], [5.0]]
    assert mean_over_cells(values, valid > 0).tolist() == [[3.0], [0.0]]


def test_reductions() -> None:
    items = torch.tensor([1.0, 3.0])
    assert reduce_items(items, "mean") == 2
    assert reduce_items(items, "none") is items
    assert reduce_items(items[:0], "mean") == 0
