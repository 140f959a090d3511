from __future__ import annotations

import pytest
import torch

from samlet.losses import dice_loss

SMOOTHING = 1 / 65536


def test_values_worked_out_by_hand() -> None:
    masks = torch.zeros(1, 2, 2, dtype=torch.float64)
    masks[0, 0] = 1
    undecided = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    expected = 1 - (2 * 0.25 + SMOOTHING) / (0.5 + 0.5 + SMOOTHING)
    assert float(dice_loss(undecided, masks)) == pytest.approx(expected)
    right = (masks[:, None] * 2 - 1) * 1000
    assert float(dice_loss(right, masks)) == pytest.approx(0, abs=1e-12)
    assert float(dice_loss(-right, masks)) == pytest.approx(1 - SMOOTHING / (1 + SMOOTHING))


def test_empty_mask_and_empty_prediction_agree() -> None:
    assert float(dice_loss(torch.full((1, 1, 4, 4), -1e3), torch.zeros(1, 4, 4))) == pytest.approx(0)


def test_equals_sams_smoothing_of_one_on_its_own_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, 256, 256, generator=generator, dtype=torch.float64)
    masks = (torch.rand(1, 256, 256, generator=generator, dtype=torch.float64) > 0.999).double()
    p = logits.sigmoid()[0]
    expected = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    torch.testing.assert_close(dice_loss(logits, masks), expected)


def test_the_padding_dilutes_nothing() -> None:
    """A small object in a wide image costs the same whether the padded half is there or not."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 4, 8, generator=generator, dtype=torch.float64)
    padded = torch.cat([logits, torch.full_like(logits, 9.0)], dim=2)
    targets = torch.cat([masks, torch.zeros_like(masks)], dim=1)
    valid = torch.cat([torch.ones_like(masks), torch.zeros_like(masks)], dim=1)
    torch.testing.assert_close(dice_loss(padded, targets, valid), dice_loss(logits, masks))
