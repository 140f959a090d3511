"""Whole runs on extracted stores: two processes as online, and every prompt and projection on packs in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samlet.config import RunConfig
from samlet.recipes.extract import extract
from samlet.recipes.store import verify
from samlet.recipes.train import train
from tests.recipes.test_train_processes import run_in_two
from tests.tiny import tiny_config, write_scenes, write_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("made")
    teachers = [{"name": f"T{seed}", "checkpoint": str(write_teacher(folder / f"{seed}.pth", seed))} for seed in (1, 2)]
    return write_scenes(folder / "scenes", train=6, val=2), teachers


def terms_of(projection: str) -> dict[str, dict[str, Any]]:
    """Every term; those with a projection have this one, but that the neck's is encoder_patch's alone."""
    several = "learnt" if projection == "neck" else projection
    return {
        "encoder_patch": {"student_tap": "blocks.-1", "teacher_tap": "blocks.0", "projection": projection},
        "encoder_matching": {"layers": 2, "projection": several},
        **{name: {} for name in ("prompt_embed", "decoder_mask_token", "dense_mask_logits", "decoder_matching")},
        "attention_matching": {},
        "rkd": {"patches": 8},
    }


@pytest.mark.slow
def test_two_processes_on_stores_come_to_the_weights_of_two_with_live_teachers(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    scenes, teachers = made
    blocks: dict[str, Any] = {
        "augmentation": {"variants": 2, "vertical_flip": 0.5},
        "extraction": {"dtype": "fp32", "images_per_shard": 4},
        "training": {"max_steps": 4, "batch_size": 2, "accumulation": 1},
        "teachers": teachers,
    }
    stored = {"use_precomputed_features": True, "precomputed_root": str(tmp_path / "stores")}
    assert (
        extract(
            tiny_config(scenes, tmp_path / "c", distillation={"enable": True, **terms_of("neck"), **stored}, **blocks)
        )
        == 0
    )
    weights = []
    for name, more in (("online", {}), ("cached", stored)):
        distillation = {"enable": True, **terms_of("neck"), **more}
        out = run_in_two(scenes, tmp_path / name, distillation=distillation, **blocks)
        (last,) = (out / "checkpoints").glob("step-00000004")
        weights.append(load_file(last / "student.safetensors"))
    online, cached = weights
    assert online.keys() == cached.keys()
    for key, value in online.items():
        torch.testing.assert_close(cached[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection", ["neck", "pca", "learnt"])
def test_every_prompt_and_projection_trains_on_packs_in_int8(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, projection: str
) -> None:
    scenes, teachers = made

    def config(mode: str) -> RunConfig:
        return tiny_config(
            scenes,
            tmp_path / mode,
            dataset={"mode": mode},
            augmentation={"enable": False},
            extraction={"dtype": "int8", "pack": True, "images_per_shard": 4},
            distillation={
                "enable": True,
                "use_precomputed_features": True,
                "precomputed_root": str(tmp_path / "stores"),
                **terms_of(projection),
            },
            teachers=teachers,
            training={"max_steps": 1},
        )

    assert extract(config("mixed")) == 0
    for teacher in teachers:
        assert list((tmp_path / "stores" / teacher["name"] / "train" / "packs").glob("*.safetensors"))
    for mode in ("point", "box", "mixed"):
        assert train(config(mode)) == 0
    for teacher in teachers:
        assert verify(tmp_path / "stores" / teacher["name"]) == 0
