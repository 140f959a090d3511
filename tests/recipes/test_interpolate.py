"""Interpolation between two models: what is measured, chosen, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from samlet.cli import app
from samlet.engine import evaluation
from samlet.errors import CheckpointError, ConfigError, DataError, SamletError
from samlet.models import load_sam
from samlet.recipes.interpolate import choose, interpolate, read_config, value
from tests.tiny import IMAGE_SIZE, STUDENT, write_scenes, write_teacher


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=3, val=2)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    base = write_teacher(folder / "base.pt", seed=1, kind="vit_t", **STUDENT)
    return base, write_teacher(folder / "tuned.pt", seed=2, kind="vit_t", **STUDENT)


def run(ends: tuple[Path, Path], data: Path, out: Path, **options: Any) -> dict[str, Any]:
    return interpolate(*ends, data=data, out=out, **{"image_size": IMAGE_SIZE, "device": "cpu", **options})


def point(data: float, retention: float | None = None) -> dict[str, Any]:
    sets = {"data": data} if retention is None else {"data": data, "retention": retention}
    return {role: {"prompts": {kind: {"miou": miou} for kind in ("point", "box")}} for role, miou in sets.items()}


def test_it_leaves_the_student_the_scores_and_the_curve(
    ends: tuple[Path, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed"
    report = run(ends, scenes, out, points=(1, 0, 0.5), retention=scenes / "train")
    assert {path.name for path in out.iterdir()} == {
        "mobile_sam.pt",
        "student.safetensors",
        "curve.png",
        "interpolation.json",
        "points",
    }
    assert json.loads((out / "interpolation.json").read_text()) == json.loads(json.dumps(report))
    assert [one["alpha"] for one in report["points"]] == [0, 0.5, 1]
    assert report["sets"]["data"]["images"] == 2
    assert report["sets"]["retention"]["images"] == 3
    base, tuned = (load_sam(path, image_size=IMAGE_SIZE).state_dict() for path in ends)
    chosen = report["chosen"]
    written = torch.load(out / "mobile_sam.pt", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in load_sam(out).state_dict().items())
    name = "mask_decoder.mask_tokens.weight"
    assert torch.allclose(written[name], (1 - chosen) * base[name] + chosen * tuned[name], atol=1e-6)
    shown = capsys.readouterr().out
    assert "chosen" in shown
    assert "BatchNorm statistics are the same in both models" in shown


def test_a_point_scores_what_its_own_weights_score(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    report = run(ends, scenes, tmp_path, points=(0, 1))
    from samlet.data.opening import open_split

    for end, place in zip(ends, report["points"], strict=True):
        sam = load_sam(end, image_size=IMAGE_SIZE)
        means = evaluation.headline(evaluation.evaluate_sam(sam, open_split(scenes)))
        assert value(place["data"], "point_miou") == means["point_miou"]
        assert value(place["data"], "box_miou") == means["box_miou"]


def test_a_second_start_measures_only_what_is_missing(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    first = run(ends, scenes, tmp_path / "a", points=(0, 1))
    picture = (tmp_path / "a/curve.png").read_bytes()
    with patch.object(evaluation, "evaluate_sam", side_effect=AssertionError("measured again")):
        assert run(ends, scenes, tmp_path / "a", points=(0, 1)) == first
    assert (tmp_path / "a/curve.png").read_bytes() == picture
    with patch.object(evaluation, "evaluate_sam", side_effect=evaluation.evaluate_sam) as measuring:
        more = run(ends, scenes, tmp_path / "a", points=(0, 0.5, 1))
        assert measuring.call_count == 1
        assert [more["points"][0], more["points"][2]] == first["points"]
        run((ends[0], ends[0]), scenes, tmp_path / "a", points=(0, 1))  # another tuned model
        assert measuring.call_count == 3
        run(ends, scenes / "train", tmp_path / "a", points=(0, 1))  # other images
        assert measuring.call_count == 5


def test_killed_in_the_middle_it_goes_on(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    calls = [0]
    real = evaluation.evaluate_sam

    def dying(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*given, **named)

    with patch.object(evaluation, "evaluate_sam", side_effect=dying):
        with pytest.raises(KeyboardInterrupt):
            run(ends, scenes, tmp_path / "a", points=(0, 0.5, 1))
        assert not (tmp_path / "a/interpolation.json").exists()
        resumed = run(ends, scenes, tmp_path / "a", points=(0, 0.5, 1))
    assert calls[0] == 4
    assert resumed == run(ends, scenes, tmp_path / "b", points=(0, 0.5, 1))
    assert (tmp_path / "a/mobile_sam.pt").read_bytes() == (tmp_path / "b/mobile_sam.pt").read_bytes()


def test_a_damaged_kept_point_is_measured_anew(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    first = run(ends, scenes, tmp_path, points=(0, 1))
    kept = sorted((tmp_path / "points").iterdir())
    kept[0].write_text(kept[0].read_text()[:-20])
    kept[1].write_text(kept[0].read_text())
    assert run(ends, scenes, tmp_path, points=(0, 1)) == first


@pytest.mark.parametrize(
    ("measured", "drop", "alpha"),
    [
        ([point(0.5), point(0.7), point(0.6)], None, 0.5),
        ([point(0.5), point(0.7), point(0.7)], None, 0.5),  # of equals the one nearest to the base
        ([point(0.5, 0.9), point(0.6, 0.85), point(0.9, 0.2)], None, 0.5),
        ([point(0.5, 0.9), point(0.6, 0.4), point(0.9, 0.8)], None, 1.0),
        ([point(0.5, 0.9), point(0.6, 0.88), point(0.9, 0.8)], 0.03, 0.5),
        ([point(0.5, 0.9), point(0.6, 0.88), point(0.9, 0.8)], 0.2, 1.0),
        ([point(0.5, 0.9), point(0.6, 0.88), point(0.9, 0.8)], 0.0, 0.0),
    ],
)
def test_the_rules_of_the_choice(measured: list[dict[str, Any]], drop: float | None, alpha: float) -> None:
    assert choose([0.0, 0.5, 1.0], measured, "mean_miou", drop)[0] == alpha


def test_the_metric_decides() -> None:
    measured = [point(0.5), point(0.6)]
    measured[0]["data"]["prompts"]["box"]["miou"] = 0.9
    assert [choose([0.0, 1.0], measured, metric, None)[0] for metric in ("point_miou", "box_miou", "mean_miou")] == [
        1.0,
        0.0,
        0.0,
    ]


def test_a_configuration_names_the_images_that_training_validates_on(
    ends: tuple[Path, Path], scenes: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{image_size: {IMAGE_SIZE}}}\n"
        f"dataset: {{root: {scenes}, val: elsewhere, val_fraction: 0.4}}\n"
        f"validation: {{retention: {{root: {scenes}}}, max_images: 1}}\n"
        "distillation: {enable: true}\nteachers: [{name: T, checkpoint: not_here.pth}]\n"
    )
    report = run(ends, config, tmp_path / "out", points=(0, 1), image_size=None)
    assert report["image_size"] == IMAGE_SIZE
    assert report["sets"]["data"]["images"] == 1
    assert report["sets"]["retention"] == {
        "path": str(scenes),
        "images": 2,
        "objects": report["sets"]["retention"]["objects"],
    }
    config.write_text("dataset: {root: nowhere}\n")
    with pytest.raises(DataError, match=r"dataset\.root: no such file or folder: 'nowhere'"):
        run(ends, config, tmp_path / "out")
    config.write_text("dataset: {root: nowhere, rot: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:1: dataset\.rot"):
        run(ends, config, tmp_path / "out")


def test_annotations_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    file.write_text('{"images": [], "annotations": [], "dataset": "coco"}')
    assert read_config(file) is None
    file.write_text(json.dumps({"dataset": {"root": str(tmp_path)}}))
    config = read_config(file)
    assert config is not None
    assert config.dataset.root == tmp_path


def test_models_of_other_shapes_are_refused_by_the_tensors_name(
    ends: tuple[Path, Path], scenes: Path, tmp_path: Path
) -> None:
    other = write_teacher(tmp_path / "other.pt", kind="vit_t", **{**STUDENT, "embed_dims": [8, 16, 32, 32]})
    with pytest.raises(CheckpointError, match=r"image_encoder\.layers\.1\..* 32 .*in the tuned model"):
        run((ends[0], other), scenes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_refuses(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"points": (0, 1.5)}, "--points: 1.5 is not from 0"),
        ({"points": (0.5, 0.5)}, "name two or more"),
        ({"metric": "miou"}, "--metric: 'miou'"),
        ({"max_retention_drop": 0.1}, "name one with --retention"),
    ):
        with pytest.raises(SamletError, match=words):
            run(ends, scenes, tmp_path / "out", **options)
    (tmp_path / "file").touch()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(SamletError, match="is a file"):
        run(ends, scenes, tmp_path / "file")
    with pytest.raises(SamletError, match="holds a training run"):
        run(ends, scenes, tmp_path / "run")


def test_the_command_takes_points_as_a_list(ends: tuple[Path, Path], scenes: Path, tmp_path: Path) -> None:
    words = ["interpolate", *map(str, ends), "--data", str(scenes), "--image-size", str(IMAGE_SIZE), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--points", "0", "1e-1", "1", "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "a/interpolation.json").read_text())
    assert [one["alpha"] for one in report["points"]] == [0, 0.1, 1]
