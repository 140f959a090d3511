"""P1: killed at any moment and started again, a run ends with the same weights, optimizer and rows, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_scenes, write_teacher

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=1)


def storm(scenes: Path, out: Path, kills: int, *, bug: str = "none", **blocks: Any) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("crash_harness.py")),
        str(scenes),
        str(out),
        str(kills),
        bug,
    ]
    done = subprocess.run(
        [*command, json.dumps(blocks)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


SAVES: dict[str, Any] = {"checkpoint": {"every_steps": 2}}


def test_twenty_kills_change_nothing(scenes: Path, tmp_path: Path) -> None:
    result = storm(scenes, tmp_path, 20, **SAVES, training={"epochs": 8, "num_workers": 0})
    assert result["hits"] >= 20
    assert (result["files"], result["differing"]) == (5, [])


def test_kills_change_nothing_with_teacher_bf16_and_accumulation(scenes: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.pth")
    result = storm(
        scenes,
        tmp_path,
        6,
        **SAVES,
        model={"batch_norm": "train"},
        training={"epochs": 4, "batch_size": 1, "accumulation": 2, "precision": "bf16"},
        distillation={"enable": True},
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
    )
    assert result["hits"] >= 6
    assert (result["files"], result["differing"]) == (5, [])


@pytest.mark.parametrize("bug", ["naive_save", "forgotten_sampler", "kept_rows"])
def test_the_harness_notices_a_planted_bug(scenes: Path, tmp_path: Path, bug: str) -> None:
    result = storm(scenes, tmp_path, 8, bug=bug, **SAVES, training={"epochs": 4})
    assert result["hits"] >= 1
    assert result["differing"]
