from __future__ import annotations

import math

import pytest
import torch

from samlet.losses import encoder_matching_loss


def _cell(*channels: float) -> torch.Tensor:
    return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)


def _kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_values_worked_out_by_hand() -> None:
    """softmax(ln 3, 0) = (3/4, 1/4); the teacher's (0, 0) is (1/2, 1/2); the divergence is the student's from it."""
    student, teacher = [_cell(math.log(3), 0.0)], [_cell(0.0, 0.0)]
    squared = math.log(3) ** 2 / 2
    assert float(encoder_matching_loss(student, teacher, lambda_kl=0.0)) == pytest.approx(squared)
    assert float(encoder_matching_loss(student, teacher, lambda_mse=0.0)) == pytest.approx(_kl(0.75, 0.5))
    assert _kl(0.75, 0.5) != pytest.approx(_kl(0.5, 0.75)), "the direction shows"
    both = encoder_matching_loss(student, teacher, lambda_mse=0.5, lambda_kl=3.0)
    assert float(both) == pytest.approx(0.5 * squared + 3 * _kl(0.75, 0.5))


def test_temperature_flattens_and_its_square_scales() -> None:
    student, teacher = [_cell(2 * math.log(3), 0.0)], [_cell(0.0, 0.0)]
    loss = encoder_matching_loss(student, teacher, lambda_mse=0.0, temperature=2.0)
    assert float(loss) == pytest.approx(4 * _kl(0.75, 0.5))


def test_layers_of_any_width_and_grid_count_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 8, 8), (2, 5, 4, 4), (2, 7, 4, 4)]
    student = [torch.randn(shape, generator=generator) for shape in shapes]
    teacher = [torch.randn(shape, generator=generator) for shape in shapes]
    alone = [float(encoder_matching_loss([s], [t])) for s, t in zip(student, teacher, strict=True)]
    assert float(encoder_matching_loss(student, teacher)) == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert len(set(alone)) == 3


def test_unlike_numbers_of_layers_are_refused() -> None:
    maps = [torch.zeros(1, 2, 2, 2)] * 2
    for student, teacher in (([], []), (maps, maps[:1])):
        with pytest.raises(ValueError, match="as many layers"):
            encoder_matching_loss(student, teacher)
    with pytest.raises(ValueError, match="valid for 1"):
        encoder_matching_loss(maps, maps, [torch.ones(1, 2, 2)])
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 2\) and \(1, 2, 1, 1\)"):
        encoder_matching_loss(maps, [maps[0], maps[1][..., :1, :1]])
