"""Whole runs in stages, with an average student and LoRA: what each stage does, and that a resume changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from samlet.artefacts import sha256_of
from samlet.config import RunConfig
from samlet.engine import checkpoint
from samlet.engine.schedule import learning_rate
from samlet.errors import SamletError
from samlet.models import load_sam
from samlet.recipes import train as recipe
from samlet.recipes.train import train
from samlet.run import Run
from tests.recipes.test_resume import storm
from tests.tiny import tiny_config, write_scenes, write_teacher

STEPS_AN_EPOCH = 3
NECK, DECODER = "image_encoder.neck.0.weight", "mask_decoder.iou_token.weight"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def weights_at(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step:08d}" / "student.safetensors")


def in_stages(teacher: Path, *stages: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    distilling = {"distillation": {"enable": True}, "teachers": [{"name": "T", "checkpoint": str(teacher)}]}
    return {**distilling, "checkpoint": {"every_steps": 1, "keep_last": 99}, "stages": list(stages), **blocks}


NECK_FIRST: dict[str, Any] = {
    "name": "neck",
    "training": {"epochs": 1, "freeze": ["prompt_encoder", "mask_decoder"], "weight_decay": 0.2},
    "loss": {"focal": 0.0, "dice": 0.0, "iou": 0.0},
    "distillation": {"dense_mask_logits": {"enable": False}},
    "prompts": {"box_jitter": 0.4},
}
MASKS: dict[str, Any] = {
    "name": "masks",
    "training": {"max_steps": 4, "learning_rate": 5e-4, "freeze": ["image_encoder"]},
    "distillation": {"encoder_patch": {"enable": False}, "lambda_coef": 0.5, "lambda_warmup_steps": 2},
}
BOTH: dict[str, Any] = {"name": "both", "training": {"epochs": 1}}


def test_each_stage_trains_what_it_says_and_nothing_of_it_stays(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    config = tiny_config(scenes, tmp_path / "run", **in_stages(teacher, NECK_FIRST, MASKS, BOTH))
    seen: list[tuple[str, float, float]] = []

    def spy(run: Run, window: Any) -> Any:
        row = original(run, window)
        seen.append(
            (run.stage.name, run.optimizer.param_groups[0]["weight_decay"], run.stage.train_set.prompts.box_jitter)
        )
        return row

    original = recipe.optimizer_step
    with patch.object(recipe, "optimizer_step", spy):
        assert train(config) == 0
    assert seen == [("neck", 0.2, 0.4)] * 3 + [("masks", 0.01, 0.1)] * 4 + [("both", 0.01, 0.1)] * 3
    logged = rows(tmp_path / "run")
    assert [row["stage"] for row in logged] == ["neck"] * 3 + ["masks"] * 4 + ["both"] * 3
    rates = [
        learning_rate(step, total_steps=n, peak=peak, floor=1e-6, warmup_steps=100)
        for n, peak in ((3, 1e-3), (4, 5e-4), (3, 1e-3))
        for step in range(n)
    ]
    assert [row["lr"] for row in logged] == rates
    assert [row["lambda"] for row in logged] == [1] * 3 + [0, 0.25, 0.5, 0.5] + [1] * 3
    terms = [{name for name in row if name.startswith("distill/") and "weighted" not in name} for row in logged]
    dense, patch_term = {"distill/dense_mask_logits"}, {"distill/encoder_patch"}
    assert terms == [patch_term] * 3 + [dense] * 4 + [dense | patch_term] * 3
    assert [row["step"] for row in rows(tmp_path / "run", "val")] == [3, 6, 7, 10]

    at = {step: weights_at(tmp_path / "run", step) for step in (1, 3, 7, 10)}
    moved = {
        (first, last): [not torch.equal(at[first][name], at[last][name]) for name in (NECK, DECODER)]
        for first, last in ((1, 3), (3, 7), (7, 10))
    }
    assert moved == {(1, 3): [True, False], (3, 7): [False, True], (7, 10): [True, True]}


def test_early_stopping_ends_its_stage_and_the_run_goes_on(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    still = {"epochs": 6, "learning_rate": 1e-30, "min_learning_rate": 0.0}
    first = {"name": "first", "training": still, "validation": {"early_stopping_patience": 1}}
    second = {**first, "name": "second", "validation": {"early_stopping_patience": 2}}
    third = {"name": "third", "training": {"max_steps": 2}}
    config = tiny_config(scenes, tmp_path / "run", **in_stages(teacher, first, second, third))
    assert train(config) == 0
    names = [row["stage"] for row in rows(tmp_path / "run", "val")]
    assert names == ["first"] * 2 + ["second"] * 3 + ["third"]
    assert [row["stage"] for row in rows(tmp_path / "run")] == ["first"] * 6 + ["second"] * 9 + ["third"] * 2


@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_a_stop_in_any_stage_changes_nothing(scenes: Path, tmp_path: Path, teacher: Path, stopped_at: int) -> None:
    blocks = in_stages(teacher, NECK_FIRST, MASKS)
    calm, stopped = (tiny_config(scenes, tmp_path / name, **blocks) for name in ("calm", "stopped"))
    assert train(calm) == 0

    def stop(run: Run, window: Any) -> Any:
        if run.state.step == stopped_at:
            raise SamletError("stopped")
        return original(run, window)

    original = recipe.optimizer_step
    with patch.object(recipe, "optimizer_step", stop), pytest.raises(SamletError, match="stopped"):
        train(stopped)
    assert train(stopped) == 0
    assert sha256_of(calm.output_dir / "student.safetensors") == sha256_of(stopped.output_dir / "student.safetensors")
    assert (calm.output_dir / "metrics.jsonl").read_bytes() == (stopped.output_dir / "metrics.jsonl").read_bytes()


def test_kills_change_nothing_with_stages_average_lora_and_a_falling_lambda(
    scenes: Path, tmp_path: Path, teacher: Path
) -> None:
    rule = {"enable_plateau_scheduler": True, "patience": 1, "threshold": 0.9}
    blocks = in_stages(
        teacher,
        {**NECK_FIRST, "training": {"epochs": 3}},
        {**MASKS, "training": {"epochs": 3}, "validation": {"early_stopping_patience": 2}},
        training={"ema_decay": 0.9, "epochs": 1},
        model={"lora": {"rank": 2}},
        checkpoint={"every_steps": 2},
        distillation={"enable": True, "dynamic_lambda": rule},
    )
    result = storm(scenes, tmp_path / "storm", 6, **blocks)["none"]
    assert result["hits"] >= 6
    assert (result["files"], result["differing"]) == (8, [])
    falling = [row["lambda"] for row in rows(tmp_path / "storm/peaceful")]
    assert falling[0] == 1.0
    assert 0.25 in falling


def test_a_term_that_teaches_nothing_in_a_later_stage_stops_before_the_first_step(
    scenes: Path, tmp_path: Path, teacher: Path
) -> None:
    frozen = {"name": "late", "training": {"freeze": ["image_encoder"]}}
    config = tiny_config(scenes, tmp_path / "run", **in_stages(teacher, BOTH, frozen))
    with pytest.raises(SamletError, match=r"distill/encoder_patch: has a weight in stage late, but .* no trainable"):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_changed_stage_is_another_configuration(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "run", **in_stages(teacher, BOTH))) == 0
    other = {**BOTH, "training": {"epochs": 2}}
    with pytest.raises(SamletError, match=r"stages\.0\.training\.epochs was 1, is 2"):
        train(tiny_config(scenes, tmp_path / "run", **in_stages(teacher, other)))


def test_the_average_is_what_is_validated_and_kept(scenes: Path, tmp_path: Path) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    saves = {"checkpoint": {"every_steps": 1, "keep_last": 99}}
    assert train(tiny_config(scenes, plain, **saves)) == 0
    assert train(tiny_config(scenes, averaged, **saves, training={"ema_decay": 0.5})) == 0
    best = json.loads((averaged / "best/metrics.json").read_text())["step"]
    expected: dict[str, torch.Tensor] = tiny_weights(tiny_config(scenes, plain))
    for step in range(best):
        decay = min(0.5, (1 + step) / (10 + step))
        trained = weights_at(plain, step + 1)  # the average changes nothing about training
        expected = {name: decay * value + (1 - decay) * trained[name] for name, value in expected.items()}
    kept = load_file(averaged / "student.safetensors")
    assert weights_at(averaged, best)[NECK].equal(weights_at(plain, best)[NECK])
    assert not kept[NECK].equal(weights_at(averaged, best)[NECK])
    for name, value in expected.items():
        torch.testing.assert_close(kept[name].double(), value.double(), rtol=1e-5, atol=1e-6)


def tiny_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.seed)
    return {name: value.clone() for name, value in config.model.build().state_dict().items()}


def test_lora_trains_its_factors_and_leaves_an_ordinary_student(scenes: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "targets": ["image_encoder.*.attn.qkv"]}}
    config = tiny_config(scenes, tmp_path / "run", model=lora)
    start = tiny_weights(tiny_config(scenes, tmp_path / "run"))
    assert train(config) == 0
    newest = checkpoint.checkpoints_in(tmp_path / "run/checkpoints")[0]
    left = load_file(newest / "student.safetensors")
    assert set(left) == set(start)
    changed = {name for name in start if name.startswith("image_encoder.") and not torch.equal(left[name], start[name])}
    assert changed
    assert all(name.endswith(".attn.qkv.weight") for name in changed)
    for name in changed:
        assert torch.linalg.matrix_rank((left[name] - start[name]).double(), rtol=1e-4) <= 2
    assert not torch.equal(left[DECODER], start[DECODER])
    load_sam(newest)
    upstream = torch.load(tmp_path / "run/mobile_sam.pt", weights_only=True)
    assert set(upstream) == set(start)


def test_a_checkpoint_of_another_make_is_refused_by_name(scenes: Path, tmp_path: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "run", training={"epochs": 1})) == 0
    place = checkpoint.checkpoints_in(tmp_path / "run/checkpoints")[0]
    averaged = tiny_config(scenes, tmp_path / "other", resume=str(place), training={"ema_decay": 0.9})
    with pytest.raises(SamletError, match=r"step-00000003: has no ema\.safetensors: its run had another configuration"):
        train(averaged)


def test_a_named_checkpoint_of_more_stages_is_refused(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "run", **in_stages(teacher, BOTH, MASKS))) == 0
    place = checkpoint.checkpoints_in(tmp_path / "run/checkpoints")[0]
    other = in_stages(teacher, {**BOTH, "training": {"epochs": 9}}, resume=str(place))
    with pytest.raises(SamletError, match=r"stopped in stage 2 of another run, and this configuration has 1"):
        train(tiny_config(scenes, tmp_path / "other", **other))
