from __future__ import annotations

import pytest
import torch

from samlet.losses import encoder_patch_loss


def _patch(*channels: float) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "l2", "one_minus_cos"),
    [
        ((1.0, 0.0), (0.0, 1.0), 1.0, 1.0),
        ((2.0, 0.0), (-1.0, 0.0), 4.5, 2.0),
        ((3.0, 4.0), (6.0, 8.0), 12.5, 0.0),
        ((1.0, 1.0), (1.0, 0.0), 0.5, 1 - 0.5**0.5),
    ],
)
def test_values_worked_out_by_hand(
    student: tuple[float, ...], teacher: tuple[float, ...], l2: float, one_minus_cos: float
) -> None:
    loss = encoder_patch_loss(_patch(*student), _patch(*teacher), w_l2=1.0, w_cos=0.0)
    assert float(loss) == pytest.approx(l2)
    loss = encoder_patch_loss(_patch(*student), _patch(*teacher), w_l2=0.0, w_cos=1.0)
    assert float(loss) == pytest.approx(one_minus_cos)
    loss = encoder_patch_loss(_patch(*student), _patch(*teacher), w_l2=0.5, w_cos=3.0)
    assert float(loss) == pytest.approx(0.5 * l2 + 3.0 * one_minus_cos)


def test_cells_count_by_their_valid_share() -> None:
    student = torch.tensor([[[[1.0, 3.0]]]])
    loss = encoder_patch_loss(student, torch.zeros(1, 1, 1, 2), torch.tensor([[[1.0, 0.25]]]), w_l2=1.0, w_cos=0.0)
    assert float(loss) == pytest.approx((1 * 1 + 9 * 0.25) / 1.25)


def test_a_dead_patch_keeps_the_gradient_bounded() -> None:
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    encoder_patch_loss(student, torch.ones(1, 4, 2, 2)).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
