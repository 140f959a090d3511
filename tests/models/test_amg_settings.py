"""Settings of the automatic generator: what is refused, and what lies beside a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from samlet.errors import CheckpointError, SamletError
from samlet.models import AmgSettings, save_sam_safetensors, save_sam_upstream
from samlet.models.amg import amg_path, save_tuned, tuned_settings
from samlet.models.checkpoints import digest_of_weights
from tests.models.sizes import small_sam

TUNED = AmgSettings(pred_iou_thresh=0.4, points_per_side=12, fast=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with its best student under all its names, and a checkpoint of other weights."""
    sam = small_sam()
    for folder in ("", "best"):
        save_sam_safetensors(sam, tmp_path / folder / "student.safetensors")
        save_sam_upstream(sam, tmp_path / folder / "mobile_sam.pt")
    save_sam_safetensors(small_sam(seed=1), tmp_path / "checkpoints/step-1/student.safetensors")
    return tmp_path


def test_defaults_are_sams() -> None:
    assert AmgSettings().as_dict() == {
        "points_per_side": 32,
        "points_per_batch": 64,
        "pred_iou_thresh": 0.88,
        "stability_score_thresh": 0.95,
        "stability_score_offset": 1.0,
        "box_nms_thresh": 0.7,
        "crop_n_layers": 0,
        "crop_nms_thresh": 0.7,
        "crop_overlap_ratio": 512 / 1500,
        "crop_n_points_downscale_factor": 1,
        "min_mask_region_area": 0,
        "fast": True,
    }


def test_settings_survive_json() -> None:
    assert AmgSettings.from_dict(json.loads(json.dumps(TUNED.as_dict()))) == TUNED
    assert AmgSettings.from_dict({}) == AmgSettings()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"pred_iou_tresh": 0.5, "x": 1}, "pred_iou_tresh, x: no such setting .* it has points_per_side"),
        ({"points_per_side": 1.5}, "points_per_side: must be a whole number, not 1.5"),
        ({"points_per_side": True}, "points_per_side: must be a whole number"),
        ({"points_per_side": 0}, "points_per_side: must be at least 1"),
        ({"pred_iou_thresh": "0.5"}, "pred_iou_thresh: must be a number"),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh: must be a number, not nan"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh: must be at least 0 and at most 1"),
        ({"fast": 1}, "fast: must be true or false"),
    ],
)
def test_what_is_no_setting_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(SamletError, match=told):
        AmgSettings.from_dict(values)


def test_whole_numbers_are_numbers() -> None:
    assert AmgSettings(pred_iou_thresh=0).min_iou is None
    assert AmgSettings(pred_iou_thresh=1).min_iou == 1


def test_a_run_is_tuned_under_all_its_names(run: Path) -> None:
    assert tuned_settings(run) is None
    path = save_tuned(run, TUNED, images=3)
    assert path == run / "amg.json" == amg_path(run)
    assert json.loads(path.read_text())["images"] == 3
    for name in ("", "student.safetensors", "mobile_sam.pt", "best", "best/student.safetensors", "best/mobile_sam.pt"):
        assert tuned_settings(run / name) == TUNED, name
    assert tuned_settings(run / "checkpoints/step-1") is None
    assert tuned_settings(run / "checkpoints/step-1/student.safetensors") is None


@pytest.mark.parametrize("given", ["best", "best/student.safetensors"])
def test_what_was_tuned_in_a_corner_is_found_there(run: Path, given: str) -> None:
    path = save_tuned(run / given, TUNED)
    assert path == run / ("best/amg.json" if given == "best" else "best/student.amg.json")
    assert tuned_settings(run / given) == TUNED


def test_the_nearest_settings_count(run: Path) -> None:
    save_tuned(run, TUNED)
    save_tuned(run / "mobile_sam.pt", AmgSettings(points_per_side=3))
    assert tuned_settings(run / "mobile_sam.pt") == AmgSettings(points_per_side=3)
    assert tuned_settings(run) == TUNED


def test_settings_of_other_weights_are_refused(run: Path) -> None:
    save_tuned(run, TUNED)
    for name in ("student.safetensors", "mobile_sam.pt"):
        (run / name).unlink()
    shutil.rmtree(run / "best")
    save_sam_safetensors(small_sam(seed=1), run / "student.safetensors")
    with pytest.raises(SamletError, match=r"amg\.json: was tuned for other weights .* `samlet tune-amg .*` again"):
        tuned_settings(run)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "damaged"),
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"settings": {}}', "damaged"),
        ('{"settings": 3, "weights_sha256": ""}', "damaged"),
        ('{"settings": {"points": 3}, "weights_sha256": ""}', "points: no such setting"),
        ('{"settings": {"fast": "yes"}, "weights_sha256": ""}', "fast: must be true or false"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_damaged_file_is_named(run: Path, content: str | bytes, told: str) -> None:
    amg_path(run).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SamletError, match=rf"amg\.json: .*{told}.* again, or remove the file"):
        tuned_settings(run)


def test_one_model_has_one_digest_in_all_its_files(run: Path) -> None:
    names = ("", "student.safetensors", "mobile_sam.pt", "best")
    assert len({digest_of_weights(run / name) for name in names}) == 1
    assert digest_of_weights(run) != digest_of_weights(run / "checkpoints/step-1")
    with pytest.raises(CheckpointError, match="no such file"):
        digest_of_weights(run / "nothing.pt")
