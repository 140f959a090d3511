"""Compute the teachers' features ahead of time: `samlet extract CONFIG`, into one store a teacher.

What is there already is kept: a second start goes on where the first one stopped, an edited or added image is
computed alone. Any number of processes and machines may run the same command on a shared folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from samlet.engine.executors import run_local, run_ray
from samlet.engine.memory import readable
from samlet.errors import ConfigError
from samlet.extraction import Extractor, Plan, job_of, plan_of
from samlet.mask_extraction import MaskExtractor, mask_job_of
from samlet.schema import all_mistakes

if TYPE_CHECKING:
    from pathlib import Path

    from samlet.config import RunConfig
    from samlet.distill.configs import TeacherConfig
    from samlet.labelling import StoredLabels

Engine = Literal["local", "ray"]


def extract(
    config: RunConfig,
    *,
    engine: Engine = "local",
    processes: int = 1,
    threads: int | None = None,
    store: Path | None = None,
) -> int:
    """Bring the store of every teacher that a configuration reads, or could read, to what it needs; the exit code.

    `store` is the folder of a single teacher's store, where it is not called by the teacher's name.

    Raises:
        SamletError: something it was given cannot be used, or the disk is too small; what was stored stays.
    """
    teachers = teachers_to_extract(config)
    whose = dict.fromkeys(teacher.name for teacher in teachers)
    whose |= {config.mask_source.name: None} if config.mask_teacher.enable else {}
    if store is not None and len(whose) > 1:
        names = ", ".join(whose)
        raise ConfigError(f"--store: is one teacher's folder, and there are several teachers ({names}); leave it out")
    run = run_ray if engine == "ray" else run_local
    if teachers:
        refuse_what_no_store_holds(config)
    labels = None
    if config.mask_teacher.enable:
        place = store or config.store_of(config.mask_source)
        mask_job, missing, labels = prepare_masks(config, place)
        code = run(mask_job, MaskExtractor, processes, threads, images=missing) if mask_job else 0
        if code:
            return code
    jobs = [prepare(config, teacher, store or config.store_of(teacher), processes, labels) for teacher in teachers]
    for job, missing in jobs:
        code = run(job, Extractor, processes, threads, images=missing) if job else 0
        if code:
            return code
    return 0


def refuse_what_no_store_holds(config: RunConfig) -> None:
    """Say before hours of work what training on its result would say.

    Raises:
        ConfigError: names the first key and the remedy.
    """
    stored = {"enable": True, "use_precomputed_features": True}
    reading = config.model_copy(update={"distillation": config.distillation.model_copy(update=stored)})
    for loc, message in all_mistakes(reading):
        raise ConfigError(f"{'.'.join(map(str, loc))}: {message}")


def prepare_masks(config: RunConfig, store: Path) -> tuple[str | None, int, StoredLabels]:
    """Say how many images have no automatic masks yet; the job that is left, None where nothing is, and its result.

    Raises:
        SamletError: the teacher or the images cannot be used.
    """
    extractor = MaskExtractor(mask_job_of(config, store))
    plan = extractor.plan()
    lines = (
        f"{config.mask_source.name} -> {extractor.store}",
        f"  images      {plan.images}, {plan.missing} to search",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    job = mask_job_of(config, store, plan.unfinished) if plan.unfinished else None
    return job, plan.missing, extractor.labels


def prepare(
    config: RunConfig, teacher: TeacherConfig, store: Path, processes: int, labels: StoredLabels | None = None
) -> tuple[str | None, int]:
    """Show the plan for one store; the job that is left, None where nothing is, and how many images it has.

    Raises:
        SamletError: the store is of something else, or does not fit on the disk.
    """
    extractor = Extractor(job_of(config, teacher, store, labels=labels))
    plan = plan_of(extractor)
    show_plan(teacher.name, extractor.store, plan, processes)
    plan.refuse_full_disk(extractor.store)
    return (job_of(config, teacher, store, plan.unfinished, labels) if plan.unfinished else None), plan.missing


def teachers_to_extract(config: RunConfig) -> Sequence[TeacherConfig]:
    """Those whose features the configuration reads; where it reads none, all that have weights.

    None where it reads a teacher's automatic masks and distils nothing: then its masks are all that is wanted.

    Raises:
        ConfigError: there is none.
    """
    if config.mask_teacher.enable and config.mask_teacher.precomputed and not config.distills:
        return ()
    stored = [teacher for teacher in config.teachers if config.is_stored(teacher) and teacher.checkpoint is not None]
    found = stored or [teacher for teacher in config.teachers if teacher.checkpoint is not None]
    if not found:
        raise ConfigError("teachers: none has a checkpoint, so there is nothing to extract from; name one")
    return found


def show_plan(teacher: str, store: Path, plan: Plan, processes: int) -> None:
    """Images, bytes and time, before anything is written."""
    seconds = plan.missing * plan.seconds_per_image / processes
    lines = [f"{teacher} -> {store}", f"  images      {plan.images}, {plan.missing} to compute"]
    costs = [
        f"  disk        {readable(plan.bytes_per_image)} an image, {readable(plan.bytes_missing)} in all, "
        f"{readable(plan.bytes_free)} free",
        f"  time        about {_duration(seconds)} ({plan.seconds_per_image:.3g} s an image, {processes} at once)",
    ]
    sys.stdout.write("\n".join(lines + costs * bool(plan.missing)) + "\n")
    sys.stdout.flush()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"
