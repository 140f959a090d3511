"""Train a student: read from top to bottom, this file is the whole run.

`train(config)` sets up, `fit` is the loop, `Run` is what the loop carries. Started twice with the same
configuration it goes on where it stopped, to the same weights as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from samlet.config import RunConfig
from samlet.data.dataset import SegmentationDataset, ValidationSet, collate
from samlet.data.sampler import SampleKey, StepSampler, epoch_order
from samlet.distill.configs import normalized_weights
from samlet.distill.corrections import Corrections
from samlet.distill.objectives import build_objectives
from samlet.distill.teacher import Lesson, LiveTeacher, TeacherTeam
from samlet.engine.audit import audit_gradients
from samlet.engine.checkpoint import TrainerState, save_checkpoint
from samlet.engine.curves import plot_curves
from samlet.engine.device import build_accelerator, place, to_device
from samlet.engine.facts import facts_of_end, facts_of_start, refuse_other_config
from samlet.engine.parts import build_optimizer, calibrate_batch_norm, set_trainable
from samlet.engine.processes import agreed, gather_random_states, gathered, total
from samlet.engine.progress import StepProgress, shown_terms
from samlet.engine.resume import resume
from samlet.engine.run_dir import RunDir
from samlet.engine.schedule import learning_rate
from samlet.engine.signals import StopRequest, leave_signals_to_the_run, listen_for_stop
from samlet.engine.step import Counts, TrainStep, count_images
from samlet.engine.validation import draw_overlays, validate
from samlet.errors import DataError, SamletError
from samlet.models import Sam, load_sam
from samlet.types import Batch

BATCHES_TO_CALIBRATE = 8
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Run:
    """What the loop carries."""

    config: RunConfig
    accelerator: Accelerator
    folder: RunDir
    state: TrainerState
    step: TrainStep
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    team: TeacherTeam | None
    train_set: SegmentationDataset
    val_set: ValidationSet

    @property
    def student(self) -> Sam:
        """What is trained."""
        return self.step.student

    @property
    def micro_batches_per_epoch(self) -> int:
        """Those of all processes together count as one."""
        return -(-len(self.train_set) // self.config.training.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        training = self.config.training
        return training.max_steps or -(-training.epochs * self.micro_batches_per_epoch // training.accumulation)

    def epoch_after(self, step: int) -> int:
        """Epochs completed once `step` optimizer steps are done."""
        return step * self.config.training.accumulation // self.micro_batches_per_epoch


def train(config: RunConfig) -> int:
    """Run a configuration to its end, or from where it stopped; the exit code (143 and 130: stopped by a signal).

    Raises:
        SamletError: something it was given cannot be used; nothing that was written before is lost.
    """
    accelerator = build_accelerator(config.training)
    folder = RunDir(config.output_dir)
    alone = folder.locked() if accelerator.is_main_process else nullcontext()
    with alone, listen_for_stop() as stop:
        try:
            run = set_up(config, accelerator, folder)
            if not run.state.finished:
                fit(run, stop)
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
    refuse_other_config(plain_config(config), folder)
    size = config.model.image_size
    train_set = config.dataset.build_train(
        image_size=size, seed=config.seed, prompts=config.prompts, augmentation=config.augmentation
    )
    val_set = config.dataset.build_val(seed=config.seed)
    student = config.model.build()
    step = build_step(config, student)
    set_trainable(student, config.training.freeze, config.model.batch_norm)
    optimizer = build_optimizer(
        student,
        learning_rate=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        betas=config.training.betas,
    )
    place(step, accelerator.device, config.training)
    state = resume(config.resume, accelerator, folder, student, optimizer)
    if config.training.compile:
        student.image_encoder.compile()
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        state=state,
        step=step,
        wrapped=step,
        optimizer=accelerator.prepare_optimizer(optimizer),
        team=build_team(config, accelerator.device, step),
        train_set=train_set,
        val_set=val_set,
    )
    if state.step == 0 and config.model.batch_norm == "calibrated":
        calibrate(run)
    accelerator.wait_for_everyone()  # what is written here must not look like an earlier run to a slower process
    if accelerator.is_main_process:
        images = [(record.image_id, record.image_path) for record in (*train_set.records, *val_set.records)]
        folder.write_config(plain_config(config))
        folder.update_facts(**facts_of_start(plain_config(config), accelerator.num_processes, images))
    return run


def calibrate(run: Run) -> None:
    """Measure BatchNorm statistics on the first images of the first epoch, the same ones in every process."""
    order = epoch_order(len(run.train_set), run.config.seed, 0)[: BATCHES_TO_CALIBRATE * run.config.training.batch_size]
    samples = [run.train_set[SampleKey(0, int(index))] for index in order]
    size = max(len(samples) // BATCHES_TO_CALIBRATE, 1)
    batches = (collate(samples[start : start + size]) for start in range(0, len(samples), size))
    calibrate_batch_norm(run.student, (on_device(batch, run).pixels for batch in batches))


def build_step(config: RunConfig, student: Sam) -> TrainStep:
    """The training step around a student."""
    prompts = config.prompts
    return TrainStep(
        student,
        config.loss,
        build_objectives(config.distillation),
        config.distillation.lambda_coef,
        team=config.distillation.team,
        trust=config.distillation.trust,
        corrections=Corrections(prompts.correction_rounds, prompts.correction_mask_input, prompts.correction_min_cells),
    )


def build_team(config: RunConfig, device: torch.device, step: TrainStep) -> TeacherTeam | None:
    """The teachers, frozen and on the device; none where nothing is distilled."""
    if not step.objectives:
        return None
    encoder_taps = sorted({tap for objective in step.objectives for tap in objective.teacher_taps})
    teachers = []
    for teacher in config.teachers:
        sam = load_sam(teacher.checkpoint, image_size=teacher.image_size or config.model.image_size)
        place(sam, device, config.training)
        if config.training.compile:
            sam.image_encoder.compile()
        precision = None if teacher.precision is None else PRECISIONS[teacher.precision]
        live = LiveTeacher(
            teacher.name, sam, encoder_taps, step.decoder_taps, precision=precision, offload=teacher.offload
        )
        teachers.append(live)
    return TeacherTeam(teachers, normalized_weights(config.teachers))


def wrap(run: Run) -> None:
    """Wrap the step for precision and processes; again whenever the set of trainable weights changes."""
    inner = run.accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)
    run.accelerator._models.clear()  # it keeps every model it has ever wrapped
    run.wrapped = run.accelerator.prepare_model(inner)


def enter_training_mode(run: Run, epoch: int) -> None:
    """Train mode, less what is frozen in this epoch."""
    training = run.config.training
    thawed = training.unfreeze_epoch is not None and epoch >= training.unfreeze_epoch
    set_trainable(run.student, () if thawed else training.freeze, run.config.model.batch_norm)


def thaws_at(run: Run, step: int) -> bool:
    """Whether the frozen parts begin to train with this step."""
    epoch = run.config.training.unfreeze_epoch
    return epoch is not None and step > 0 and run.epoch_after(step - 1) < epoch <= run.epoch_after(step)


def fit(run: Run, stop: StopRequest) -> None:
    """The loop: one pass is one optimizer step."""
    config, state = run.config, run.state
    batches = load_batches(run)
    audited = False
    enter_training_mode(run, run.epoch_after(state.step))
    wrap(run)
    with StepProgress(run.total_steps, state.step, shown=run.accelerator.is_main_process) as progress:
        while state.step < run.total_steps and not state.finished:
            if thaws_at(run, state.step):
                enter_training_mode(run, run.epoch_after(state.step))
                wrap(run)
            window = [next(batches) for _ in range(config.training.accumulation)]
            if not audited:
                audit(run, window[0])
                audited = True
            row = optimizer_step(run, window)
            state.step += 1
            report_skipped(run, window, progress)
            if run.accelerator.is_main_process and row and state.step % config.logging.every_steps == 0:
                run.folder.log(row, events=config.logging.tensorboard)
            progress.advance(state.step, shown_terms(row))
            if validation_is_due(run):
                validate_and_judge(run, progress)
                enter_training_mode(run, run.epoch_after(state.step))
            stopping = agreed(run.accelerator, stop.signal is not None)
            state.finished = state.finished or state.step >= run.total_steps
            if checkpoint_is_due(run) or stopping or state.finished:
                save(run)
            if stopping and not state.finished:
                progress.say(f"stopped at step {state.step}; the same command goes on from here")
                return


def optimizer_step(run: Run, window: Sequence[Batch]) -> dict[str, float | int | str]:
    """Forward and backward over the micro-batches of one step, then update; the row to log (none if left out)."""
    training, accelerator = run.config.training, run.accelerator
    rate = learning_rate(
        run.state.step,
        total_steps=run.total_steps,
        peak=training.learning_rate,
        floor=training.min_learning_rate,
        warmup_steps=training.warmup_steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad()
    counts = Counts(*total(accelerator, torch.tensor(count_images(window), dtype=torch.float64)).tolist())
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(window, start=1):
        last = number == len(window)
        with nullcontext() if last else accelerator.no_sync(run.wrapped):
            batch = on_device(batch, run)._replace(draw=draw_of(run))  # noqa: PLW2901
            loss, terms = run.wrapped(batch, teach(run, batch), counts)
            # The processes' gradients are averaged, while every process holds its share of one sum.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in terms.raw.items():
            sums[name] = sums.get(name, 0) + value.detach()
            sums[f"{name}/weighted"] = sums.get(f"{name}/weighted", 0) + terms.weighted[name].detach()
        for name, value in terms.seen.items():
            sums[name] = sums.get(name, 0) + value.detach()
    values = dict(zip(sums, total(accelerator, torch.stack(list(sums.values()))).tolist(), strict=True))
    norm = accelerator.clip_grad_norm_(run.student.parameters(), training.max_grad_norm or float("inf"))
    if not all_finite(run, values, float(norm), window):
        return {}
    run.optimizer.step()
    loss_value = sum(value for name, value in values.items() if name.endswith("/weighted"))
    where: dict[str, Any] = {"step": run.state.step + 1, "epoch": run.epoch_after(run.state.step), "split": "train"}
    return {**where, "loss": loss_value, "lr": rate, "grad_norm": float(norm), **values}


def draw_of(run: Run) -> int:
    """What names this step's draws: a function of seed and step alone, so that no split into batches changes them."""
    return int(np.random.SeedSequence([run.config.seed, run.state.step]).generate_state(1)[0])


