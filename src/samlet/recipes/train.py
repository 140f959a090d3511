"""Train a student: read from top to bottom, this file is the whole run.

`train(config)` sets up, `fit` is the loop, `Run` is what the loop carries. Started twice with the same
configuration it goes on where it stopped, to the same weights as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samlet.config import RunConfig, with_todays_keys
from samlet.data.dataset import SegmentationDataset, ValidationSet, collate
from samlet.data.sampler import SampleKey, StepSampler, epoch_order
from samlet.distill.teacher import Lesson, TeacherTeam
from samlet.engine.assembly import build_step, build_team, load_teachers
from samlet.engine.audit import audit_gradients
from samlet.engine.checkpoint import TrainerState, save_checkpoint
from samlet.engine.curves import plot_curves
from samlet.engine.device import build_accelerator, place, to_device
from samlet.engine.facts import facts_of_end, facts_of_start, refuse_other_config
from samlet.engine.finite import broken_terms, leave_out
from samlet.engine.judgement import begin_next_stage, judge, lambda_at
from samlet.engine.memory import keep_freed_memory, peak_memory, readable
from samlet.engine.parts import build_optimizer, calibrate_batch_norm, set_trainable, set_weight_decay
from samlet.engine.plan import Pace
from samlet.engine.processes import agreed, gather_random_states, gathered, total
from samlet.engine.progress import StepProgress, shown_terms
from samlet.engine.resume import resume
from samlet.engine.run_dir import RunDir
from samlet.engine.schedule import learning_rate
from samlet.engine.signals import StopRequest, leave_signals_to_the_run, listen_for_stop
from samlet.engine.step import Counts, TrainStep, count_images
from samlet.engine.validation import ForgettingGuard, draw_overlays, validate
from samlet.errors import DataError
from samlet.models import Sam
from samlet.types import Batch

BATCHES_TO_CALIBRATE = 8


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


def train(config: RunConfig) -> int:
    """Run a configuration to its end, or from where it stopped; the exit code (143 and 130: stopped by a signal).

    Raises:
        SamletError: something it was given cannot be used; nothing that was written before is lost.
    """
    accelerator = build_accelerator(config.training)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    folder = RunDir(config.output_dir)
    alone = folder.locked() if accelerator.is_main_process else nullcontext()
    with alone, listen_for_stop() as stop:
        try:
            run = set_up(config, accelerator, folder)
            if not run.state.finished:
                fit(run, stop)
                accelerator.print(f"peak memory {readable(peak_memory(accelerator.device))}")
            if run.state.finished:  # at this start or an earlier one, which may have been killed right here
                finish(run)
            if config.logging.curves and accelerator.is_main_process and folder.metrics.exists():
                plot_curves(folder.metrics, folder.curves)
        finally:
            folder.close()
    return 0 if run.state.finished else stop.exit_code


def set_up(config: RunConfig, accelerator: Accelerator, folder: RunDir) -> Run:
    """Data, student, teachers, optimizer, and the state of an earlier start if there is one."""
    torch.manual_seed(config.seed)
    former = folder.read_config()
    refuse_other_config(plain_config(config), with_todays_keys(former) if former else None, folder)
    train_set = config.dataset.build_train(
        image_size=config.model.image_size, seed=config.seed, prompts=config.prompts, augmentation=config.augmentation
    )
    val_set = config.dataset.build_val(seed=config.seed)
    student = config.model.build()
    place(student, accelerator.device, config.training)
    set_trainable(student, config.training.freeze, config.model.batch_norm)
    optimizer = build_optimizer(
        student,
        learning_rate=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        betas=config.training.betas,
    )
    state = resume(config.resume, accelerator, folder, student, optimizer)
    if config.training.compile:
        student.image_encoder.compile()
    stages = set_up_stages(config, accelerator.device, student, train_set)
    run = Run(
        accelerator=accelerator,
        folder=folder,
        state=state,
        stages=stages,
        pace=Pace.of(len(train_set), config.training),
        wrapped=stages[0].step,
        optimizer=accelerator.prepare_optimizer(optimizer),
        val_set=val_set,
        guard=ForgettingGuard.of(config.validation),
    )
    if state.step == 0 and config.model.batch_norm == "calibrated":
        calibrate(run)
    accelerator.wait_for_everyone()  # what is written here must not look like an earlier run to a slower process
    if accelerator.is_main_process:
        images = [(record.image_id, record.image_path) for record in (*train_set.records, *val_set.records)]
        folder.write_config(plain_config(config))
        folder.update_facts(**facts_of_start(plain_config(config), accelerator.num_processes, images))
    return run


def set_up_stages(
    config: RunConfig, device: torch.device, student: Sam, train_set: SegmentationDataset
) -> tuple[Stage, ...]:
    """Every stage before the first step, so that what cannot be used stops no later one; teachers are loaded once."""
    resolved, names = config.resolved(), [stage.name for stage in config.stages] or [""]
    distils = any(found.distillation.enable for found in resolved)
    teachers = config.teachers if distils else ()
    models = load_teachers(teachers, config.model.image_size, device, config.training)
    stages = []
    for name, found in zip(names, resolved, strict=True):
        step = build_step(student, found.loss, found.distillation, found.prompts)
        place(step, device, config.training)
        prompts, augmentation = found.prompts.build(found.dataset.mode), found.augmentation.build()
        data = train_set.varied(prompts, augmentation)
        team = build_team(found.teachers, models, step)
        stages.append(Stage(name, found, step, team, data, Pace.of(len(data), found.training).steps(found.training)))
    return tuple(stages)


def calibrate(run: Run) -> None:
    """Measure BatchNorm statistics on the first images of the first epoch, the same ones in every process."""
    data, batch_size = run.stage.train_set, run.config.training.batch_size
    order = epoch_order(len(data), run.config.seed, 0)[: BATCHES_TO_CALIBRATE * batch_size]
    samples = [data[SampleKey(0, int(index))] for index in order]
    size = max(len(samples) // BATCHES_TO_CALIBRATE, 1)
    batches = (collate(samples[start : start + size]) for start in range(0, len(samples), size))
    calibrate_batch_norm(run.student, (on_device(batch, run).pixels for batch in batches))


def wrap(run: Run) -> None:
    """Wrap the step for precision and processes; again whenever it or the set of trainable weights changes."""
    run.accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
    run.accelerator._models.clear()  # it keeps every model it has ever wrapped
    run.wrapped = run.accelerator.prepare_model(run.step)


def enter_training_mode(run: Run) -> None:
    """Train mode, less what is frozen in the step that follows."""
    frozen = run.pace.frozen_at(run.steps_in_stage, run.config.training)
    set_trainable(run.student, frozen, run.config.model.batch_norm)


def fit(run: Run, stop: StopRequest) -> None:
    """The loop: one pass is one optimizer step, of whichever stage its turn is."""
    state, entered, batches = run.state, -1, iter(list[Batch]())
    with StepProgress(run.total_steps, state.step, shown=run.accelerator.is_main_process) as progress:
        if run.guard is not None and state.retention_reference is None:
            validate_and_judge(run, progress)  # the untouched student: what there is to keep
        while not state.finished:
            training = run.config.training
            if entered != state.stage or run.pace.thaws_at(run.steps_in_stage, training):
                set_weight_decay(run.optimizer, training.weight_decay)
                enter_training_mode(run)
                wrap(run)
            begins, is_start = entered != state.stage, entered < 0
            if begins:
                entered, batches = state.stage, load_batches(run)
            window = [next(batches) for _ in range(training.accumulation)]
            if is_start:
                audit(run, window[0])
            row = optimizer_step(run, window)
            state.step += 1
            report_skipped(run, window, progress)
            if run.accelerator.is_main_process and row and state.step % run.config.logging.every_steps == 0:
                run.folder.log(row, events=run.config.logging.tensorboard)
            progress.advance(state.step, shown_terms(row))
            saves, over = checkpoint_is_due(run), run.steps_in_stage >= run.stage.steps
            if validation_is_due(run):
                over |= validate_and_judge(run, progress)
                enter_training_mode(run)
            if over:
                begin_next_stage(state, len(run.stages))
                progress.total = run.total_steps
            stopping = agreed(run.accelerator, stop.signal is not None)
            if saves or stopping or over:
                save(run)
            if stopping and not state.finished:
                progress.say(f"stopped at step {state.step}; the same command goes on from here")
                return


def optimizer_step(run: Run, window: Sequence[Batch]) -> dict[str, float | int | str]:
    """Forward and backward over the micro-batches of one step, then update; the row to log (none if left out)."""
    training, accelerator = run.config.training, run.accelerator
    rate = learning_rate(
        run.steps_in_stage,
        total_steps=run.stage.steps,
        peak=training.learning_rate,
        floor=training.min_learning_rate,
        warmup_steps=training.warmup_steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.step.lambda_coef = lambda_at(run.state, run.config.distillation)
    run.optimizer.zero_grad()
    counts = Counts(*total(accelerator, torch.tensor(count_images(window), dtype=torch.float64)).tolist())
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(window, start=1):
        last = number == len(window)
        with nullcontext() if last else accelerator.no_sync(run.wrapped):
            batch = on_device(batch, run)._replace(draw=draw_of(run))  # noqa: PLW2901
            loss, terms = run.wrapped(batch, teach(run, run.stage, batch), counts)
            # The processes' gradients are averaged, while every process holds its share of one sum.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in terms.raw.items():
            sums[name] = sums.get(name, 0) + value.detach()
            sums[f"{name}/weighted"] = sums.get(f"{name}/weighted", 0) + terms.weighted[name].detach()
        for name, value in terms.seen.items():
            sums[name] = sums.get(name, 0) + value.detach()
    values = dict(zip(sums, total(accelerator, torch.stack(list(sums.values()))).tolist(), strict=True))
    norm = accelerator.clip_grad_norm_(run.step.parameters(), training.max_grad_norm or float("inf"))
    broken = broken_terms(values)
    if broken or not math.isfinite(norm):
        about = {"state": run.state, "training": training, "optimizer": run.optimizer, "accelerator": accelerator}
        leave_out(broken, window, **about)
        return {}
    run.optimizer.step()
    loss_value = sum(value for name, value in values.items() if name.endswith("/weighted"))
    where = run.place(run.state.step + 1, "train")
    coefficient = {"lambda": run.step.lambda_coef} if run.step.objectives else {}
    return {**where, "loss": loss_value, "lr": rate, **coefficient, "grad_norm": float(norm), **values}


def draw_of(run: Run) -> int:
    """What names this step's draws: a function of seed and step alone, so that no split into batches changes them."""
    return int(np.random.SeedSequence([run.config.seed, run.state.step]).generate_state(1)[0])


