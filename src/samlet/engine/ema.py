"""The average student: weights that follow the trained ones slowly, which smooths what single batches do to them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from samlet.models.sam import Sam


class AverageStudent:
    """theta' <- d theta' + (1 - d) theta after every optimizer step t, d = min(decay, (1 + t) / (10 + t)).

    Polyak and Juditsky 1992, in the exponential form of Tarvainen and Valpola 2017 (mean teacher), arXiv:1703.01780.
    The second value of d lets a young average forget where it began. BatchNorm's running statistics are averaged with
    the weights that they belong to (they only move under `model.batch_norm: train`); counters are copied.
    """

    def __init__(self, student: Sam, decay: float) -> None:
        self.decay = decay
        self.student = deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def begin(self, student: Sam) -> None:
        """Be the student."""
        for own, new in zip(self.tensors().values(), student.state_dict().values(), strict=True):
            own.copy_(new)

    @torch.no_grad()
    def follow(self, student: Sam, step: int) -> None:
        """Move towards the student, which has just taken its optimizer step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for own, new in zip(self.tensors().values(), student.state_dict().values(), strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 - decay)
            else:
                own.copy_(new)

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that is averaged, by name."""
        state: Mapping[str, Tensor] = self.student.state_dict()
        return state
