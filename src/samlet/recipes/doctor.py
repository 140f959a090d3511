"""Look at a run before it is paid for: two optimizer steps of each stage, taken by the run's own code.

Says what every term is worth, where its gradient goes and what it costs, where a step's time goes, what moved that
should not, how much memory it took, and how long the whole run will be. Leaves nothing behind.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from samlet.config import RunConfig
from samlet.data.sampler import SampleKey
from samlet.distill.store import StoreReader, decoded
from samlet.distill.stored import EMBEDDING, StoredTeacher
from samlet.distill.teacher import LiveTeacher
from samlet.engine.assembly import build_team, load_teachers
from samlet.engine.device import build_accelerator, memory_format
from samlet.engine.diagnosis import (
    Reading,
    StepTimes,
    Still,
    Stopwatch,
    StoreReading,
    compare_stores,
    read_terms,
    timing,
)
from samlet.engine.diagnosis_page import show
from samlet.engine.evaluation import evaluate_sam
from samlet.engine.findings import Diagnosis, Finding, findings, findings_of_stores
from samlet.engine.memory import keep_freed_memory, peak_memory
from samlet.engine.parts import set_weight_decay
from samlet.engine.run_dir import RunDir
from samlet.engine.step import Counts, count_images
from samlet.engine.validation import search_unfiltered
from samlet.errors import SamletError
from samlet.extraction import pictures_of
from samlet.labelling import stored_labels
from samlet.recipes import train
from samlet.run import BATCHES_TO_MEASURE, Run, Stage, set_up

if TYPE_CHECKING:
    from samlet.data import ValidationSet

STEPS = 2
IMAGES = 2  # that a validation is timed on


@dataclass(frozen=True)
class StageReport:
    """What one stage showed, and how long it will be."""

    diagnosis: Diagnosis
    times: StepTimes  # of the last of the steps, when nothing is done for the first time any more
    seconds: float  # of all its steps
    validations: int
    checkpoints: int
    images: tuple[str, ...]  # of the first batch


def doctor(config: RunConfig, *, as_json: bool = False) -> int:
    """Examine a configuration and print what was found; the exit code, 2 where something is off.

    Raises:
        SamletError: something it was given cannot be used, as `samlet train` would say.
    """
    with tempfile.TemporaryDirectory(prefix="samlet-doctor-") as place, redirect_stdout(sys.stderr):
        report = examine(config, Path(place))
    if as_json:
        sys.stdout.write(json.dumps(without_nan(report), indent=2, allow_nan=False) + "\n")
    else:
        show(report)
    return 2 if any(finding["level"] == "error" for finding in report["findings"]) else 0


def examine(config: RunConfig, place: Path) -> dict[str, Any]:
    """Everything that the doctor knows, as JSON values; `place` is a folder that may be written."""
    training = config.training.model_copy(update={"num_workers": 0})  # so that the data's own time shows
    resume = config.resume if isinstance(config.resume, Path) else "auto"
    changed = config.model_copy(update={"training": training, "output_dir": place, "resume": resume})
    accelerator = build_accelerator(training)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with _saying("reading data and models") as say:
        run = set_up(changed, accelerator, RunDir(place), images_to_label=images_needed(config))
        reports = []
        for number, stage in enumerate(run.stages[run.state.stage :], start=run.state.stage):
            say(f"{f'stage {stage.name}: ' if stage.name else ''}two steps")
            if number > run.state.stage:
                run.state.stage, run.state.stage_began = number, run.state.step
            reports.append(examine_stage(run, config.training.num_workers))
        say("validation")
        per_validation = seconds_of_validation(run)
        say("a checkpoint")
        per_checkpoint = seconds_of_checkpoint(run)
        report = as_plain(run, config, reports, per_validation, per_checkpoint)  # its memory is that of the run alone
        say("stores")
        stores = read_stores(run, reports[0].images)
    found = [finding._asdict() for finding in findings_of_stores(stores)]
    healthy = report["healthy"] and not found
    return {
        **report,
        "stores": [store._asdict() for store in stores],
        "findings": found + report["findings"],
        "healthy": healthy,
    }


def images_needed(config: RunConfig) -> int:
    """How many of the first images the examination may look at."""
    steps = [
        max(STEPS * stage.training.accumulation, BATCHES_TO_MEASURE) * stage.training.batch_size
        for stage in config.resolved()
    ]
    return max(steps)


def examine_stage(run: Run, num_workers: int) -> StageReport:
    """Two optimizer steps of the present stage; of each, the first micro-batch is read term by term."""
    set_weight_decay(run.optimizer, run.config.training.weight_decay)
    train.enter_training_mode(run)
    train.wrap(run)
    training = run.config.training
    frozen = run.pace.frozen_at(run.steps_in_stage, training)
    still = Still(run.step, run.stage.team, frozen, run.config.model.batch_norm)
    batches = train.load_batches(run)
    images: tuple[str, ...] = ()
    readings: list[Reading] = []
    norms: list[float] = []
    refused: list[str] = []
    times = StepTimes()
    for _ in range(STEPS):
        watch = Stopwatch(run.accelerator.device)
        with watch.running("data"):
            window = [next(batches) for _ in range(training.accumulation)]
        images = images or window[0].image_ids
        readings.append(read(run, window[0]))
        try:
            with timing(run.step, run.stage.team, run.optimizer.optimizer) as times:
                row = train.optimizer_step(run, window)
            norms += [float(row["grad_norm"])] if row else []
        except SamletError as error:
            refused.append(str(error))
        times.data = watch.seconds["data"]
        run.state.step += 1
    diagnosis = Diagnosis(run.stage.name, readings, norms, training.max_grad_norm, still.moved(), still.count, refused)
    seconds = run.stage.steps * seconds_of_step(times, num_workers)
    return StageReport(diagnosis, times, seconds, *interruptions(run), images)


def interruptions(run: Run) -> tuple[int, int]:
    """How often the present stage is measured, and how often it is saved, where it does not stop early."""
    training, validation, every = run.config.training, run.config.validation, run.config.checkpoint.every_steps
    before = sum(stage.steps for stage in run.stages[: run.state.stage])
    steps = range(1, run.stage.steps + 1)
    measured = {step for step in steps if run.pace.validates_after(step, training, validation)}
    saved = measured | {step for step in steps if every is not None and (before + step) % every == 0}
    return len(measured), len(saved)


def read(run: Run, batch: Any) -> Reading:
    """The terms of a batch at the full weight of the distillation, which a warm-up would hide."""
    run.step.lambda_coef = run.config.distillation.lambda_coef
    batch = train.on_device(batch, run)._replace(draw=train.draw_of(run))
    counts = Counts(*map(float, count_images([batch])))
    with run.accelerator.autocast():
        return read_terms(run.step, batch, lambda given: train.teach(run, run.stage, given), counts)


def read_stores(run: Run, images: Sequence[str]) -> list[StoreReading]:
    """What the run's stores hold of some images, beside what their teachers say now; of teachers with a checkpoint."""
    for stage in run.stages:
        if stage.team is not None:
            stored = [teacher for teacher in stage.team.teachers if isinstance(teacher, StoredTeacher)]
            return [found for teacher in stored for found in read_store(run, stage, teacher, images)]
    return []


