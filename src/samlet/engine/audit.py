"""The gradient audit: a term that is paid for and reaches no weight is a bug, and stops the run before it starts."""

from __future__ import annotations

import torch
from torch import nn

from samlet.errors import SamletError
from samlet.types import Terms


def audit_gradients(terms: Terms, module: nn.Module, stage: str = "") -> None:
    """Refuse weighted terms from which no trainable parameter of the student can be reached.

    Reaching is what counts, not the size: a student that starts as its own teacher has gradients of 0.

    Raises:
        SamletError: names the term.
    """
    trainable = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not name.startswith("projections.")  # which teach the student nothing
    ]
    for name, value in terms.weighted.items():
        reached = value.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad(value, trainable, retain_graph=True, allow_unused=True)
        )
        if not reached:
            raise SamletError(
                f"{name}: has a weight{f' in stage {stage}' if stage else ''}, but its gradient reaches no trainable "
                "parameter; "
                "set its weight to 0 (or enable to false), or unfreeze the part it should teach (training.freeze)"
            )
