"""scripts/extract_teacher_features.py understands the flags of the distillation guide, and its store trains a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from samlet.distill.kept_masks import FOLDER, KeptMasks, read_masks
from samlet.recipes.store import verify
from samlet.recipes.train import train
from samlet.run import plain_config
from tests.tiny import tiny_config, write_scenes, write_teacher

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "extract_teacher_features.py"


def run_script(flags: dict[str, list[object]]) -> str:
    """What the script says."""
    words = [str(word) for flag, values in flags.items() for word in (flag, *values)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def masks_after(flags: dict[str, list[object]], points: int, out: Path) -> list[KeptMasks]:
    """The automatic masks in the store once `--mode everything --grid_points` has run."""
    said = run_script({**flags, "--mode": ["everything"], "--grid_points": [points]})
    assert "6 to search" in said
    assert "0 to compute" in said
    places = sorted((out / FOLDER).rglob("*.json"))
    assert [place.parent.name for place in places] == ["train"] * 4 + ["val"] * 2
    return [read_masks(place) for place in places]


def test_the_flags_of_the_guide_make_a_store_that_numpy_and_a_run_read(tmp_path: Path) -> None:
    scenes, teacher = write_scenes(tmp_path / "datasets", train=4, val=2), write_teacher(tmp_path / "teacher.pth")
    out, blocks = tmp_path / "precomputed" / "tiny", dict[str, Any](augmentation={"enable": False})
    teacher_cfg = tmp_path / "teacher.json"
    neck = {"encoder_patch": {"teacher_tap": "blocks.0", "student_tap": "blocks.-1", "projection": "neck"}}
    settings = tiny_config(
        scenes,
        tmp_path / "r",
        distillation={"enable": True, **neck},
        **blocks,
        teachers=[{"name": "?", "checkpoint": str(teacher)}],
        mask_teacher={"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0},
    )
    teacher_cfg.write_text(json.dumps(plain_config(settings)))
    flags: dict[str, list[object]] = {
        "--teacher_name": ["tiny"],
        "--teacher_cfg": [teacher_cfg],
        "--teacher_ckpt": [teacher],
        "--dataset_base_dir": [scenes],
        "--output_base_dir": [out],
        "--splits": ["train", "val"],
        "--fp16": [],
    }
    assert "6 to compute" in run_script(flags)
    assert not (out / FOLDER).exists()
    features = {place: place.read_bytes() for place in out.rglob("*.npy")}
    found = masks_after(flags, 3, out)
    assert {kept.facts.settings["points_per_side"] for kept in found} == {3}
    assert all(map(len, found))
    assert {place: place.read_bytes() for place in out.rglob("*.npy")} == features  # they suit any prompts

    for split in ("train", "val"):
        for image in (scenes / split / "image").iterdir():
            for feature in ("embedding", "blocks.0@neck"):
                array = np.load(out / split / f"{image.stem}_{feature}.npy", allow_pickle=False)
                assert (array.dtype, array.shape) == (np.float16, (256, 4, 4))
    assert verify(out) == 0

    run = tiny_config(
        scenes,
        tmp_path / "run",
        distillation={"enable": True, "use_precomputed_features": True, "precomputed_root": str(out), **neck},
        teachers=[{"name": "tiny"}],  # its file is not needed any more
        training={"max_steps": 2},
        **blocks,
    )
    teacher.unlink()
    assert train(run) == 0
    rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["distill/encoder_patch"] > 0 for row in rows if row["split"] == "train")