def read_store(run: Run, stage: Stage, stored: StoredTeacher, images: Sequence[str]) -> Iterator[StoreReading]:
    """One teacher, if its checkpoint is given; of each image variant 0, without the colours that no store knows."""
    config, device = stage.config, run.accelerator.device
    (given,) = [teacher for teacher in config.teachers if teacher.name == stored.name]
    if given.checkpoint is None:
        return
    models = load_teachers([given], {}, config.model.image_size, device, config.training)
    team = build_team([given.model_copy(update={"weight": None})], models, {}, stage.step)  # alone, whatever its share
    assert team is not None
    (live,) = team.teachers
    assert isinstance(live, LiveTeacher)
    reader = StoreReader(config.store_of(given), "train")
    labels = stored_labels(config) if config.mask_teacher.enable else None
    pictures = pictures_of(config, "train", labels)
    now, then = [], []
    for image_id in images:
        pixels = pictures.picture(SampleKey(0, pictures.image_ids.index(image_id))).pixels
        placed = pixels[None].to(device, memory_format=memory_format(config.training))
        with run.accelerator.autocast():
            features = live.encode_pixels(placed)
        said = {EMBEDDING: features.embedding, **features.taps}
        now.append({name: value[0].float().cpu() for name, value in said.items()})
        then.append(decoded(reader.read(image_id, 0, list(said))))
    yield compare_stores(reader.identity, reader.root, now, then, given.precision or config.training.precision)


