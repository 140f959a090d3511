"""Train a student: read from top to bottom, this file is the whole run.

`train(config)` sets up (samlet.run), `fit` is the loop, `Run` is what the loop carries. Started twice with the same
configuration it goes on where it stopped, to the same weights as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samlet.config import RunConfig
from samlet.data.batches import collate
from samlet.data.sampler import StepSampler
from samlet.distill.teacher import Lesson
from samlet.engine.audit import audit_gradients
from samlet.engine.checkpoint import save_checkpoint
from samlet.engine.curves import plot_curves
from samlet.engine.device import build_accelerator, to_device
from samlet.engine.facts import facts_of_end
from samlet.engine.finite import broken_terms, leave_out
from samlet.engine.judgement import begin_next_stage, judge, lambda_at
from samlet.engine.memory import keep_freed_memory, peak_memory, readable
from samlet.engine.parts import set_trainable, set_weight_decay
from samlet.engine.processes import agreed, gather_random_states, gathered, together, total
from samlet.engine.progress import StepProgress, shown_terms
from samlet.engine.run_dir import RunDir
from samlet.engine.schedule import learning_rate
from samlet.engine.shard_loop import Stopped
from samlet.engine.signals import StopRequest, leave_signals_to_the_run, listen_for_stop
from samlet.engine.step import Counts, count_images
from samlet.engine.validation import describe_everything, draw_overlays, validate, validate_everything
from samlet.errors import DataError
from samlet.run import Run, Stage, set_up
from samlet.types import Batch


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
    with alone, together(accelerator), listen_for_stop() as stop:
        try:
            run = set_up(config, accelerator, folder, between_images=lambda: _refuse_to_go_on(stop))
            if not run.state.finished:
                fit(run, stop)
                accelerator.print(f"peak memory {readable(peak_memory(accelerator.device))}")
            if run.state.finished:  # at this start or an earlier one, which may have been killed right here
                finish(run)
            if config.logging.curves and accelerator.is_main_process and folder.metrics.exists():
                plot_curves(folder.metrics, folder.curves)
            if accelerator.is_main_process and not run.state.finished:
                folder.update_facts(outcome=f"stopped by signal {stop.signal} at step {run.state.step}")
        except Stopped:  # before the first step: what was prepared so far is kept
            return stop.exit_code
        finally:
            folder.close()
    return 0 if run.state.finished else stop.exit_code


def _refuse_to_go_on(stop: StopRequest) -> None:
    if stop.signal is not None:
        raise Stopped


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
                stop.signal = max(gathered([stop.signal or 0], run.accelerator))  # one process may have got it alone
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
    if run.average is not None:
        run.average.follow(run.student, run.state.step)
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
    metrics = validate(run.measured, run.val_set, run.accelerator, config.max_images)
    if config.everything is not None:
        metrics |= validate_everything(run.measured, run.val_set, run.accelerator, config.everything)
    drop, patience = 0.0, config.early_stopping_patience
    if run.guard is not None:
        metrics |= run.guard.measure(run.measured, run.accelerator)
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
        + describe_everything(metrics)
        + ("" if run.guard is None else run.guard.describe(metrics, drop))
        + (", the best so far" if found.is_best else "")
    )
    if found.is_best:
        run.folder.save_best(run.measured, row)
    overlays = run.folder.overlays / f"step-{state.step:08d}"
    draw_overlays(overlays, run.val_set, run.measured, run.stage.team, config.overlays)
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
            average=run.average,
            projections=run.step.projections,
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
