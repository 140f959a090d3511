"""A whole run with all of the later objectives: projections are fitted, learn, and come back with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from samlet.distill.projections import key_of
from samlet.recipes.train import train
from tests.distill.scenes import objectives_of
from tests.tiny import tiny_config, write_scenes, write_teacher

TERMS: dict[str, dict[str, Any]] = {
    "encoder_patch": {"student_tap": "blocks.1", "teacher_tap": "blocks.0", "projection": "pca"},
    "encoder_matching": {"layers": 2},
    "decoder_matching": {},
    "attention_matching": {"encoder": 1, "resample": True},
    "rkd": {"patches": 8},
}


def run(scenes: Path, teacher: Path, out: Path, **blocks: Any) -> dict[str, torch.Tensor]:
    """Six steps; everything of the last checkpoint that trains."""
    off = {name: {"enable": False} for name in ("dense_mask_logits",)}
    config = tiny_config(
        scenes,
        out,
        distillation={"enable": True, **off, **TERMS},
        teachers=[{"name": "T.1", "checkpoint": str(teacher)}],
        checkpoint={"every_steps": 2, "keep_last": 5},
        **blocks,
    )
    assert train(config) == 0
    last = out / "checkpoints" / "step-00000006"
    return {
        f"{name}/{key}": value
        for name in ("student", "projections", "optimizer")
        for key, value in safetensors.torch.load_file(last / f"{name}.safetensors").items()
    }


def test_projections_train_beside_the_student_and_a_resume_ends_at_the_same_bits(tmp_path: Path) -> None:
    scenes, teacher = write_scenes(tmp_path / "scenes"), write_teacher(tmp_path / "teacher.pth")
    whole = run(scenes, teacher, tmp_path / "whole")
    place = tmp_path / "whole" / "checkpoints" / "step-00000002"
    resumed = run(scenes, teacher, tmp_path / "resumed", resume=str(place))
    assert list(whole) == list(resumed)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    (objective,) = objectives_of(encoder_patch=TERMS["encoder_patch"])
    key = f"projections/{key_of('encoder_patch', 'T.1', objective.layers[0])}"
    early = safetensors.torch.load_file(place / "projections.safetensors")
    for name, moves in (("learnt.weight", True), ("principal.components", False), ("principal.scale", False)):
        before = early[f"{key}.{name}".removeprefix("projections/")]
        assert before.isfinite().all()
        assert torch.equal(before, whole[f"{key}.{name}"]) is not moves

    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"]
    assert len(trained) == 6
    for name in TERMS:
        assert all(row[f"distill/{name}"] > 0 for row in trained)
    kept = safetensors.torch.load_file(tmp_path / "whole" / "student.safetensors")
    assert not any("projection" in name or "learnt" in name for name in kept)
