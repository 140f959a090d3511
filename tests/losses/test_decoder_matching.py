from __future__ import annotations

import math

import pytest
import torch

from samlet.losses import decoder_matching_loss


def _cell(*channels: float) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)


def test_values_worked_out_by_hand() -> None:
    """The student's softmax is (1/2, 1/2), the teacher's (3/4, 1/4); the angle is that of (1, 1) and (1 + ln 3, 1)."""
    student, teacher = _cell(1.0, 1.0), _cell(1.0 + math.log(3), 1.0)
    squared = math.log(3) ** 2 / 2
    cosine = (2 + math.log(3)) / math.sqrt(2) / math.hypot(1 + math.log(3), 1)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    parts = {"w_mse": squared, "w_cos": 1 - cosine, "w_kl": divergence}
    for name, value in parts.items():
        one, two, three = (float(other == name) for other in parts)
        loss = decoder_matching_loss(student, teacher, w_mse=one, w_cos=two, w_kl=three)
        assert float(loss) == pytest.approx(value)
    loss = decoder_matching_loss(student, teacher, w_mse=0.5, w_cos=2.0, w_kl=3.0)
    assert float(loss) == pytest.approx(0.5 * squared + 2 * (1 - cosine) + 3 * divergence)


def test_temperature_flattens_and_its_square_scales() -> None:
    loss = decoder_matching_loss(_cell(0.0, 0.0), _cell(2 * math.log(3), 0.0), w_mse=0.0, w_cos=0.0, temperature=2.0)
    assert float(loss) == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_vectors_are_a_map_of_one_row() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 8, generator=generator) for _ in range(2))
    one_map = decoder_matching_loss(student.transpose(1, 2)[:, :, None], teacher.transpose(1, 2)[:, :, None])
    each = [decoder_matching_loss(student[:, m, :, None, None], teacher[:, m, :, None, None]) for m in range(4)]
    torch.testing.assert_close(one_map, torch.stack(each).mean())
