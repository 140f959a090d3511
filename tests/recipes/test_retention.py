"""The forgetting guard in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from samlet.engine.checkpoint import checkpoints_in
from samlet.engine.curves import arrange, read_lines
from samlet.engine.device import build_accelerator
from samlet.engine.run_dir import RunDir
from samlet.engine.validation import ForgettingGuard
from samlet.recipes import train as recipe
from samlet.recipes.train import train
from samlet.run import set_up
from tests.tiny import tiny_config, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def validations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "val"]


def guarded(scenes: Path, **options: Any) -> dict[str, Any]:
    return {"validation": {"overlays": 0, "every_steps": 3, "retention": {"root": str(scenes / "train")}, **options}}


def planted(data: list[float], kept: list[float]) -> Any:
    """Validations that find the given scores, the untouched student's first."""
    found = iter(data)

    def validate(*_: Any) -> dict[str, float]:
        value = next(found)
        return {"point_miou": value, "box_miou": value, "mean_miou": value}

    losing = iter(kept)
    measure = patch.object(ForgettingGuard, "measure", lambda *_: {"retention/mean_miou": next(losing)})
    return patch.object(recipe, "validate", validate), measure


def test_retention_is_measured_before_the_first_step_and_at_every_validation(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(scenes, tmp_path / "run", **guarded(scenes), logging={"tensorboard": False, "curves": True})
    assert train(config) == 0
    found = validations(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 3, 6]
    assert all(row.keys() >= {"point_miou", "retention/point_miou", "retention/mean_miou"} for row in found)
    assert found[0]["retention/mean_miou"] != found[-1]["retention/mean_miou"]
    newest = json.loads((checkpoints_in(tmp_path / "run/checkpoints")[0] / "trainer.json").read_text())
    assert newest["state"]["retention_reference"] == found[0]["retention/mean_miou"]
    moved = found[-1]["retention/mean_miou"] - found[0]["retention/mean_miou"]
    assert f"retention mean mIoU {found[-1]['retention/mean_miou']:.4f} ({moved:+.4f})" in " ".join(
        capsys.readouterr().err.split()
    )
    panels = {panel.title: panel for panel in arrange(read_lines(tmp_path / "run/metrics.jsonl"))}
    assert sorted(panels["retention mIoU"].lines) == ["box", "mean", "point"]
    assert sorted(panels["validation mIoU"].lines) == ["box", "mean", "point"]


def test_without_a_retention_set_nothing_is_measured_before_the_first_step(scenes: Path, tmp_path: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "run", training={"max_steps": 1})) == 0
    found = validations(tmp_path / "run")
    assert [row["step"] for row in found] == [1]
    assert not [name for name in found[0] if name.startswith("retention")]


@pytest.mark.parametrize(
    ("max_drop", "best_step"),
    [(None, 6), (0.1, 3), (0.01, 0), (0.5, 6)],
)
def test_a_checkpoint_that_forgot_too_much_is_not_the_best(
    scenes: Path, tmp_path: Path, max_drop: float | None, best_step: int
) -> None:
    data, measure = planted([0.1, 0.2, 0.3], [0.8, 0.75, 0.5])
    config = tiny_config(scenes, tmp_path / "run", **guarded(scenes, max_retention_drop=max_drop))
    with data, measure:
        assert train(config) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["best_step"] == best_step
    assert json.loads((tmp_path / "run/best/metrics.json").read_text())["step"] == best_step


def test_a_run_that_only_forgets_ends_with_the_untouched_student(scenes: Path, tmp_path: Path) -> None:
    data, measure = planted([0.1, 0.2, 0.3], [0.8, 0.1, 0.1])
    config = tiny_config(scenes, tmp_path / "run", **guarded(scenes, max_retention_drop=0.02))
    with data, measure:
        assert train(config) == 0
    torch.manual_seed(config.seed)
    untouched = config.model.build().state_dict()
    written = load_file(tmp_path / "run/student.safetensors")
    assert all(torch.equal(written[name], value) for name, value in untouched.items())


def test_forgetting_counts_for_early_stopping(scenes: Path, tmp_path: Path) -> None:
    data, measure = planted([0.1, 0.2, 0.3, 0.4], [0.8, 0.1, 0.1, 0.1])
    options = guarded(scenes, max_retention_drop=0.02, early_stopping_patience=2, every_steps=1)
    with data, measure:
        assert train(tiny_config(scenes, tmp_path / "run", **options)) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["steps"] == 2


def test_a_resumed_run_judges_by_the_same_reference(scenes: Path, tmp_path: Path) -> None:
    options = guarded(scenes, max_retention_drop=0.02)
    assert train(tiny_config(scenes, tmp_path / "whole", **options)) == 0
    real, steps = recipe.optimizer_step, [0]

    def dying(*given: Any) -> Any:
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt
        return real(*given)

    with patch.object(recipe, "optimizer_step", dying), pytest.raises(KeyboardInterrupt):
        train(tiny_config(scenes, tmp_path / "cut", **options))
    assert train(tiny_config(scenes, tmp_path / "cut", **options)) == 0
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["step"] for row in validations(tmp_path / "cut")] == [0, 3, 6]


def test_a_named_checkpoint_of_another_run_measures_its_own_reference(scenes: Path, tmp_path: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "first", **guarded(scenes), training={"max_steps": 3})) == 0
    begun = checkpoints_in(tmp_path / "first/checkpoints")[0]
    assert json.loads((begun / "trainer.json").read_text())["state"]["retention_reference"] is not None
    config = tiny_config(scenes, tmp_path / "second", **guarded(scenes), resume=str(begun))
    run = set_up(config, build_accelerator(config.training), RunDir(tmp_path / "second"))
    assert run.state.step == 3
    assert run.state.retention_reference is None
