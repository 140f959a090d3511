"""Checkpoints of other versions: an older one goes on to the same end, a newer one is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from samlet.artefacts import MANIFEST, read_manifest, write_directory
from samlet.distill.projections import Projections
from samlet.engine.checkpoint import TrainerState, save_checkpoint
from samlet.engine.parts import build_optimizer, named_parameters
from samlet.engine.resume import resume
from samlet.engine.run_dir import RunDir
from samlet.errors import CheckpointError
from samlet.models import Sam, build_sam
from tests.tiny import IMAGE_SIZE, STUDENT

FIELDS_OF_1 = (  # what trainer.json held before there were stages
    *("step", "best", "best_step", "validations_without_best"),
    *("skipped_steps", "skipped_images", "metrics_bytes", "finished"),
)


def student_and_optimizer(seed: int) -> tuple[Sam, torch.optim.AdamW]:
    """A student whose optimizer has taken a step."""
    torch.manual_seed(seed)
    student = build_sam("vit_t", IMAGE_SIZE, **STUDENT)
    optimizer = build_optimizer(named_parameters(student), learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return student, optimizer


def rewrite(place: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **facts: Any) -> None:
    """The same checkpoint with another trainer.json and other facts in its manifest."""
    older = {key: value for key, value in read_manifest(place).items() if key != "files"} | facts

    def fill(folder: Path) -> None:
        for file in place.iterdir():
            if file.name != MANIFEST:
                shutil.copy(file, folder)
        trainer = json.loads((place / "trainer.json").read_text())
        (folder / "trainer.json").write_text(json.dumps(change(trainer)))

    write_directory(place, fill, **older)


def as_format_1(trainer: dict[str, Any]) -> dict[str, Any]:
    return {**trainer, "state": {name: trainer["state"][name] for name in FIELDS_OF_1}}


def save(out: Path) -> tuple[Path, Sam, torch.optim.AdamW]:
    """A run that stopped at step 12."""
    student, optimizer = student_and_optimizer(0)
    state = TrainerState(step=12, best=0.5, best_step=8, stage_best=0.5, validations_without_best=2, metrics_bytes=9)
    (out / "metrics.jsonl").write_text("12345678\nrows of steps that are done again\n")
    about: dict[str, Any] = {"student": student, "optimizer": optimizer}
    place = save_checkpoint(out / "checkpoints", state, random_states={"cpu.0": torch.get_rng_state()}, **about)
    return place, student, optimizer


def resume_in(out: Path, student: Sam, optimizer: torch.optim.AdamW) -> TrainerState:
    about: dict[str, Any] = {"student": student, "optimizer": optimizer}
    return resume("auto", Accelerator(cpu=True), RunDir(out), average=None, projections=Projections(), **about)


def test_a_checkpoint_of_format_1_goes_on_where_it_stopped(tmp_path: Path) -> None:
    place, student, optimizer = save(tmp_path)
    rewrite(place, as_format_1, format=1, samlet="0.1.0")
    assert set(json.loads((place / "trainer.json").read_text())["state"]) == set(FIELDS_OF_1)
    random = torch.get_rng_state()
    other, its_optimizer = student_and_optimizer(1)
    state = resume_in(tmp_path, other, its_optimizer)
    assert state == TrainerState(
        step=12, best=0.5, best_step=8, stage_best=0.5, validations_without_best=2, metrics_bytes=9
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert (tmp_path / "metrics.jsonl").read_text() == "12345678\n"
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in other.state_dict().items())
    for mine, its in zip(student.parameters(), other.parameters(), strict=True):
        for moment, value in optimizer.state[mine].items():
            assert torch.equal(its_optimizer.state[its][moment], value)


@pytest.mark.parametrize("version", [3, "4", None])
def test_a_format_to_come_is_refused_in_one_sentence(tmp_path: Path, version: Any) -> None:
    place, *_ = save(tmp_path)
    rewrite(place, lambda trainer: {**trainer, "state": {"epoch_of_tomorrow": 3}}, format=version, samlet="9.0")
    with pytest.raises(CheckpointError) as caught:
        resume_in(tmp_path, *student_and_optimizer(1))
    assert str(caught.value) == (
        f"{place}: is of format {version}, written by samlet 9.0, and this one reads up to 2; upgrade samlet to read it"
    )