def teach(run: Run, batch: Batch) -> tuple[Lesson, ...]:
    """The teachers' answers to a batch, in the run's precision."""
    if run.team is None:
        return ()
    with torch.no_grad(), run.accelerator.autocast():
        return run.team.teach(batch)


def all_finite(run: Run, values: Mapping[str, float], norm: float, window: Sequence[Batch]) -> bool:
    """Whether the step may be taken; every process sees the same numbers and decides alike.

    Raises:
        SamletError: it may not, and the configuration does not let it be left out; names the terms and images.
    """
    broken = [name for name, value in values.items() if not math.isfinite(value) and not name.endswith("/weighted")]
    if not broken and math.isfinite(norm):
        return True
    if not broken and run.accelerator.scaler is not None:
        run.optimizer.step()  # fp16 overflowed: the scaler leaves the step out itself and lowers its scale
        return False
    images = gathered([name for batch in window for name in batch.image_ids], run.accelerator)
    what = f"{', '.join(broken) or 'the gradient'} not finite at step {run.state.step + 1}, images {', '.join(images)}"
    run.state.skipped_steps += 1
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.update()  # the gradients were unscaled already, and no step follows that would do it
    training = run.config.training
    if training.non_finite == "abort" or run.state.skipped_steps > training.max_skipped_steps:
        raise SamletError(
            f"{what}; no step was taken with it, and the last checkpoint is good. Look at these images with "
            "`samlet check-data`, lower training.learning_rate, or set training.non_finite to 'skip'"
        )
    run.accelerator.print(f"left out: {what} ({run.state.skipped_steps} of {training.max_skipped_steps})")
    return False


