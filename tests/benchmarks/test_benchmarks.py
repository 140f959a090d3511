"""Every benchmark runs to its report on tiny models; on a machine without CUDA it says so in one sentence."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.machine import Bench, Ceilings
from benchmarks.models import build
from PIL import Image

from benchmarks import amg, decoder, encoder, objectives, plain, step
from samlet.models import AutomaticMaskGenerator

QUICK = ["--device", "cpu", "--tiny", "--repeats", "1"]
RUNS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "decoder": (decoder.main, ["--prompts", "3"]),
    "encoder": (encoder.main, ["--image-size", "64"]),
    "objectives": (objectives.main, ["--image-size", "64", "--prompts", "2"]),
    "step": (step.main, ["--image-sizes", "64", "--objects", "2", "--teacher", "vit_b"]),
}


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "ceilings", lambda self: Ceilings(1e11, 1e10))


@pytest.mark.usefixtures("small_ceilings")
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_writes_its_figures(name: str, tmp_path: Path) -> None:
    main, arguments = RUNS[name]
    path = tmp_path / "out.json"
    assert main([*QUICK, *arguments, "--json", str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["figures"]
    assert all(table["rows"] for table in content["tables"])
    assert path.with_suffix(".md").read_text().startswith("# ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_without_a_gpu_one_sentence(name: str) -> None:
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        RUNS[name][0](["--device", "cuda"])


@pytest.mark.parametrize("kind", ["vit_t", "vit_b"])
def test_the_plain_way_is_the_same_function(kind: str) -> None:
    sam = build(kind, 64, tiny=True)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = sam.encode(pixels).embedding
        torch.testing.assert_close(plain.encode(plain.plain_state(sam), sam.arch, pixels), ours, rtol=1e-4, atol=1e-5)
        features, prompts = decoder.random_image(sam), decoder.random_points(sam, 3)
        for multimask in (False, True):
            answer = sam.decode(features, prompts, multimask_output=multimask).low_res_logits
            reference = decoder.plain_decode(sam, plain.plain_state(sam), features, prompts, multimask)
            torch.testing.assert_close(answer, reference, rtol=1e-4, atol=1e-5)


def test_the_parts_of_a_step_are_all_there(tmp_path: Path) -> None:
    bench = Bench("cpu", "fp32", 0, "wall", 1)
    options = argparse.Namespace(batch=2, tiny=True, teacher="vit_b", compile=False)
    training = step.Training(bench, options, 64, tmp_path, 2)
    parts = training.run()
    assert list(parts) == step.PARTS
    assert min(parts.values()) > 0


@pytest.mark.usefixtures("small_ceilings")
def test_the_forms_of_the_automatic_generator_are_compared(tmp_path: Path) -> None:
    (tmp_path / "val/images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in (1, 2):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"val/images/{number}.png")
    truth = {
        "info": {},
        "categories": [{"id": 1, "name": "thing"}],
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "iscrowd": 0,
                "area": 100,
                "bbox": [5, 5, 10, 10],
                "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]],
            }
            for i in (1, 2)
        ],
    }
    (tmp_path / "val.json").write_text(json.dumps(truth))
    path = tmp_path / "out.json"
    thresholds = ["--pred-iou-thresh=-9", "--stability-score-thresh", "0", "--points-per-side", "4"]
    assert amg.main([*QUICK, "none", str(tmp_path), *thresholds, "--json", str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text())
    assert [row["form"] for row in content["tables"][0]["rows"]] == ["all upscaled", "plain", "fast"]
    assert float(content["tables"][0]["rows"][1]["masks an image"]) > 0
    same = [AutomaticMaskGenerator(build("vit_t", 64, tiny=True), 4, 64, -9.0, 0.0).find(np.zeros((9, 9, 3), np.uint8))]
    assert amg.mean_best_iou(same, same) == 1
