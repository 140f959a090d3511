from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlet.losses import focal_loss


def _loss(logit: float, share: float, gamma: float = 2.0) -> float:
    logits = torch.full((1, 1, 2, 2), logit, dtype=torch.float64)
    return float(focal_loss(logits, torch.full((1, 2, 2), share), gamma=gamma))


@pytest.mark.parametrize(
    ("logit", "share", "expected"),
    [
        (0.0, 1.0, 0.25 * 0.25 * math.log(2)),
        (0.0, 0.0, 0.75 * 0.25 * math.log(2)),
        (math.log(3), 1.0, 0.25 * 0.0625 * math.log(4 / 3)),
        (math.log(3), 0.0, 0.75 * 0.5625 * math.log(4)),
        (math.log(3), 0.5, 0.5 * 0.0625 * -0.5 * (math.log(0.75) + math.log(0.25))),
    ],
)
def test_values_worked_out_by_hand(logit: float, share: float, expected: float) -> None:
    assert _loss(logit, share) == pytest.approx(expected)


@given(logit=st.floats(-30, 30), share=st.sampled_from([0.0, 1.0]), gamma=st.floats(1, 5))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_hard_targets_give_the_focal_loss_of_retinanet(logit: float, share: float, gamma: float) -> None:
    right = 1 / (1 + math.exp(-logit if share else logit))
    balance = 0.25 if share else 0.75
    expected = balance * (1 - right) ** gamma * -math.log(right)
    assert _loss(logit, share, gamma=gamma) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(share=st.floats(0.05, 0.95), step=st.floats(0.05, 3), sign=st.sampled_from([-1, 1]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_outline_cells_are_best_at_their_own_share(share: float, step: float, sign: int) -> None:
    """A mask must not shrink: the mean of the two hard losses has its minimum elsewhere."""
    best = math.log(share / (1 - share))
    assert _loss(best, share) == pytest.approx(0, abs=1e-9)
    assert _loss(best + sign * step, share) > 0


@pytest.mark.parametrize(("logit", "share"), [(50.0, 0.0), (-50.0, 1.0), (5e3, 0.0), (-5e3, 1.0)])
def test_confident_mistakes_keep_a_finite_gradient_of_the_right_sign(logit: float, share: float) -> None:
    logits = torch.full((1, 1, 1, 1), logit, requires_grad=True)
    loss = focal_loss(logits, torch.full((1, 1, 1), share))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert float(logits.grad.sign()) == (1 if share == 0 else -1)