def teach(run: Run, stage: Stage, batch: Batch) -> tuple[Lesson, ...]:
    """The teachers' answers to a batch, in the run's precision."""
    if stage.team is None:
        return ()
    with torch.no_grad(), run.accelerator.autocast():
        return stage.team.teach(batch)


def audit(run: Run, batch: Batch) -> None:
    """Refuse terms that teach nothing, in this stage and all to come, before there is anything to lose.

    In eval mode, so that BatchNorm does not count this batch twice.
    """
    batch = on_device(batch, run)._replace(draw=draw_of(run))
    counts = Counts(*map(float, count_images([batch])))
    for stage in run.stages[run.state.stage :]:
        steps = run.steps_in_stage if stage is run.stage else 0
        set_trainable(run.student, run.pace.frozen_at(steps, stage.config.training), stage.config.model.batch_norm)
        stage.step.eval()
        with run.accelerator.autocast():
            _, terms = stage.step(batch, teach(run, stage, batch), counts)
        audit_gradients(terms, stage.step, stage.name)
    enter_training_mode(run)


def load_batches(run: Run) -> Iterator[Batch]:
    """Micro-batches of this process from the state's position on, without end."""
    training = run.config.training
    sampler = StepSampler(
        len(run.stage.train_set),
        run.config.seed,
        training.batch_size,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        start_step=run.state.step * training.accumulation,
    )
    loader = DataLoader(
        run.stage.train_set,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=training.num_workers,
        generator=torch.Generator(),  # each start of a loader draws a number, and resuming is one more start
        worker_init_fn=leave_signals_to_the_run,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    try:
        yield from loader
    except DataError as error:  # from a worker process it comes with that process's whole traceback as text
        raise DataError(str(error).rsplit("samlet.errors.DataError: ", 1)[-1].strip()) from None


def on_device(batch: Batch, run: Run) -> Batch:
    """A batch where the run computes."""
    return to_device(batch, run.accelerator.device, run.config.training)


def report_skipped(run: Run, window: Sequence[Batch], progress: StepProgress) -> None:
    """Name every broken image once."""
    for path in gathered([path for batch in window for path in batch.skipped], run.accelerator):
        if path not in run.state.skipped_images:
            run.state.skipped_images.append(path)
            progress.say(f"skipped a broken image: {path}")


def validation_is_due(run: Run) -> bool:
    """After every n epochs or steps of a stage, and at its end."""
    return run.pace.validates_after(run.steps_in_stage, run.config.training, run.config.validation)


def validate_and_judge(run: Run, progress: StepProgress) -> bool:
    """Measure the student; note, keep and draw what came out; whether the stage has stopped to improve."""
    config, state = run.config.validation, run.state
    run.student.eval()
    metrics = validate(run.student, run.val_set, run.accelerator, config.max_images)
    drop, patience = 0.0, config.early_stopping_patience
    if run.guard is not None:
        metrics |= run.guard.measure(run.student, run.accelerator)
        drop = run.guard.drop(metrics, state)
    eligible = run.guard is None or run.guard.allows(drop)
    found = judge(
        state, metrics[config.metric], patience=patience, distillation=run.config.distillation, eligible=eligible
    )
    if found.lowered_lambda is not None:
        progress.say(f"step {state.step}: {config.metric} is on a plateau; lambda is now {found.lowered_lambda:g}")
    if found.ends_stage:
        what = f"stage {run.stage.name}" if run.stage.name else "early"
        progress.say(f"stopping {what}: no better {config.metric} in {patience} validations")
    if not run.accelerator.is_main_process:
        return found.ends_stage
    row = {**run.place(state.step, "val"), **metrics}
    run.folder.log(row, events=run.config.logging.tensorboard)
    progress.say(
        f"step {state.step}: point mIoU {metrics['point_miou']:.4f}, box mIoU {metrics['box_miou']:.4f}"
        + ("" if run.guard is None else run.guard.describe(metrics, drop))
        + (", the best so far" if found.is_best else "")
    )
    if found.is_best:
        run.folder.save_best(run.student, row)
    overlays = run.folder.overlays / f"step-{state.step:08d}"
    draw_overlays(overlays, run.val_set, run.student, run.stage.team, config.overlays)
    return found.ends_stage


def checkpoint_is_due(run: Run) -> bool:
    """After every validation, and every n steps where the configuration says so."""
    every = run.config.checkpoint.every_steps
    return validation_is_due(run) or (every is not None and run.state.step % every == 0)


def save(run: Run) -> None:
    """Write a checkpoint; the main process writes, for all."""
    random_states = gather_random_states(run.accelerator)
    if run.accelerator.is_main_process:
        run.state.metrics_bytes = run.folder.metrics_bytes()
        scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None
        save_checkpoint(
            run.folder.checkpoints,
            run.state,
            student=run.student,
            optimizer=run.optimizer.optimizer,
            random_states=random_states,
            scaler=scaler,
        )
        run.folder.drop_old_checkpoints(run.config.checkpoint.keep_last)
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> None:
    """Put the best student where people look, draw the curves, and say what came out."""
    if run.accelerator.is_main_process:
        published = run.folder.publish_best()
        outcome = {"steps": run.state.step, "best": run.state.best, "best_step": run.state.best_step}
        run.folder.update_facts(**facts_of_end(run.folder.best / "student.safetensors", **outcome))
        run.accelerator.print(
            f"done: {run.state.step} steps, best {run.config.validation.metric} {run.state.best:.4f} at step "
            f"{run.state.best_step}\n" + "\n".join(f"  {path}" for path in published)
        )
    run.accelerator.wait_for_everyone()


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values, every default filled in."""
    return config.model_dump(mode="json", by_alias=True)