def audit(run: Run, batch: Batch) -> None:
    """Refuse terms that teach nothing; in eval mode, so that BatchNorm does not count this batch twice."""
    run.step.eval()
    batch = on_device(batch, run)._replace(draw=draw_of(run))
    _, terms = run.step(batch, teach(run, batch), Counts(*map(float, count_images([batch]))))
    audit_gradients(terms, run.step)
    enter_training_mode(run, run.epoch_after(run.state.step))


def load_batches(run: Run) -> Iterator[Batch]:
    """Micro-batches of this process from the state's position on, without end."""
    training = run.config.training
    sampler = StepSampler(
        len(run.train_set),
        run.config.seed,
        training.batch_size,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        start_step=run.state.step * training.accumulation,
    )
    loader = DataLoader(
        run.train_set,
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
    """At the end of every n-th epoch or after every n steps, and at the end of the run."""
    config, step = run.config.validation, run.state.step
    if step >= run.total_steps:
        return True
    if config.every_steps is not None:
        return step % config.every_steps == 0
    return run.epoch_after(step) // config.every_epochs > run.epoch_after(step - 1) // config.every_epochs


def validate_and_judge(run: Run, progress: StepProgress) -> None:
    """Measure the student; note, keep and draw what came out; end the run if it has stopped to improve."""
    config, state = run.config.validation, run.state
    run.student.eval()
    metrics = validate(run.student, run.val_set, run.accelerator, config.max_images)
    value = metrics[config.metric]
    state.validations_without_best += 1
    if state.best is None or value > state.best:
        state.best, state.best_step, state.validations_without_best = value, state.step, 0
    patience = config.early_stopping_patience
    if patience is not None and state.validations_without_best >= patience:
        state.finished = True
        progress.say(f"stopping early: no better {config.metric} in {patience} validations")
    if not run.accelerator.is_main_process:
        return
    where: dict[str, Any] = {"step": state.step, "epoch": run.epoch_after(state.step), "split": "val"}
    run.folder.log({**where, **metrics}, events=run.config.logging.tensorboard)
    progress.say(
        f"step {state.step}: point mIoU {metrics['point_miou']:.4f}, box mIoU {metrics['box_miou']:.4f}"
        + (", the best so far" if state.best_step == state.step else "")
    )
    if state.best_step == state.step:
        run.folder.save_best(run.student, {**where, **metrics})
    draw_overlays(run.folder.overlays / f"step-{state.step:08d}", run.val_set, run.student, run.team, config.overlays)


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
