"""The forgetting guard: what it measures, what it lets pass, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from samlet.config import RunConfig
from samlet.data.configs import DatasetConfig, RetentionConfig
from samlet.data.dataset import ValidationSet
from samlet.engine.checkpoint import TrainerState
from samlet.engine.configs import EverythingValidationConfig, ValidationConfig
from samlet.engine.everything import measure_everything
from samlet.engine.kept_measurements import KeptMeasurements
from samlet.engine.validation import ForgettingGuard, describe_everything, validate, validate_everything
from samlet.errors import ConfigError, DataError
from samlet.models import load_sam
from samlet.models.amg import AmgSettings
from samlet.schema import load_config
from tests.tiny import IMAGE_SIZE, STUDENT, add_found_objects, write_scenes, write_teacher


def guard(max_drop: float | None) -> ForgettingGuard:
    return ForgettingGuard(ValidationSet(()), None, "box_miou", max_drop)


def measured(box_miou: float) -> dict[str, float]:
    return {"box_miou": 0.9, "retention/point_miou": 0.1, "retention/box_miou": box_miou}


def test_the_first_measure_is_the_reference_and_stays_it() -> None:
    state = TrainerState()
    assert guard(None).drop(measured(0.5), state) == 0
    assert state.retention_reference == 0.5
    assert guard(None).drop(measured(0.4), state) == pytest.approx(0.1)
    assert guard(None).drop(measured(0.7), state) == pytest.approx(-0.2)
    assert state.retention_reference == 0.5


def test_a_checkpoint_may_lose_up_to_the_bound() -> None:
    assert [guard(0.125).allows(drop) for drop in (-1.0, 0.0, 0.125, 0.126)] == [True, True, True, False]
    assert guard(None).allows(1.0)
    assert guard(0.0).allows(0.0)


def test_it_says_where_retention_went() -> None:
    assert guard(0.1).describe(measured(0.5), 0.05) == ", retention box mIoU 0.5000 (-0.0500)"
    assert guard(None).describe(measured(0.75), -0.25) == ", retention box mIoU 0.7500 (+0.2500)"
    assert guard(None).describe(measured(0.5), 0.0) == ", retention box mIoU 0.5000 (+0.0000)"
    assert "max_retention_drop" in guard(0.01).describe(measured(0.5), 0.05)


def test_it_measures_its_own_images(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=3, val=2)
    student = load_sam(write_teacher(tmp_path / "s.pt", kind="vit_t", **STUDENT), image_size=IMAGE_SIZE)
    config = ValidationConfig(retention=RetentionConfig(root=scenes, val="train", max_images=2), max_retention_drop=0.1)
    found = ForgettingGuard.of(config)
    assert found is not None
    assert len(found.images) == 3
    metrics = found.measure(student, Accelerator(cpu=True))
    plain = validate(student, found.images, Accelerator(cpu=True), 2)
    assert metrics == {f"retention/{name}": value for name, value in plain.items()}
    assert metrics.keys() >= {"retention/point_miou", "retention/box_miou", "retention/mean_miou"}
    assert ForgettingGuard.of(ValidationConfig()) is None


def test_a_whole_folder_is_measured_where_it_has_no_val(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=3, val=2)
    assert len(RetentionConfig(root=scenes).build()) == 2
    assert len(RetentionConfig(root=scenes / "train").build()) == 3
    with pytest.raises(DataError, match="no split 'test'"):
        RetentionConfig(root=scenes, val="test").build()


def test_a_bound_needs_a_set_and_a_set_a_root(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"max_retention_drop": 0.1}))
    with pytest.raises(ConfigError, match=r"max_retention_drop: has nothing to compare with"):
        load_config(ValidationConfig, path)
    path.write_text(json.dumps({"retention": {"root": "nowhere", "split": "val"}}))
    with pytest.raises(ConfigError) as caught:
        load_config(ValidationConfig, path)
    assert "retention.root: no such file" in str(caught.value)
    assert "retention.split: unknown key" in str(caught.value)


def test_automatic_masks_are_measured_as_evaluate_does(tmp_path: Path) -> None:
    checkpoint = write_teacher(tmp_path / "s.pt", kind="vit_t", **STUDENT)
    scenes = add_found_objects(write_scenes(tmp_path / "scenes", train=1, val=3), checkpoint)
    student = load_sam(checkpoint, image_size=IMAGE_SIZE).train()
    images = DatasetConfig(root=scenes).build_val(seed=0)
    config = EverythingValidationConfig(points_per_side=3, max_images=2)
    metrics = validate_everything(student, images, Accelerator(cpu=True), config)
    assert student.training
    every = AmgSettings(points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0, fast=False)
    measured = measure_everything(
        student, images, every, indices=range(2), kept=KeptMeasurements(tmp_path / "kept", {})
    )
    assert 0 < metrics["everything_ar"] == measured.scores["ar"]["1000"]
    assert metrics["everything_ap"] == measured.scores["ap"]
    assert metrics["everything_ece"] == measured.calibration["ece"]
    whole = validate_everything(student, images, Accelerator(cpu=True), config.model_copy(update={"max_images": None}))
    assert whole != metrics
    assert describe_everything(metrics).startswith(f", everything AR {metrics['everything_ar']:.4f}, calibration error")
    assert describe_everything({"point_miou": 0.5}) == ""


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("dataset: {root: .}\nvalidation: {metric: everything_ar}\n")
    with pytest.raises(ConfigError, match=r"c.yaml:2: validation\.metric: everything_ar is not measured; add"):
        load_config(RunConfig, config)
    config.write_text("dataset: {root: .}\nvalidation: {metric: everything_ar, everything: {}}\n")
    block = load_config(RunConfig, config).validation
    assert block.everything == EverythingValidationConfig(points_per_side=16, max_images=8)
    scenes = write_scenes(tmp_path / "scenes", train=1, val=1)
    found = ForgettingGuard.of(block.model_copy(update={"retention": RetentionConfig(root=scenes)}))
    assert found is not None
    assert found.metric == "mean_miou"
