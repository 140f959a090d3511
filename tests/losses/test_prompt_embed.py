from __future__ import annotations

import pytest
import torch

from samlet.losses import prompt_embed_loss


def _cell(*channels: float) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)


def test_values_worked_out_by_hand() -> None:
    # right angle: the normalised difference is (1, -1), its mean square 1, and 1 - cos = 1
    assert float(prompt_embed_loss(_cell(2, 0), _cell(0, 3), w_mse=0.7, w_cos=0.0)) == pytest.approx(0.7)
    assert float(prompt_embed_loss(_cell(2, 0), _cell(0, 3), w_mse=0.0, w_cos=0.3)) == pytest.approx(0.3)
    # four channels: mean over 4 instead of 2
    loss = prompt_embed_loss(_cell(2, 0, 0, 0), _cell(0, 3, 0, 0), w_mse=1.0, w_cos=0.0)
    assert float(loss) == pytest.approx(0.5)
    # 60 degrees: cos = 1/2
    loss = prompt_embed_loss(_cell(1, 0), _cell(0.5, 0.75**0.5), w_mse=0.0, w_cos=1.0)
    assert float(loss) == pytest.approx(0.5)


def test_only_the_direction_of_each_cell_counts() -> None:
    """Pitfall 6: normalised over channels, not over cells."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64) + 0.1
    torch.testing.assert_close(prompt_embed_loss(student * scale, teacher / scale), prompt_embed_loss(student, teacher))
