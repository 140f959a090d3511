"""Checkpoints of a run: everything that resume needs, whole or not at all, in JSON and safetensors.

`checkpoints/step-00000120/` holds student.safetensors, optimizer.safetensors, random.safetensors, trainer.json and
the manifest that vouches for them; where there are such things also lora.safetensors (the student's file holds merged
weights), ema.safetensors and projections.safetensors. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from samlet import __version__
from samlet.artefacts import read_manifest, write_directory
from samlet.distill.projections import load_projections, save_projections
from samlet.engine.parts import named_parameters
from samlet.errors import CheckpointError
from samlet.models.checkpoints import save_sam_safetensors
from samlet.models.lora import adapted_layers, load_merged_state, lora_state

if TYPE_CHECKING:
    from torch import nn

    from samlet.distill.projections import Projections
    from samlet.engine.ema import AverageStudent
    from samlet.models.sam import Sam

FORMAT = 2  # 1 knew no stages
PREFIX = "step-"
LORA, AVERAGE, PROJECTIONS = "lora.safetensors", "ema.safetensors", "projections.safetensors"


@dataclass
class TrainerState:
    """What a run knows besides weights, optimizer and random numbers."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """Best value of the deciding metric so far."""
    best_step: int = 0
    """Step at which it was reached."""
    stage: int = 0
    """Number of the stage, from 0."""
    stage_began: int = 0
    """Optimizer steps done when it began."""
    stage_best: float | None = None
    """Best value of the deciding metric in this stage."""
    validations_without_best: int = 0
    """Of this stage; for early stopping."""
    lambda_coef: float | None = None
    """What the plateau rule has made of the stage's lambda_coef; None: it is as configured."""
    lambda_best: float | None = None
    """Value of the metric that counts as improved upon, for the plateau rule."""
    lambda_waited: int = 0
    """Validations since then, or since lambda was lowered."""
    retention_reference: float | None = None
    """The deciding metric on the retention set before the first step, where there is such a set."""
    skipped_steps: int = 0
    """Steps left out for a non-finite loss or gradient."""
    skipped_images: list[str] = field(default_factory=list)
    """Broken images met so far."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point; what follows belongs to steps that are done again."""
    finished: bool = False
    """The run has come to its end."""


def save_checkpoint(
    folder: Path,
    state: TrainerState,
    *,
    student: Sam,
    optimizer: torch.optim.Optimizer,
    random_states: Mapping[str, torch.Tensor],
    scaler: Mapping[str, Any] | None = None,
    average: AverageStudent | None = None,
    projections: Projections | None = None,
) -> Path:
    """Write `folder/step-N` and return it.

    Raises:
        SamletError: it could not be written; earlier checkpoints are untouched.
    """
    place = folder / f"{PREFIX}{state.step:08d}"

    def fill(temporary: Path) -> None:
        save_sam_safetensors(student, temporary / "student.safetensors")
        moments = _moments(named_parameters(student, projections), optimizer)
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(dict(random_states), temporary / "random.safetensors")
        if lora := lora_state(student):
            save_file(_plain(lora), temporary / LORA)
        if average is not None:
            save_file(_plain(average.tensors()), temporary / AVERAGE)
        if projections:
            save_projections(projections, temporary / PROJECTIONS)
        trainer = {"state": asdict(state), "scaler": dict(scaler or {})}
        (temporary / "trainer.json").write_text(json.dumps(trainer, indent=2), encoding="utf-8")

    write_directory(place, fill, format=FORMAT, samlet=__version__, torch=torch.__version__, step=state.step)
    return place


def load_checkpoint(
    place: Path,
    student: Sam,
    optimizer: torch.optim.Optimizer,
    *,
    average: AverageStudent | None = None,
    projections: Projections | None = None,
) -> tuple[TrainerState, dict[str, torch.Tensor], dict[str, Any]]:
    """Fill student, optimizer and what is beside them from a checkpoint.

    The rest is returned: state, random states, scaler.

    Raises:
        CheckpointError: incomplete, damaged, of a newer samlet, or of another model; the file is named.
    """
    manifest = read_manifest(place)
    version = manifest.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(
            f"{place}: is of format {version}, written by samlet {manifest.get('samlet')}, and this one reads up to "
            f"{FORMAT}; upgrade samlet to read it"
        )
    beside = {LORA: bool(adapted_layers(student)), AVERAGE: average is not None, PROJECTIONS: bool(projections)}
    for name, wanted in beside.items():
        if wanted and name not in manifest["files"]:
            raise CheckpointError(f"{place}: has no {name}: its run had another configuration than this one")
    try:
        lora = load_file(place / LORA) if adapted_layers(student) else {}
        load_merged_state(student, load_file(place / "student.safetensors"), lora)
        if average is not None:
            average.student.load_state_dict(load_file(place / AVERAGE))
        if projections:
            load_projections(projections, place / PROJECTIONS)
        moments = load_file(place / "optimizer.safetensors")
        _load_moments(named_parameters(student, projections), optimizer, moments)
        random_states = load_file(place / "random.safetensors")
        trainer = json.loads((place / "trainer.json").read_text(encoding="utf-8"))
        state = TrainerState(**trainer["state"])
        if version < 2:
            state.stage_best = state.best  # the whole run was one stage
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{place}: does not fit this run's model: {reason[:300]}") from error
    return state, random_states, trainer["scaler"]


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first, whether valid or not."""
    return sorted((place for place in folder.glob(f"{PREFIX}*") if place.is_dir()), reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one."""
    complaints = []
    for place in checkpoints_in(folder):
        try:
            read_manifest(place)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return place, complaints
    return None, complaints


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().clone().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_moments(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): index for index, parameter in enumerate(parameters)}
    names = {name: number[id(parameter)] for name, parameter in named.items()}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[names[name]]
        # A fused update runs over raw memory, so moments must lie as their parameter does (channels-last, say).
        laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        moments.setdefault(names[name], {})[moment] = laid_out
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
