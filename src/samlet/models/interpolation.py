"""Between two models of one architecture: the weights on the straight line from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from samlet.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from samlet.models.sam import Sam

STATISTICS = (".running_mean", ".running_var")
_SHOWN = 3


def refuse_different(base: Sam, tuned: Sam) -> None:
    """Refuse two models between which there is no line. Equal shapes are enough: heads and windows show in them.

    Raises:
        CheckpointError: names the tensors that differ, with both shapes.
    """
    ours, theirs = base.state_dict(), tuned.state_dict()
    alone = [f"{name} ({_sides(ours[name])}) is in the base alone" for name in ours if name not in theirs]
    alone += [f"{name} ({_sides(theirs[name])}) is in the tuned model alone" for name in theirs if name not in ours]
    other = [
        f"{name} is {_sides(value)} in the base and {_sides(theirs[name])} in the tuned model"
        for name, value in ours.items()
        if name in theirs and value.shape != theirs[name].shape
    ]
    differences = other or alone
    if differences:
        more = len(differences) - _SHOWN
        raise CheckpointError(
            f"no line leads from one model to the other: {'; '.join(differences[:_SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Give the checkpoint that the tuned one was trained from"
        )


def interpolate_states(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * base + alpha * tuned, tensor by tensor, BatchNorm's running statistics included.

    WiSE-FT, Wortsman et al. 2022 (arXiv:2109.01903). At 0 and 1 the result is `base` and `tuned` to the bit. Counters
    (whole numbers) are rounded. The mean of two running variances is one, as both are positive.
    """
    mixed = {}
    for name, start in base.items():
        end = tuned[name]
        if start.is_floating_point():
            mixed[name] = torch.lerp(start.float(), end.float(), alpha).to(start.dtype)
        else:
            mixed[name] = torch.lerp(start.double(), end.double(), alpha).round().to(start.dtype)
    return mixed


def moved_statistics(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[str]:
    """The BatchNorm layers whose running mean or variance is not the same in both."""
    layers = {
        name.rpartition(".")[0]: None
        for name, value in base.items()
        if name.endswith(STATISTICS) and not torch.equal(value, tuned[name])
    }
    return list(layers)


def _sides(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
