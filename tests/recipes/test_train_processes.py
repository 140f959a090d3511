"""Two processes see the samples of one, come to its weights, and do so to the bit each time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samlet.engine.checkpoint import checkpoints_in
from samlet.recipes.train import train
from tests.tiny import tiny_config, write_scenes, write_teacher

Process = subprocess.Popen[str]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    scenes = write_scenes(folder / "scenes", train=6, val=3)
    teacher = write_teacher(folder / "teacher.pth")
    return scenes, {
        "dataset": {"labelled_fraction": 0.5, "unlabelled": "use"},
        "distillation": {"enable": True, "prompt_embed": {"enable": True}, "decoder_mask_token": {"enable": True}},
        "teachers": [{"name": "T", "checkpoint": str(teacher)}],
        "training": {"epochs": 4, "batch_size": 2, "accumulation": 2, "freeze": ["mask_decoder"], "unfreeze_epoch": 1},
        "checkpoint": {"keep_last": 9},
    }


def launch_two(scenes: Path, out: Path, *, late: int = -1, poisoned: int = -1, **blocks: Any) -> list[Process]:
    config = out.with_suffix(".json")
    config.write_text(tiny_config(scenes, out, **blocks).model_dump_json(by_alias=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LATE_RANK": str(late),
        "POISONED_RANK": str(poisoned),
        "ACCUMULATION": str(blocks["training"]["accumulation"]),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(config)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def run_in_two(scenes: Path, out: Path, *, late: int = -1, **blocks: Any) -> Path:
    processes = launch_two(scenes, out, late=late, **blocks)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-1500:] + said[1][-1500:]
    return out


@pytest.fixture(scope="module")
def calm(blocks: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs; the second takes its time."""
    scenes, settings = blocks
    return run_in_two(scenes, tmp_path_factory.mktemp("calm") / "run", late=1, resume="never", **settings)


def test_two_processes_come_to_the_weights_of_one(
    blocks: tuple[Path, dict[str, Any]], calm: Path, tmp_path: Path
) -> None:
    scenes, settings = blocks
    alone = tmp_path / "alone"
    assert train(tiny_config(scenes, alone, **settings)) == 0
    one, two = load_file(alone / "student.safetensors"), load_file(calm / "student.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, calm)]
    for one_row, two_row in zip(*rows, strict=True):
        assert one_row.pop("split") == two_row.pop("split")
        assert one_row == pytest.approx(two_row, rel=2e-4, abs=1e-5)


def test_two_processes_share_the_search_for_automatic_masks_and_learn_from_all(
    blocks: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    scenes, settings = blocks
    everything = {
        **settings,
        "dataset": {"mode": "everything", "grid_points": 4},
        "everything": {"unlabelled": "negative", "max_points": 4, "boxes": 1},
        "mask_teacher": {
            "enable": True,
            "method": "dual_supervision",
            "points_per_side": 3,
            "pred_iou_thresh": 0.0,
            "stability_score_thresh": 0.0,
        },
        "validation": {
            **settings.get("validation", {}),
            "metric": "everything_ar",
            "everything": {"points_per_side": 3, "max_images": 3},
        },
    }
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert train(tiny_config(scenes, alone, **everything)) == 0
    run_in_two(scenes, shared, **everything)
    facts = [json.loads((run / "run.json").read_text())["mask_teacher"] for run in (alone, shared)]
    assert facts[0] == facts[1]
    rows = [json.loads((run / "best" / "metrics.json").read_text()) for run in (alone, shared)]
    assert [row["everything_ece"] for row in rows] == pytest.approx([rows[0]["everything_ece"]] * 2, abs=1e-3)
    assert [row["everything_ar"] for row in rows] == pytest.approx([rows[0]["everything_ar"]] * 2, abs=0.02)
    one, two = (load_file(run / "student.safetensors") for run in (alone, shared))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_a_process_that_loses_the_other_ends_and_the_run_goes_on_to_the_same_bits(
    blocks: tuple[Path, dict[str, Any]], calm: Path, tmp_path: Path
) -> None:
    """The first checkpoint lies where the frozen part begins to train, the others after it."""
    scenes, settings = blocks
    out = tmp_path / "run"
    for victim in (1, 0):
        saved = len(list(out.glob("checkpoints/step-*")))
        processes = launch_two(scenes, out, **settings)
        while len(list(out.glob("checkpoints/step-*"))) == saved:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[victim].kill()
        survivor = processes[1 - victim]
        said = survivor.communicate(timeout=180)[0]
        processes[victim].communicate()
        assert survivor.returncode not in (0, -signal.SIGKILL), said[-1500:]
    run_in_two(scenes, out, **settings)
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (calm / name).read_bytes() == (out / name).read_bytes(), name


def test_what_happens_to_one_process_is_decided_by_both(blocks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Its loss is not finite in step 2: both leave the step out. It is asked to stop in step 4: both save and stop."""
    scenes, settings = blocks
    out = tmp_path / "run"
    training = {**settings["training"], "non_finite": "skip"}
    processes = launch_two(scenes, out, poisoned=1, **{**settings, "training": training})
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said[0][-1500:] + said[1][-1500:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 3, 4]
    (newest, *_) = checkpoints_in(out / "checkpoints")
    state = json.loads((newest / "trainer.json").read_text())["state"]
    assert (state["step"], state["skipped_steps"]) == (4, 1)
    assert all(value.isfinite().all() for value in load_file(newest / "student.safetensors").values())
