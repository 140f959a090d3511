from __future__ import annotations

import math

import pytest
import torch

from samlet.losses import rkd_loss


def _patches(*patches: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([patches], dtype=torch.float64)


# a right triangle with sides 3, 4, 5 and one with three equal sides
RIGHT = _patches((0.0, 0.0), (3.0, 0.0), (0.0, 4.0))
EQUAL = _patches((0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(3) / 2))


def test_values_worked_out_by_hand() -> None:
    """Distances 3, 4, 5 over their mean 4 against 1, 1, 1; cosines at the corners 0, 3/5, 4/5 against 1/2 each."""
    distance = (0.25**2 + 0 + 0.25**2) / 2 / 3
    angle = (0.5**2 + 0.1**2 + 0.3**2) / 2 / 3
    assert float(rkd_loss(EQUAL, RIGHT, w_angle=0.0)) == pytest.approx(distance)
    assert float(rkd_loss(EQUAL, RIGHT, w_distance=0.0)) == pytest.approx(2 * angle), "angles count twice by default"
    assert float(rkd_loss(RIGHT, EQUAL, w_distance=3.0, w_angle=0.5)) == pytest.approx(3 * distance + 0.5 * angle)


def test_large_differences_count_linearly() -> None:
    """Huber: |d| - 1/2 beyond 1."""
    far = _patches((0.0,), (0.0,), (0.0,), (0.0,), (8.0,))  # 4 of 10 pairs at 8: mean 3.2, so 2.5 and 0
    even = torch.eye(5, dtype=torch.float64)[None]  # all pairs alike: 1
    expected = (4 * (1.5 - 0.5) + 6 * 0.5) / 10
    assert float(rkd_loss(even, far, w_angle=0.0)) == pytest.approx(expected)


def test_shift_rotation_and_scale_of_the_whole_cost_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    assert float(rkd_loss(3 * teacher @ rotation + 7, teacher)) < 1e-12
    wider = torch.cat([teacher, torch.zeros(2, 9, 4, dtype=torch.float64)], dim=2)
    assert float(rkd_loss(wider, teacher)) < 1e-12
    assert float(rkd_loss(teacher * torch.arange(1, 7), teacher)) > 1e-3


def test_patches_that_do_not_count_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    counted = torch.ones(2, 7)
    counted[:, 5:] = 0
    loss = rkd_loss(student, teacher, counted)
    torch.testing.assert_close(loss, rkd_loss(student[:, :5], teacher[:, :5]))
    student = student.clone().requires_grad_()
    rkd_loss(student, teacher, counted).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad[:, 5:].any()
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        rkd_loss(student, teacher, torch.ones(2, 3))


def test_one_image_has_a_gradient() -> None:
    """Pitfall 21: relations among the images of a batch are nothing at batch 1, and a constant at batch 2."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 6, 4, generator=generator).requires_grad_()
    rkd_loss(student, torch.randn(1, 6, 4, generator=generator)).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=2) > 0).all()


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-3])
def test_collapsed_or_doubled_patches_keep_the_gradient_bounded(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 8, 4, generator=generator)
    student[:, 1] = student[:, 0] + spread
    collapsed = torch.full((1, 8, 4), 2.0) + spread * torch.randn(1, 8, 4, generator=generator)
    teacher = torch.randn(1, 8, 4, generator=generator)
    for patches, bound in ((student, 10.0), (collapsed, 100 / max(spread, 1e-6))):
        leaf = patches.clone().requires_grad_()
        loss = rkd_loss(leaf, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        assert math.isfinite(loss.item())
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < bound
