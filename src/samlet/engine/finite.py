"""A NaN is never stepped on: it stops the run, or leaves that step out where the configuration says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from samlet.engine.processes import gathered
from samlet.errors import SamletError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from samlet.engine.checkpoint import TrainerState
    from samlet.engine.configs import TrainingConfig
    from samlet.types import Batch


def broken_terms(values: Mapping[str, float]) -> list[str]:
    """Names of the terms that are not finite."""
    return [name for name, value in values.items() if not math.isfinite(value) and not name.endswith("/weighted")]


def leave_out(
    broken: Sequence[str],
    window: Sequence[Batch],
    *,
    state: TrainerState,
    training: TrainingConfig,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
) -> None:
    """Leave out a step whose terms (or, with none of them broken, whose gradient) are not finite.

    Raises:
        SamletError: the configuration does not let it be left out; names the terms and images.
    """
    if not broken and accelerator.scaler is not None:
        optimizer.step()  # fp16 overflowed: the scaler leaves the step out itself and lowers its scale
        return
    images = gathered([name for batch in window for name in batch.image_ids], accelerator)
    what = f"{', '.join(broken) or 'the gradient'} not finite at step {state.step + 1}, images {', '.join(images)}"
    state.skipped_steps += 1
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # the gradients were unscaled already, and no step follows that would do it
    if training.non_finite == "abort" or state.skipped_steps > training.max_skipped_steps:
        raise SamletError(
            f"{what}; no step was taken with it, and the last checkpoint is good. Look at these images with "
            "`samlet check-data`, lower training.learning_rate, or set training.non_finite to 'skip'"
        )
    accelerator.print(f"left out: {what} ({state.skipped_steps} of {training.max_skipped_steps})")
