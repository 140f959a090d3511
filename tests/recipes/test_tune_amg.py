"""Tuning on drawn scenes: what is chosen and left beside the checkpoint, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from samlet.cli import app
from samlet.errors import CheckpointError, DataError, SamletError
from samlet.models.amg import tuned_settings
from samlet.recipes.evaluate_everything import evaluate_everything
from samlet.recipes.tune_amg import tune_amg
from tests.tiny import IMAGE_SIZE, STUDENT, add_found_objects, write_scenes, write_teacher


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=2)
    return add_found_objects(root, checkpoint_in(tmp_path_factory.mktemp("weights")))


def checkpoint_in(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_teacher(folder / "base.pt", kind="vit_t", **STUDENT)


def run(checkpoint: Path, scenes: Path, **options: Any) -> dict[str, Any]:
    given = {"image_size": IMAGE_SIZE, "device": "cpu", "points_per_side": 3, **options}
    return tune_amg(str(checkpoint), scenes, **given)


def test_it_leaves_settings_and_heat_map_and_shows_what_changed(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_in(tmp_path / "a")
    report = run(checkpoint, scenes, metric="ar")
    assert {path.name for path in checkpoint.parent.iterdir()} == {"base.pt", "base.amg.json", "base.amg.png"}
    written = json.loads((checkpoint.parent / "base.amg.json").read_text(encoding="utf-8"))
    assert (written["metric"], written["images"], written["image_size"]) == ("ar", 2, IMAGE_SIZE)
    assert written["after"] == report["after"]
    assert report["before"]["pred_iou_thresh"] == 0.88
    assert report["before"]["stability_score_thresh"] == 0.95
    assert report["after"]["ar"] >= report["before"]["ar"]
    tuned = tuned_settings(checkpoint)
    assert tuned is not None
    assert tuned.points_per_side == 3
    assert tuned.pred_iou_thresh == report["after"]["pred_iou_thresh"]
    assert tuned.stability_score_thresh == report["after"]["stability_score_thresh"]
    assert tuned.box_nms_thresh == 0.7
    assert tuned.fast
    with Image.open(checkpoint.parent / "base.amg.png") as picture:
        assert picture.width > 1000
    shown = " ".join(capsys.readouterr().out.split())
    assert "default" in shown
    assert "tuned" in shown
    assert "measure it on others" in shown


def test_the_same_bytes_again_and_the_scores_that_evaluating_gives(scenes: Path, tmp_path: Path) -> None:
    """The plain form keeps exactly what the sweep said."""
    for name in ("a", "b"):
        report = run(checkpoint_in(tmp_path / name), scenes)
    for name in ("base.amg.json", "base.amg.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    checkpoint = str(tmp_path / "a" / "base.pt")
    measured = evaluate_everything(
        [checkpoint], scenes, image_size=IMAGE_SIZE, out=tmp_path / "out", device="cpu", fast=False
    )
    facts = measured["checkpoints"]["base"]
    assert facts["is_tuned"]
    assert facts["scores"]["f1"] == pytest.approx(report["after"]["f1"])
    assert facts["scores"]["ar"]["1000"] == pytest.approx(report["after"]["ar"])
    assert facts["scores"]["masks"] / 2 == report["after"]["masks"]


def test_what_cannot_be_used_is_named(scenes: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    with pytest.raises(SamletError, match="--metric: 'f2'"):
        run(checkpoint, scenes, metric="f2")
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        run(tmp_path / "none.pt", scenes)
    with pytest.raises(DataError, match=r"the data set comes last; write samlet tune-amg"):
        run(scenes, checkpoint)
    with pytest.raises(DataError, match="no split 'test'"):
        run(checkpoint, scenes, split="test")
    assert [path.name for path in tmp_path.iterdir()] == ["base.pt"]


def test_on_the_command_line(scenes: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    options = ["--points-per-side", "2", "--image-size", str(IMAGE_SIZE), "--max-images", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, ["tune-amg", str(checkpoint), str(scenes), "--metric", "f1", *options])
    assert done.exit_code == 0, done.output
    assert "base.amg.json" in done.output


def test_thresholds_under_which_nothing_is_right_are_not_saved(tmp_path: Path) -> None:
    drawn = write_scenes(tmp_path / "scenes", train=1, val=2)
    checkpoint = checkpoint_in(tmp_path / "a")
    with pytest.raises(DataError, match=r"comes near an object, whatever the thresholds.*nothing was saved"):
        run(checkpoint, drawn)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"base.pt"}


def test_thresholds_belong_to_an_input_size(scenes: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path / "a")
    run(checkpoint, scenes)
    with pytest.raises(SamletError, match=r"tuned at an image size of 64, and 128 is asked for: run `samlet tune-amg"):
        evaluate_everything([str(checkpoint)], scenes, image_size=128, out=tmp_path / "out", device="cpu")
