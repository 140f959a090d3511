from __future__ import annotations

import math

import pytest
import torch

from samlet.losses import decoder_mask_token_loss

KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of (3/4, 1/4) from (1/2, 1/2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_worked_out_by_hand(temperature: float) -> None:
    teacher = torch.tensor([[[math.log(3) * temperature, 0.0]]])
    loss = decoder_mask_token_loss(torch.zeros(1, 1, 2), teacher, w_kl=2.0, temperature=temperature)
    assert float(loss) == pytest.approx(2 * KL, rel=1e-5)


def test_the_divergence_runs_from_the_teacher() -> None:
    """KL is not symmetric: KL(t || s) with t sharp and s flat is log 2, the other way round it explodes."""
    sharp, flat = torch.tensor([[[40.0, 0.0]]]), torch.zeros(1, 1, 2)
    assert float(decoder_mask_token_loss(flat, sharp, temperature=1.0)) == pytest.approx(math.log(2))
    assert float(decoder_mask_token_loss(sharp, flat, temperature=1.0)) > 15


def test_mean_over_the_tokens_of_a_prompt() -> None:
    teacher = torch.zeros(1, 4, 2)
    teacher[0, 2, 0] = math.log(3)
    loss = decoder_mask_token_loss(torch.zeros(1, 4, 2), teacher, temperature=1.0)
    assert float(loss) == pytest.approx(KL / 4, rel=1e-5)


def test_huge_tokens_stay_finite() -> None:
    student = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss = decoder_mask_token_loss(student, -student.detach())
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
