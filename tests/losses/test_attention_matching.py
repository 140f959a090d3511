from __future__ import annotations

import math

import pytest
import torch

from samlet.losses import attention_matching_loss
from samlet.losses.attention_matching import on_common_grid


def _rows(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[list(rows)]], dtype=torch.float64)


def test_values_worked_out_by_hand() -> None:
    student, teacher = _rows([0.5, 0.5], [0.25, 0.75]), _rows([0.75, 0.25], [0.25, 0.75])
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(attention_matching_loss(student, teacher)) == pytest.approx(first / 2)
    counts = torch.tensor([[1.0, 0.5]])
    assert float(attention_matching_loss(student, teacher, counts)) == pytest.approx(first / 1.5)
    assert float(attention_matching_loss(teacher, student)) != pytest.approx(first / 2), "the direction shows"


def test_keys_that_do_not_count_are_left_out_and_the_rest_sums_to_one() -> None:
    student, teacher = _rows([0.1, 0.1, 0.8]), _rows([0.6, 0.2, 0.2])
    loss = attention_matching_loss(student, teacher, keys=torch.tensor([[1.0, 1.0, 0.0]]))
    assert float(loss) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    half = attention_matching_loss(student, teacher, keys=torch.tensor([[1.0, 1.0, 0.5]]))
    p, q = [0.1 / 0.6, 0.1 / 0.6, 0.4 / 0.6], [0.6 / 0.9, 0.2 / 0.9, 0.1 / 0.9]
    assert float(half) == pytest.approx(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))


def test_a_window_is_compared_with_a_whole_map_in_the_window() -> None:
    window, whole = _rows([0.5, 0.5, 0.0, 0.0]), _rows([0.3, 0.1, 0.2, 0.4])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(attention_matching_loss(window, whole)) == pytest.approx(expected)
    assert float(attention_matching_loss(whole, window)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_more_queries_heads_or_finer_keys_of_the_same_rows_cost_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(2, 3, 5, 4, generator=generator).softmax(dim=-1) for _ in range(2))
    loss = attention_matching_loss(student, teacher)
    for axis in (1, 2):
        more = (side.repeat_interleave(2, axis) for side in (student, teacher))
        torch.testing.assert_close(attention_matching_loss(*more), loss)
    finer = (side.repeat_interleave(4, 3) / 4 for side in (student, teacher))
    torch.testing.assert_close(attention_matching_loss(*finer), loss)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-12])
def test_vanishing_weights_keep_loss_and_gradient_bounded(weight: float) -> None:
    student = torch.tensor([[[[weight, 1 - weight]]]], requires_grad=True)
    loss = attention_matching_loss(student, torch.tensor([[[[0.9, 0.1]]]]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert 0 <= float(loss.detach()) < 20
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_wrong_shapes_of_counts_are_refused() -> None:
    maps = torch.rand(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"queries must fit.*\(2, 4\)"):
        attention_matching_loss(maps, maps, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"keys must fit.*\(2, 5\)"):
        attention_matching_loss(maps, maps, keys=torch.ones(2, 5))


def test_resampling_averages_heads_and_adds_up_cells() -> None:
    fine = torch.zeros(1, 2, 1, 4, 4)
    fine[0, 0, 0, 0, 1] = 1.0  # head 0 looks at one cell of the first quarter
    fine[0, 1, 0, 2:, 2:] = 0.25  # head 1 at all of the last
    one, other = on_common_grid(fine, torch.full((1, 3, 1, 2, 2), 0.25))
    torch.testing.assert_close(one[0, 0, 0], torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    torch.testing.assert_close(other[0, 0, 0], torch.full((2, 2), 0.25))
    swapped = on_common_grid(torch.full((1, 3, 1, 2, 2), 0.25), fine)
    torch.testing.assert_close(swapped[1], one)
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 4, 4\) and \(1, 2, 2, 4, 4\)"):
        on_common_grid(fine, torch.zeros(1, 2, 2, 4, 4))
