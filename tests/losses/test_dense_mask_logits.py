from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlet.losses import dense_mask_logits_loss

logit = st.floats(-200, 200, allow_nan=False)


dice_alone = partial(dense_mask_logits_loss, w_kl=0.0, w_focal=0.0, w_dice=1.0)


def _cell(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_values_worked_out_by_hand() -> None:
    student, teacher = _cell(0.0), _cell(math.log(3))  # p_s = 1/2, p_t = 3/4
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    focal = 0.25**2 * math.log(2)
    assert float(dense_mask_logits_loss(student, teacher, w_kl=1.0, w_focal=0.0)) == pytest.approx(kl)
    assert float(dense_mask_logits_loss(student, teacher, w_kl=0.0, w_focal=1.0)) == pytest.approx(focal)
    loss = dense_mask_logits_loss(student, teacher, w_kl=0.6, w_focal=0.4)
    assert float(loss) == pytest.approx(0.6 * kl + 0.4 * focal)
    loss = dense_mask_logits_loss(student, 2 * teacher, w_kl=1.0, w_focal=0.0, temperature=2.0)
    assert float(loss) == pytest.approx(4 * kl)


def test_the_dice_distance_by_hand() -> None:
    distance = (0.75 - 0.5) ** 2 / (0.75**2 + 0.5**2 + 1 / 256**2)
    loss = dense_mask_logits_loss(_cell(0.0), _cell(math.log(3)), w_kl=0.0, w_focal=0.0, w_dice=2.0)
    assert float(loss) == pytest.approx(2 * distance)


def test_the_dice_distance_does_not_fade_with_the_area() -> None:
    def missed(side: int, loss: Callable[..., torch.Tensor]) -> float:
        teacher = torch.full((1, 1, 32, 32), -20.0, dtype=torch.float64)
        student = teacher.clone()
        teacher[..., :side, :side], student[..., :side, side : 2 * side] = 20.0, 20.0
        return float(loss(student, teacher))

    assert missed(2, dice_alone) == pytest.approx(missed(8, dice_alone), rel=5e-3)
    assert missed(8, dice_alone) == pytest.approx(1, rel=1e-3)
    assert missed(8, dense_mask_logits_loss) > 10 * missed(2, dense_mask_logits_loss)


@given(student=logit, teacher=logit)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_dice_distance_lies_between_zero_and_one_and_is_zero_at_the_teacher(student: float, teacher: float) -> None:
    value = _cell(student).requires_grad_()
    loss = dice_alone(value, _cell(teacher))
    loss.backward()  # type: ignore[no-untyped-call]
    assert 0 <= loss.item() <= 1
    assert float(dice_alone(_cell(teacher), _cell(teacher))) == 0
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4)])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(3.0, 5.0), (5.0, 3.0), (-3.0, 5.0), (3.0, -5.0), (-3.0, -5.0), (-5.0, -3.0)],
)
def test_gradient_points_to_the_teacher_in_every_quadrant(
    student: float, teacher: float, weights: tuple[float, float], gamma: float
) -> None:
    """Pitfall 8: with half of the Bernoulli, background cells are pulled to foreground."""
    value = _cell(student).requires_grad_()
    loss = dense_mask_logits_loss(value, _cell(teacher), w_kl=weights[0], w_focal=weights[1], gamma=gamma)
    loss.backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert float(value.grad.sign()) == math.copysign(1, student - teacher)


@given(student=logit, teacher=logit)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_never_negative_and_never_infinite(student: float, teacher: float) -> None:
    value = _cell(student).requires_grad_()
    loss = dense_mask_logits_loss(value, _cell(teacher))
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item())
    assert loss.item() >= -1e-12
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()


@given(teacher=st.floats(-8, 8), step=st.floats(0.01, 4), sign=st.sampled_from([-1, 1]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_least_at_the_teacher_and_rising_to_either_side(teacher: float, step: float, sign: int) -> None:
    near = dense_mask_logits_loss(_cell(teacher + sign * step), _cell(teacher))
    far = dense_mask_logits_loss(_cell(teacher + sign * 2 * step), _cell(teacher))
    assert 0 < float(near) < float(far)


def test_all_foreground_is_no_way_out() -> None:
    """Pitfall 8: the ancestor's term fell to -18 553 here."""
    teacher = torch.full((2, 4, 8, 8), -10.0)
    assert dense_mask_logits_loss(torch.full_like(teacher, 100.0), teacher) > 10


def test_each_mask_is_paired_with_its_own_index() -> None:
    """Pitfall 11: two masks of another granularity do not pair up, whichever scores best."""
    teacher = torch.full((1, 2, 2, 2), -6.0)
    teacher[:, 0] = 6.0
    assert dense_mask_logits_loss(teacher.clone(), teacher) == 0
    assert dense_mask_logits_loss(teacher.flip(1), teacher) > 1
