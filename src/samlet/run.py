"""A run as it stands before its first step: data, student, teachers, optimizer, stages, state of an earlier start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from samlet.config import RunConfig, with_todays_keys
from samlet.data.dataset import SegmentationDataset, ValidationSet
from samlet.data.splits import names_taken
from samlet.distill.projections import Projections, fit_projections
from samlet.distill.teacher import TeacherTeam
from samlet.engine.assembly import add_projections, build_step, build_team, head_of, load_teachers
from samlet.engine.checkpoint import TrainerState
from samlet.engine.device import memory_format, place, to_device
from samlet.engine.ema import AverageStudent
from samlet.engine.embeddings import embeddings_reader, fingerprint, keep_embeddings
from samlet.engine.evaluation import unchanged_in_eval_mode
from samlet.engine.facts import facts_of_start, refuse_other_config
from samlet.engine.parts import build_optimizer, calibrate_batch_norm, named_parameters
from samlet.engine.plan import Pace
from samlet.engine.resume import resume
from samlet.engine.run_dir import RunDir
from samlet.engine.step import TrainStep
from samlet.engine.validation import ForgettingGuard
from samlet.errors import CheckpointError, ConfigError
from samlet.labelling import label_by_teacher, training_images
from samlet.models import Sam
from samlet.stores import facts_of_stores, stored_features, stores_of
from samlet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.distill.store import StoreReader

BATCHES_TO_MEASURE = 8  # before the first step


@dataclass(frozen=True)
class Stage:
    """A stretch of the run: a complete configuration, and what was built of it around the one student."""

    name: str
    config: RunConfig
    step: TrainStep
    team: TeacherTeam | None
    train_set: SegmentationDataset
    steps: int  # optimizer steps, where it does not stop early


@dataclass
class Run:
    """What the loop carries."""

    accelerator: Accelerator
    folder: RunDir
    state: TrainerState
    stages: tuple[Stage, ...]
    pace: Pace
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    average: AverageStudent | None
    val_set: ValidationSet
    guard: ForgettingGuard | None

    @property
    def stage(self) -> Stage:
        """The stage of the step that follows."""
        return self.stages[self.state.stage]

    @property
    def config(self) -> RunConfig:
        """The present stage's configuration."""
        return self.stage.config

    @property
    def step(self) -> TrainStep:
        """The present stage's training step."""
        return self.stage.step

    @property
    def student(self) -> Sam:
        """What is trained, through all stages."""
        return self.step.student

    @property
    def measured(self) -> Sam:
        """What is validated and kept: the average student where there is one."""
        return self.student if self.average is None else self.average.student

    @property
    def steps_in_stage(self) -> int:
        """Optimizer steps of the present stage that are done."""
        return self.state.step - self.state.stage_began

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, if no stage to come stops early."""
        return self.state.stage_began + sum(stage.steps for stage in self.stages[self.state.stage :])

    def place(self, step: int, split: str) -> dict[str, Any]:
        """The beginning of a row of metrics: step, epoch and split, and the stage where there are several."""
        where = {"step": step, "epoch": self.pace.epochs(self.state.step), "split": split}
        return {**where, "stage": self.stage.name} if self.stage.name else where


def set_up(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunDir,
    between_images: Callable[[], object] = lambda: None,
    images_to_label: int | None = None,
) -> Run:
    """Data, student, teachers, optimizer, and the state of an earlier start if there is one.

    Where a teacher's automatic masks are found, which may take hours, `between_images` is called, and may raise; and
    only the first `images_to_label` in the order of the first epoch get any, where it is given.
    """
    former = folder.read_config()
    refuse_other_config(plain_config(config), with_todays_keys(former) if former else None, folder)
    for sentence in names_taken(config.dataset):
        accelerator.print(sentence)
    train_set, facts = training_images(config), dict[str, Any]()
    val_set = config.dataset.build_val(seed=config.seed)
    pictures = len({record.image_id for record in train_set.records})  # a labelled one may stand there several times
    accelerator.print(f"{config.dataset.root}: {pictures} images to train on, {len(val_set)} to validate on")
    if config.mask_teacher.enable:
        limits: dict[str, Any] = {"advance": between_images, "most": images_to_label}
        train_set, facts = label_by_teacher(config, train_set, accelerator, folder, **limits)
    torch.manual_seed(config.seed)
    stores = stores_of(config, train_set)
    facts |= facts_of_stores(stores, folder)
    for name, reader in stores.items():
        accelerator.print(f"{name}: features from {reader.root} ({reader.identity.dtype})")
    if stores:
        train_set = train_set.with_stored(stored_features(config, stores))
    student = config.model.build()
    place(student, accelerator.device, config.training)
    average = None if config.training.ema_decay is None else AverageStudent(student, config.training.ema_decay)
    stages = set_up_stages(config, accelerator.device, student, train_set, stores)
    projections = stages[0].step.projections  # one for all stages
    optimizer = build_optimizer(
        named_parameters(student, projections),
        learning_rate=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        betas=config.training.betas,
    )
    held: dict[str, Any] = {"student": student, "average": average, "projections": projections}
    state = resume(config.resume, accelerator, folder, optimizer=optimizer, **held)
    if state.stage >= len(stages):
        raise CheckpointError(
            f"{config.resume}: stopped in stage {state.stage + 1} of another run, and this configuration has "
            f"{len(stages)}; to start from its weights set model.checkpoint to it"
        )
    if config.training.compile:
        student.image_encoder.compile()
    run = Run(
        accelerator=accelerator,
        folder=folder,
        state=state,
        stages=stages,
        pace=Pace.of(len(train_set), config.training),
        wrapped=stages[0].step,
        optimizer=accelerator.prepare_optimizer(optimizer),
        average=average,
        val_set=val_set,
        guard=ForgettingGuard.of(config.validation),
    )
    if state.step == 0:
        measure_first_images(run)
    if config.training.cache_embeddings:
        run.stages = tuple(cache_embeddings(run, stage) for stage in run.stages)
    accelerator.wait_for_everyone()  # what is written here must not look like an earlier run to a slower process
    if accelerator.is_main_process:
        images = [(record.image_id, record.image_path) for record in (*train_set.records, *val_set.records)]
        folder.write_config(plain_config(config))
        folder.update_facts(**facts_of_start(plain_config(config), accelerator.num_processes, images), **facts)
    return run


def set_up_stages(
    config: RunConfig,
    device: torch.device,
    student: Sam,
    train_set: SegmentationDataset,
    stores: Mapping[str, StoreReader],
) -> tuple[Stage, ...]:
    """Every stage before the first step, so that what cannot be used stops no later one; teachers are loaded once."""
    resolved, names = config.resolved(), [stage.name for stage in config.stages] or [""]
    distils = any(found.distillation.enable for found in resolved)
    wanted = config.teachers if distils else ()
    models = load_teachers(wanted, stores, config.model.image_size, device, config.training)
    projections = Projections()
    stages = []
    for name, found in zip(names, resolved, strict=True):
        chunk = found.training.prompts_per_chunk
        step = build_step(student, found.loss, found.distillation, found.prompts, projections, prompts_per_chunk=chunk)
        team = build_team(found.teachers, models, stores, step)
        data = train_set.varied(found.prompts.build(found.dataset.mode), found.augmentation.build())
        steps = Pace.of(len(data), found.training).steps(found.training)
        stages.append(Stage(name, found, step, team, data, steps))
        add_projections(projections, step.objectives, student, team, first_batches(stages[-1], device))
    place(projections, device, config.training)
    return tuple(stages)


def cache_embeddings(run: Run, stage: Stage) -> Stage:
    """The stage with its samples' embeddings, computed by the main process where they are not yet in the folder.

    Raises:
        ConfigError: a term looks into the image encoder.
    """
    if stage.step.student_taps:
        raise ConfigError(
            f"training.cache_embeddings: the encoder does not run, and {', '.join(stage.step.student_taps)} of it is "
            "compared; disable the terms of the image encoder"
        )
    training, device, data = stage.config.training, run.accelerator.device, stage.train_set
    facts = fingerprint(data, run.student, training.precision)

    def encode(pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 256 h w"]:
        with unchanged_in_eval_mode(run.student), run.accelerator.autocast():
            placed = pixels.to(device, memory_format=memory_format(training))
            return run.student.encode(placed).embedding

    if run.accelerator.is_main_process:
        keep_embeddings(run.folder.embeddings, data, facts, encode, batch_size=training.batch_size)
    run.accelerator.wait_for_everyone()
    return replace(stage, train_set=data.with_embeddings(embeddings_reader(run.folder.embeddings, data, facts)))


def first_batches(stage: Stage, device: torch.device) -> Iterator[Batch]:
    """The first images of a stage's data in the order of the first epoch, the same ones in every process."""
    training = stage.config.training
    for batch in head_of(stage.train_set, stage.config.seed, BATCHES_TO_MEASURE, training.batch_size):
        yield to_device(batch, device, training)


def measure_first_images(run: Run) -> None:
    """What is fitted to images before the first step: BatchNorm's statistics, the projections' components."""
    device = run.accelerator.device
    if run.config.model.batch_norm == "calibrated":
        calibrate_batch_norm(run.student, (batch.pixels for batch in first_batches(run.stage, device)))
    for stage in reversed(run.stages):  # where several fit the same components, the first stage's images decide
        with run.accelerator.autocast():
            batches = first_batches(stage, device)
            shares = fit_projections(stage.step.projections, stage.step.objectives, stage.team, batches)
        for name, share in shares.items():
            run.accelerator.print(f"{name}: the components keep {share:.0%} of the teacher's variance")
    if run.average is not None:
        run.average.begin(run.student)


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values, every default filled in."""
    return config.model_dump(mode="json", by_alias=True)
