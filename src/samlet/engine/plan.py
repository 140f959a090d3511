"""How long a run takes and where in it a step stands: pure functions of the configuration and the data's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.engine.configs import TrainingConfig, ValidationConfig


@dataclass(frozen=True)
class Pace:
    """Micro-batches, those of all processes together counted as one, in an epoch and in an optimizer step."""

    per_epoch: int
    per_step: int

    @classmethod
    def of(cls, images: int, training: TrainingConfig) -> Pace:
        """The pace over a data set of so many images."""
        return cls(-(-images // training.batch_size), training.accumulation)

    def epochs(self, steps: int) -> int:
        """Epochs completed in so many optimizer steps."""
        return steps * self.per_step // self.per_epoch

    def steps(self, training: TrainingConfig) -> int:
        """Optimizer steps that a configuration asks for."""
        return training.max_steps or -(-training.epochs * self.per_epoch // self.per_step)

    def thaws_at(self, step: int, training: TrainingConfig) -> bool:
        """Whether the frozen parts begin to train with this step, counted from the stage's begin."""
        epoch = training.unfreeze_epoch
        return epoch is not None and step > 0 and self.epochs(step - 1) < epoch <= self.epochs(step)

    def frozen_at(self, step: int, training: TrainingConfig) -> tuple[str, ...]:
        """The parts that do not train in this step, counted from the stage's begin."""
        epoch = training.unfreeze_epoch
        return () if epoch is not None and self.epochs(step) >= epoch else training.freeze

    def validates_after(self, steps: int, training: TrainingConfig, validation: ValidationConfig) -> bool:
        """Whether to measure once so many steps of the stage are done: every n steps or epochs, and at its end."""
        if steps >= self.steps(training):
            return True
        if validation.every_steps is not None:
            return steps % validation.every_steps == 0
        return self.epochs(steps) // validation.every_epochs > self.epochs(steps - 1) // validation.every_epochs
