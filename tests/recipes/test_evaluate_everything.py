"""Everything mode on drawn scenes: what is written, with which settings, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from samlet.cli import app
from samlet.data.opening import open_split
from samlet.engine.automatic_evaluation import overlaps, summarize_masks
from samlet.engine.everything import choose_settings
from samlet.errors import DataError, SamletError
from samlet.models import load_sam
from samlet.models.amg import AmgSettings, AutomaticMaskGenerator, save_tuned
from samlet.recipes.evaluate_everything import DRAWN, drawn_images, evaluate_everything, markdown
from tests.tiny import IMAGE_SIZE, STUDENT, write_scenes, write_teacher

LOOSE: dict[str, Any] = {"points_per_side": 3, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("base.pt", "student.pt")):
        write_teacher(folder / name, seed=seed, kind="vit_t", **STUDENT)
    return folder


@pytest.fixture(scope="module")
def report(weights: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("report") / "out"
    given = [str(weights / "base.pt"), f"my | own={weights / 'student.pt'}"]
    made = evaluate_everything(given, scenes, image_size=IMAGE_SIZE, out=out, device="cpu", fast=False, **LOOSE)
    return {**made, "out": out}


def test_what_is_written(report: dict[str, Any]) -> None:
    out = report["out"]
    assert {path.name for path in out.iterdir()} == {
        "everything.json",
        "everything.md",
        "everything.png",
        "reliability.png",
    }
    written = json.loads((out / "everything.json").read_text(encoding="utf-8"))
    assert written == {name: report[name] for name in ("data", "split", "checkpoints")}
    assert list(written["checkpoints"]) == ["base", "my | own"]
    facts = written["checkpoints"]["base"]
    assert (facts["scores"]["images"], facts["image_size"]) == (3, IMAGE_SIZE)
    assert facts["seconds_per_image"] > 0
    assert facts["settings"]["points_per_side"] == 3
    assert 0 <= facts["calibration"]["ece"] <= 1
    table = (out / "everything.md").read_text(encoding="utf-8")
    assert table == markdown(report)
    for words in (
        "AR@10 | AR@100 | AR@1000",
        "boundary AP",
        "FP /image",
        "ECE on objects",
        "| my \\| own |",
        "s /image",
    ):
        assert words in table
    with Image.open(out / "everything.png") as sheet:
        assert sheet.width > 4 * 300  # image, ground truth and two models
        assert sheet.height > 3 * 300


def test_the_scores_are_the_generator_s(report: dict[str, Any], weights: Path, scenes: Path) -> None:
    settings = AmgSettings(**LOOSE, fast=False)
    generator = AutomaticMaskGenerator.of(load_sam(weights / "base.pt", image_size=IMAGE_SIZE), settings)
    scored = []
    for item in open_split(scenes):
        masks = generator.find(item.image)
        scored.append(overlaps(masks.rles, masks.predicted_iou, item.masks))
    assert report["checkpoints"]["base"]["scores"] == json.loads(json.dumps(summarize_masks(scored)))
    assert report["checkpoints"]["base"]["scores"]["masks"] > 0


def test_a_model_that_finds_nothing_scores_nothing(
    weights: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluate_everything(
        [str(weights / "base.pt")],
        scenes,
        image_size=IMAGE_SIZE,
        out=tmp_path,
        device="cpu",
        max_images=1,
        points_per_side=2,
        pred_iou_thresh=99.0,
    )
    scores = made["checkpoints"]["base"]["scores"]
    assert (scores["images"], scores["masks"], scores["ap"], scores["ar"]["1000"], scores["f1"]) == (1, 0, 0, 0, 0)
    assert scores["matched_iou"] is None
    shown = capsys.readouterr().out
    assert "wrote" in shown
    assert "ECE" in shown
    assert f"no mask passes its thresholds; `samlet tune-amg {weights / 'base.pt'} {scenes}`" in shown


def test_tuned_settings_are_used_and_options_win(weights: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(weights / "base.pt", tmp_path / "base.pt"))
    assert choose_settings(checkpoint) == (AmgSettings(), False)
    save_tuned(checkpoint, AmgSettings(pred_iou_thresh=0.3, stability_score_thresh=0.5))
    tuned = choose_settings(checkpoint, points_per_side=None, pred_iou_thresh=0.4)
    assert tuned.is_tuned
    assert (tuned.settings.pred_iou_thresh, tuned.settings.stability_score_thresh) == (0.4, 0.5)
    shutil.copy(weights / "student.pt", checkpoint)
    with pytest.raises(SamletError, match="tune-amg"):
        choose_settings(checkpoint)


def test_the_images_on_the_sheet_are_spread_evenly() -> None:
    assert drawn_images(1) == [0]
    assert drawn_images(3) == [0, 1, 2]
    assert drawn_images(10) == [0, 3, 6, 9]
    assert len(drawn_images(1000)) == DRAWN


def test_a_model_in_the_place_of_the_data_and_a_file_for_a_folder(weights: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data set comes last"):
        evaluate_everything([str(scenes)], weights / "base.pt", device="cpu")
    (tmp_path / "out").touch()
    with pytest.raises(SamletError, match=r"is a file; --out names the folder for everything\.json"):
        evaluate_everything([str(weights / "base.pt")], scenes, out=tmp_path / "out", device="cpu")


def test_on_the_command_line(weights: Path, scenes: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(weights / "base.pt"), str(scenes), "--out", str(tmp_path / "out"), "--device", "cpu"]
    alone = CliRunner().invoke(app, [*words, "--points-per-side", "2"])
    assert isinstance(alone.exception, SamletError)
    assert "add --everything" in str(alone.exception)
    sized = ["--image-size", str(IMAGE_SIZE), "--max-images", "1"]
    options = [
        "--everything",
        "--points-per-side",
        "2",
        "--pred-iou-thresh",
        "-1",
        "--stability-thresh",
        "0",
        "--plain",
    ]
    done = CliRunner().invoke(app, [*words, *sized, *options])
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "out" / "everything.json").read_text(encoding="utf-8"))
    settings = made["checkpoints"]["base"]["settings"]
    assert [settings[name] for name in ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "fast")] == [
        2,
        -1,
        0,
        False,
    ]
    for value in ("nan", "1.5"):
        refused = CliRunner().invoke(app, [*words, *sized, "--everything", "--pred-iou-thresh", value])
        assert refused.exit_code == 2
        assert "--pred-iou-thresh" in refused.output
