"""Promises about whole runs that only a whole run can break."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from samlet.artefacts import read_manifest
from samlet.distill.configs import TERMS
from samlet.engine import checkpoint
from samlet.engine.step import TrainStep
from samlet.errors import SamletError
from samlet.recipes.extract import extract
from samlet.recipes.train import train
from samlet.schema import StrictModel
from tests.tiny import tiny_config, write_scenes, write_teacher


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("megabytes", [6, 30, 50])
def test_a_checkpoint_that_outgrows_the_disk_is_one_sentence(tmp_path: Path, megabytes: int) -> None:
    """On a small file system, where the machine lets us mount one: it fills up in the student, or in the optimizer."""
    config = tiny_config(tmp_path, tmp_path)
    student = config.model.build()
    optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        state = checkpoint.TrainerState(step=1)
        with pytest.raises(SamletError, match=r"could not be written .*No space left on device"):
            checkpoint.save_checkpoint(mount, state, student=student, optimizer=optimizer, random_states={})
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_files_get_the_permissions_that_the_user_wants(scenes: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert train(tiny_config(scenes, tmp_path / "run", training={"max_steps": 1})) == 0
    finally:
        os.umask(before)
    places = [tmp_path / "run", *(path for path in (tmp_path / "run").rglob("*") if path.name != ".lock")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in places}
    assert len(modes) > 10
    assert {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def test_a_signal_between_two_micro_batches_waits_for_the_step(scenes: Path, tmp_path: Path) -> None:
    training = {"max_steps": 4, "batch_size": 1, "accumulation": 2}
    calm = tiny_config(scenes, tmp_path / "calm", training=training)
    assert train(calm) == 0
    real, calls = TrainStep.forward, iter(range(100))

    def interrupted(self: TrainStep, *inputs: Any) -> Any:
        if self.student.training and next(calls) == 2:  # the first half of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *inputs)

    stopped = tiny_config(scenes, tmp_path / "stopped", training=training)
    with patch.object(TrainStep, "forward", interrupted):
        assert train(stopped) == 143
    place, _ = checkpoint.newest_valid(tmp_path / "stopped" / "checkpoints")
    assert place is not None
    assert read_manifest(place)["step"] == 2
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["outcome"] == "stopped by signal 15 at step 2"
    assert train(stopped) == 0
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["outcome"] == "finished"
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_run_json_tells_configurations_and_data_apart(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=2, val=1)

    def facts(name: str, **blocks: Any) -> dict[str, Any]:
        training = {"max_steps": 1, **blocks.pop("training", {})}
        assert train(tiny_config(scenes, tmp_path / name, training=training, **blocks)) == 0
        found: dict[str, Any] = json.loads((tmp_path / name / "run.json").read_text())
        return found

    first = facts("first")
    same = facts("same", training={"num_workers": 1}, checkpoint={"keep_last": 5})
    other = facts("other", training={"learning_rate": 1e-4})
    image = sorted((scenes / "train" / "image").iterdir())[0]
    Image.open(image).rotate(90).save(image)
    moved = facts("moved")
    digests = ("config_sha256", "data_sha256", "final_weights_sha256")
    assert [same[name] == first[name] for name in digests] == [True, True, True]
    assert [other[name] == first[name] for name in digests] == [False, True, False]
    assert [moved[name] == first[name] for name in digests] == [True, False, False]


def test_training_says_what_stands_in_for_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=2, val=1)
    (scenes / "val").rename(scenes / "validation")
    for _ in range(2):  # also where it goes on
        assert train(tiny_config(scenes, tmp_path / "run", training={"max_steps": 1})) == 0
        said = capsys.readouterr().out.splitlines()
        assert said.count(f"{scenes / 'validation'}: is taken as dataset.val ('val')") == 1


def fields_of(block: Any) -> set[str]:
    """Class and name of every field of a configuration."""
    if isinstance(block, tuple):
        return set[str]().union(*map(fields_of, block))
    if not isinstance(block, StrictModel):
        return set()
    own = {f"{type(block).__name__}.{name}" for name in type(block).model_fields}
    return own.union(*(fields_of(value) for _, value in block))


UNREAD = {
    "RunConfig.schema_": "for editors",
    "DatasetConfig.grid_points": "in mode everything",
    "TrainingConfig.max_steps": "stands in for epochs",
    "TrainingConfig.non_finite": "where something is not finite",
    "TrainingConfig.max_skipped_steps": "where something is not finite",
    "ValidationConfig.max_retention_drop": "where there is a retention set",
    "DistillationConfig.precomputed_root": "where features are precomputed",
    "ExtractionConfig.batch_size": "on a GPU",
    "AttentionMatchingConfig.resample": "where the encoder's maps are compared",
}
# Every field is an argument of what is built.
AS_A_WHOLE = ("AugmentationConfig.", "EverythingConfig.", "EncoderConfig.")


def test_every_key_is_read(scenes: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.pth")
    config = tiny_config(
        scenes / "train",  # one split, of which some is held out
        tmp_path / "run",
        distillation={
            "enable": True,
            **{term: {"enable": True} for term in TERMS},
            "dynamic_lambda": {"enable_plateau_scheduler": True, "patience": 1, "threshold": 0.9},
        },
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
        mask_teacher={"enable": True, "points_per_side": 2},
        training={"epochs": 2},
        validation={"overlays": 1},
        logging={"tensorboard": True, "curves": True},
    )
    read = set[str]()

    def noting(self: StrictModel, name: str) -> Any:
        read.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    stored = {**config.distillation.model_dump(mode="json"), "precomputed_root": str(tmp_path / "stores")}
    still = config.augmentation.model_copy(update={"enable": False})
    extraction = tiny_config(
        scenes / "train",
        tmp_path / "run",
        distillation=stored,
        augmentation=still.model_dump(mode="json"),
        prompts={"fixed": True},
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
        extraction={"decoder_outputs": True},
    )
    attention = extraction.distillation.attention_matching.model_copy(update={"enable": False})
    distillation = extraction.distillation.model_copy(update={"attention_matching": attention})
    with patch.object(StrictModel, "__getattribute__", noting):
        assert train(config) == 0
        assert extract(extraction.model_copy(update={"distillation": distillation})) == 0
    unread = {field for field in fields_of(config) - read if not field.startswith(AS_A_WHOLE)}
    assert unread - UNREAD.keys() == set()
