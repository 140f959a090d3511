"""What is built of a configuration around one student: the training step, the teachers, their team."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from samlet.distill.configs import normalized_weights
from samlet.distill.corrections import Corrections
from samlet.distill.objectives import build_objectives
from samlet.distill.teacher import LiveTeacher, TeacherTeam
from samlet.engine.device import place
from samlet.engine.step import TrainStep
from samlet.models import load_sam

if TYPE_CHECKING:
    from samlet.data.configs import PromptConfig
    from samlet.distill.configs import DistillationConfig, TeacherConfig
    from samlet.engine.configs import TrainingConfig
    from samlet.losses.configs import TaskLossConfig
    from samlet.models.sam import Sam

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_step(
    student: Sam, loss: TaskLossConfig, distillation: DistillationConfig, prompts: PromptConfig
) -> TrainStep:
    """The training step around a student."""
    return TrainStep(
        student,
        loss,
        build_objectives(distillation),
        distillation.lambda_coef,
        team=distillation.team,
        trust=distillation.trust,
        corrections=Corrections(prompts.correction_rounds, prompts.correction_mask_input, prompts.correction_min_cells),
    )


def load_teachers(
    teachers: Sequence[TeacherConfig], image_size: int, device: torch.device, training: TrainingConfig
) -> dict[str, Sam]:
    """Every teacher's model by name, on the device.

    Raises:
        SamletError: a checkpoint that cannot be used.
    """
    models = {}
    for teacher in teachers:
        sam = load_sam(teacher.checkpoint, image_size=teacher.image_size or image_size)
        place(sam, device, training)
        if training.compile:
            sam.image_encoder.compile()
        models[teacher.name] = sam
    return models


def build_team(teachers: Sequence[TeacherConfig], models: Mapping[str, Sam], step: TrainStep) -> TeacherTeam | None:
    """The teachers, frozen, with the taps and shares that a step asks for; none where nothing is distilled.

    Raises:
        SamletError: a tap that a teacher does not have.
    """
    if not step.objectives:
        return None
    encoder_taps = sorted({tap for objective in step.objectives for tap in objective.teacher_taps})
    live = [
        LiveTeacher(
            teacher.name,
            models[teacher.name],
            encoder_taps,
            step.decoder_taps,
            precision=None if teacher.precision is None else PRECISIONS[teacher.precision],
            offload=teacher.offload,
        )
        for teacher in teachers
    ]
    return TeacherTeam(live, normalized_weights(teachers))
