"""RunConfig: everything a training run depends on, composed of the blocks that live beside their owners."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from samlet.data.configs import AugmentationConfig, DatasetConfig, PromptConfig
from samlet.distill.configs import DistillationConfig, TeacherConfig
from samlet.engine.configs import CheckpointConfig, LoggingConfig, TrainingConfig, ValidationConfig
from samlet.losses.configs import TaskLossConfig
from samlet.models.configs import ModelConfig
from samlet.schema import ExistingPath, Loc, StrictModel


class RunConfig(StrictModel):
    """One training run of samlet."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Where editors find the JSON schema of this file (`samlet schema` writes it)."""
    seed: int = Field(0, ge=0)
    """Sample order, augmentation, prompts and initialisation are pure functions of it."""
    output_dir: Path = Path("runs/samlet")
    """Where the run writes everything; one folder a run."""
    resume: Literal["auto", "never"] | ExistingPath = "auto"
    """auto: go on with what lies in output_dir; never: refuse if something does; a path: that checkpoint."""
    model: ModelConfig = ModelConfig()
    """The student."""
    dataset: DatasetConfig
    """The images and masks."""
    prompts: PromptConfig = PromptConfig()
    """How points and boxes are drawn from masks."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random flips, scales, crops and colours."""
    loss: TaskLossConfig = TaskLossConfig()
    """The loss against the ground truth."""
    distillation: DistillationConfig = DistillationConfig()
    """The loss against the teachers."""
    teachers: tuple[TeacherConfig, ...] = ()
    """The teachers; used where distillation is enabled."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation."""
    validation: ValidationConfig = ValidationConfig()
    """Measuring on the validation set."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving for resume."""
    logging: LoggingConfig = LoggingConfig()
    """Logs."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see."""
        names = [teacher.name for teacher in self.teachers]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("teachers", index, "name"), f"'{name}' is taken by another teacher"
        if self.distillation.enable and not self.teachers:
            yield ("teachers",), "distillation.enable is true, but there is no teacher; name one with its checkpoint"
        if self.teachers and not sum(1.0 if t.weight is None else t.weight for t in self.teachers):
            yield ("teachers",), "every weight is 0; give one teacher a positive weight"
        if self.dataset.unlabelled == "use" and not self.distillation.enable:
            yield (
                ("dataset", "unlabelled"),
                "images without masks teach nothing without a teacher; enable distillation, or set it to 'refuse'",
            )