def seconds_of_step(times: StepTimes, num_workers: int) -> float:
    """Of one optimizer step, where workers prepare the data beside it."""
    if num_workers == 0:
        waiting = times.data
    else:
        waiting = max(times.data / min(num_workers, os.cpu_count() or 1) - times.computing, 0.0)
    return times.computing + waiting + times.optimizer


def seconds_of_validation(run: Run) -> float:
    """Of one validation, its retention set and automatic masks included, judged by its first images."""
    found, config = 0.0, run.config.validation
    measures: list[tuple[ValidationSet, int | None, Callable[[range], object]]] = [
        (run.val_set, config.max_images, lambda own: evaluate_sam(run.student, run.val_set, indices=own))
    ]
    if (guard := run.guard) is not None:
        measures.append(
            (guard.images, guard.max_images, lambda own: evaluate_sam(run.student, guard.images, indices=own))
        )
    if (every := config.everything) is not None:
        search = partial(search_unfiltered, run.student, run.val_set, points_per_side=every.points_per_side)
        measures.append((run.val_set, every.max_images, search))
    for images, most, measure in measures:
        count = min(len(images), most or len(images))
        timed = min(count, IMAGES)
        watch = Stopwatch(run.accelerator.device)
        with watch.running("images"):
            measure(range(timed))
        found += watch.seconds["images"] / timed * count
    return found / int(run.accelerator.num_processes)


def seconds_of_checkpoint(run: Run) -> float:
    """Of writing student, optimizer and all that is beside them into the temporary folder."""
    watch = Stopwatch(run.accelerator.device)
    with watch.running("checkpoint"):
        train.save(run)
    return watch.seconds["checkpoint"]


def as_plain(
    run: Run, config: RunConfig, reports: list[StageReport], per_validation: float, per_checkpoint: float
) -> dict[str, Any]:
    """The report as JSON values."""
    found: list[Finding] = [finding for report in reports for finding in findings(report.diagnosis)]
    validations = sum(report.validations for report in reports) + (run.guard is not None)
    checkpoints = sum(report.checkpoints for report in reports)
    parts = {
        "steps": sum(report.seconds for report in reports),
        "validations": validations * per_validation,
        "checkpoints": checkpoints * per_checkpoint,
    }
    cuda = run.accelerator.device.type == "cuda"
    return {
        "run": {
            "student": run.student.kind,
            "parameters": sum(parameter.numel() for parameter in run.student.parameters()),
            "image_size": run.student.image_size,
            "device": run.accelerator.device.type,
            "precision": config.training.precision,
            "batch_size": config.training.batch_size,
            "accumulation": config.training.accumulation,
            "steps": sum(stage.steps for stage in run.stages),
            "train_images": len(run.stage.train_set),
            "val_images": len(run.val_set),
        },
        "stages": [_stage(report) for report in reports],
        "memory": {
            "peak_rss_bytes": peak_memory(torch.device("cpu")),
            "peak_cuda_bytes": peak_memory(run.accelerator.device) if cuda else None,
        },
        "predicted_seconds": {
            **parts,
            "validation_count": validations,
            "checkpoint_count": checkpoints,
            "whole": sum(parts.values()),
        },
        "findings": [finding._asdict() for finding in found],
        "healthy": not any(finding.level == "error" for finding in found),
    }


def without_nan(value: Any) -> Any:
    """The same values with null for what is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: without_nan(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stage(report: StageReport) -> dict[str, Any]:
    seen = report.diagnosis
    return {
        "stage": seen.stage,
        "batches": [
            {
                "terms": {name: term._asdict() for name, term in reading.terms.items()},
                "student_iou": reading.student_iou,
                "teacher_iou": reading.teacher_iou,
            }
            for reading in seen.readings
        ],
        "grad_norms": list(seen.norms),
        "milliseconds": {part: 1000 * seconds for part, seconds in report.times.seconds().items()},
        "moved": list(seen.moved),
        "frozen": seen.frozen,
        "seconds": report.seconds,
        "validations": report.validations,
        "checkpoints": report.checkpoints,
    }


@contextmanager
def _saying(first: str) -> Iterator[Any]:
    """A line on the terminal that says what is being looked at; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(first) as status:
        yield status.update
