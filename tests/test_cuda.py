"""What only a CUDA GPU can show; run by `make gpu-check`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samlet.engine.checkpoint import checkpoints_in
from samlet.models import AmgSettings, AutomaticMaskGenerator, build_sam
from samlet.models.predictor import make_prompts
from samlet.recipes.train import train
from tests.models.sizes import small_sam
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER, tiny_config, write_scenes, write_teacher

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(("kind", "sizes"), [("vit_t", STUDENT), ("vit_b", TEACHER)])
def test_a_gpu_answers_as_the_cpu_does(kind: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sam = build_sam(kind, IMAGE_SIZE, **sizes).eval()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    prompts = make_prompts(
        torch.tensor([0, 1, 1]),
        points=torch.tensor([[[9.0, 20.0]], [[40.0, 33.0]], [[8.0, 50.0]]]),
        labels=torch.tensor([[1], [1], [0]]),
    )
    with torch.no_grad():
        here = sam.decode(sam.encode(pixels), prompts)
        sam.cuda()
        there = sam.decode(
            sam.encode(pixels.cuda()),
            prompts._replace(**{name: value.cuda() for name, value in prompts._asdict().items() if value is not None}),
        )
    scale = float(here.low_res_logits.abs().max())
    assert float((here.low_res_logits - there.low_res_logits.cpu()).abs().max()) < 2e-3 * scale


@pytest.mark.parametrize("fast", [False, True])
def test_a_gpu_finds_the_masks_of_the_cpu(fast: bool) -> None:
    sam = small_sam()
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    settings = AmgSettings(8, 16, -1.0, 0.1, 0.05, fast=fast)
    here = AutomaticMaskGenerator.of(sam, settings).find(image)
    there = AutomaticMaskGenerator.of(sam.cuda(), settings).find(image)
    assert len(here.rles) == len(there.rles) > 0
    assert np.allclose(here.predicted_iou, there.predicted_iou, atol=2e-3)
    assert np.abs(here.area - there.area).max() <= 0.02 * 50 * 70


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_distils_on_a_gpu(tmp_path: Path, precision: str, compiled: bool) -> None:
    scenes, teacher = write_scenes(tmp_path / "scenes"), write_teacher(tmp_path / "teacher.pth")
    config = tiny_config(
        scenes,
        tmp_path / "run",
        training={"device": "cuda", "precision": precision, "compile": compiled, "epochs": 3},
        distillation={"enable": True},
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
    )
    assert train(config) == 0
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/student.safetensors").values())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]


def test_a_gpu_run_goes_on_where_it_was(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes")
    config = tiny_config(
        scenes,
        tmp_path / "run",
        training={"device": "cuda", "epochs": 2},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )
    assert train(config) == 0
    places = checkpoints_in(tmp_path / "run/checkpoints")
    assert [place.name for place in places] == [f"step-{step:08d}" for step in range(6, 0, -1)]
    expected = load_file(places[0] / "student.safetensors")
    start = load_file(places[4] / "student.safetensors")
    for place in places[:4]:  # as if it had been killed in the middle of the first epoch
        shutil.rmtree(place)
    assert train(config) == 0
    assert checkpoints_in(tmp_path / "run/checkpoints")[0] == places[0]
    found = load_file(places[0] / "student.safetensors")
    # A GPU adds up in any order, and AdamW makes whole steps of the rounding where a gradient is 0: nearly the same.
    assert distance(expected, found) < 0.1 * distance(expected, start)
    steps = [json.loads(row)["step"] for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 7))


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return float(sum((ours[name].double() - theirs[name].double()).square().sum() for name in ours) ** 0.5)
