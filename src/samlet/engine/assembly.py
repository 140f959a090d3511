"""What is built of a configuration around one student: the training step, the teachers, their team."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from samlet.data.batches import collate
from samlet.data.sampler import SampleKey, epoch_order
from samlet.distill.configs import normalized_weights
from samlet.distill.corrections import Corrections
from samlet.distill.objectives import Objective, build_objectives
from samlet.distill.projections import build_projections
from samlet.distill.store import decoder_file
from samlet.distill.stored import StoredTeacher
from samlet.distill.teacher import LiveTeacher, Teacher, TeacherTeam
from samlet.engine.device import place
from samlet.engine.step import TrainStep
from samlet.errors import ConfigError
from samlet.models import load_sam
from samlet.models.decoder_file import load_decoder

if TYPE_CHECKING:
    from samlet.data.configs import PromptConfig
    from samlet.data.dataset import SegmentationDataset
    from samlet.distill.configs import DistillationConfig, TeacherConfig
    from samlet.distill.projections import Projections
    from samlet.distill.store import StoreReader
    from samlet.engine.configs import TrainingConfig
    from samlet.losses.configs import TaskLossConfig
    from samlet.models.sam import Sam
    from samlet.types import Batch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_step(
    student: Sam,
    loss: TaskLossConfig,
    distillation: DistillationConfig,
    prompts: PromptConfig,
    projections: Projections | None = None,
    *,
    prompts_per_chunk: int | None = None,
) -> TrainStep:
    """The training step around a student and the projections beside it."""
    return TrainStep(
        student,
        loss,
        build_objectives(distillation),
        distillation.lambda_coef,
        team=distillation.team,
        trust=distillation.trust,
        corrections=Corrections(prompts.correction_rounds, prompts.correction_mask_input, prompts.correction_min_cells),
        projections=projections,
        prompts_per_chunk=prompts_per_chunk,
    )


def load_teachers(
    teachers: Sequence[TeacherConfig],
    stores: Mapping[str, StoreReader],
    image_size: int,
    device: torch.device,
    training: TrainingConfig,
) -> dict[str, Sam]:
    """Every teacher's model by name, on the device; of those with a store the decoder alone.

    Raises:
        SamletError: a checkpoint that cannot be used.
    """
    models = {}
    for teacher in teachers:
        if teacher.name in stores:
            sam = load_decoder(decoder_file(stores[teacher.name].root))
        else:
            assert teacher.checkpoint is not None, "the configuration was checked"
            sam = load_sam(teacher.checkpoint, image_size=teacher.image_size or image_size)
        place(sam, device, training)
        if training.compile and teacher.name not in stores:
            sam.image_encoder.compile()
        models[teacher.name] = sam
    return models


def build_team(
    teachers: Sequence[TeacherConfig], models: Mapping[str, Sam], stores: Mapping[str, StoreReader], step: TrainStep
) -> TeacherTeam | None:
    """The teachers, frozen, with the taps and shares that a step asks for; none where nothing is distilled.

    Raises:
        SamletError: a tap that a teacher does not have.
    """
    if not step.objectives:
        return None
    encoder_taps = sorted({tap for objective in step.objectives for tap in objective.teacher_taps})

    def build(teacher: TeacherConfig) -> Teacher:
        sam = models[teacher.name]
        if teacher.name in stores:
            return StoredTeacher(teacher.name, sam, encoder_taps, step.decoder_taps)
        precision = None if teacher.precision is None else PRECISIONS[teacher.precision]
        taps = (encoder_taps, step.decoder_taps)
        return LiveTeacher(teacher.name, sam, *taps, precision=precision, offload=teacher.offload)

    return TeacherTeam([build(teacher) for teacher in teachers], normalized_weights(teachers))


def add_projections(
    projections: Projections,
    objectives: Sequence[Objective],
    student: Sam,
    team: TeacherTeam | None,
    batches: Iterable[Batch],
) -> None:
    """Add what a stage's objectives need and no earlier stage has brought.

    Raises:
        ConfigError: two stages bring the same layer to one shape in different ways.
    """
    for key, module in build_projections(objectives, student, team, batches).items():
        if key in projections and str(projections[key]) != str(module):
            raise ConfigError(f"stages: '{key}' is projected in two ways; let all stages agree on its projection")
        if key not in projections:
            projections[key] = module


def head_of(data: SegmentationDataset, seed: int, batches: int, batch_size: int) -> Iterator[Batch]:
    """The first images of the first epoch in at most so many batches, without any state of a loader."""
    order = epoch_order(len(data), seed, 0)[: batches * batch_size]
    samples = [data[SampleKey(0, int(index))] for index in order]
    size = max(len(samples) // batches, 1)
    return (collate(samples[start : start + size]) for start in range(0, len(samples), size))
