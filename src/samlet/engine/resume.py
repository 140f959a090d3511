"""Going on where a run stopped: which checkpoint it begins from, and the run folder brought back to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from samlet.engine.checkpoint import TrainerState, load_checkpoint, newest_valid
from samlet.engine.processes import restore_random_state
from samlet.errors import SamletError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from samlet.distill.projections import Projections
    from samlet.engine.ema import AverageStudent
    from samlet.engine.run_dir import RunDir
    from samlet.models.sam import Sam


def resume(
    wanted: Path | str,
    accelerator: Accelerator,
    folder: RunDir,
    *,
    student: Sam,
    optimizer: torch.optim.Optimizer,
    average: AverageStudent | None,
    projections: Projections,
) -> TrainerState:
    """Fill everything from the checkpoint that is wanted; a fresh state where there is none.

    `wanted`: "auto" (the newest whole checkpoint of the folder, if any), "never", or a checkpoint's path.

    Raises:
        SamletError: there is a run and none is wanted; no checkpoint is whole; the one named is not, or does not fit.
    """
    place = _chosen(wanted, accelerator, folder)
    if place is None:
        if accelerator.is_main_process:
            folder.begins_anew()
        return TrainerState()
    own = place.resolve().parent == folder.checkpoints.resolve()
    state, random_states, scaler = load_checkpoint(place, student, optimizer, average=average, projections=projections)
    restore_random_state(random_states, accelerator)
    if scaler and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    if not own:
        state.retention_reference = None  # of another run, and perhaps of other images
    if accelerator.is_main_process and own:
        folder.continues_at(state.metrics_bytes)
        folder.drop_checkpoints_after(place)
    elif accelerator.is_main_process:
        folder.begins_anew()
    accelerator.print(f"resumed from {place}, step {state.step}")
    return state


def _chosen(wanted: Path | str, accelerator: Accelerator, folder: RunDir) -> Path | None:
    """The checkpoint to begin from; None where the run starts anew."""
    if isinstance(wanted, Path):
        return wanted
    if wanted == "never":
        if folder.config.exists():
            raise SamletError(f"{folder.path}: holds a run already, and resume is 'never'; choose another output_dir")
        return None
    place, complaints = newest_valid(folder.checkpoints)
    for complaint in complaints:
        accelerator.print(f"skipped: {complaint}")
    if place is None and complaints:
        raise SamletError(f"{folder.checkpoints}: no checkpoint is whole; delete {folder.path} to start anew")
    return place
