"""P1: killed at any moment and started again, a run ends with the same weights, optimizer and rows, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_scenes, write_teacher

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=1)


def storm(
    scenes: Path, out: Path, kills: int, *, bugs: Sequence[str] = ("none",), world: int = 1, **blocks: Any
) -> dict[str, dict[str, Any]]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("crash_harness.py")),
        str(scenes),
        str(out),
        str(kills),
        ",".join(bugs),
        str(world),
    ]
    done = subprocess.run(
        [*command, json.dumps(blocks)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


SAVES: dict[str, Any] = {"checkpoint": {"every_steps": 2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "workers": {"training": {"num_workers": 2}},
    "two processes": {"world": 2},
    "two processes with workers": {"world": 2, "training": {"num_workers": 1}},
}


def weather(scenes: Path, out: Path, kills: int, variant: str, epochs: int, **blocks: Any) -> None:
    settings = {**VARIANTS[variant], **blocks}
    training = {"epochs": epochs, **settings.pop("training", {})}
    result = storm(scenes, out, kills, **SAVES, training=training, **settings)["none"]
    assert result["hits"] >= kills
    assert (result["files"], result["differing"]) == (6, [])


def test_twenty_kills_change_nothing(scenes: Path, tmp_path: Path) -> None:
    weather(scenes, tmp_path, 20, "alone", epochs=5)


@pytest.mark.parametrize("variant", ["workers", "two processes"])
def test_a_few_kills_change_nothing_with(scenes: Path, tmp_path: Path, variant: str) -> None:
    weather(scenes, tmp_path, 3, variant, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_twenty_kills_change_nothing_with(scenes: Path, tmp_path: Path, variant: str) -> None:
    weather(scenes, tmp_path, 20, variant, epochs=5)


@pytest.mark.slow
def test_kills_change_nothing_with_teacher_bf16_and_accumulation(scenes: Path, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.pth")
    weather(
        scenes,
        tmp_path,
        6,
        "alone",
        epochs=3,
        model={"batch_norm": "train"},
        training={"batch_size": 1, "accumulation": 2, "precision": "bf16"},
        distillation={"enable": True},
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
    )


def test_the_harness_notices_planted_bugs(scenes: Path, tmp_path: Path) -> None:
    bugs = ("naive_save", "forgotten_sampler", "forgotten_random", "kept_rows")
    results = storm(scenes, tmp_path, 8, bugs=bugs, **SAVES, training={"epochs": 3})
    assert set(results) == set(bugs)
    for bug, result in results.items():
        assert result["hits"] >= 1, bug
        assert result["differing"], bug


@pytest.mark.slow
def test_the_harness_notices_a_rank_that_hangs(scenes: Path, tmp_path: Path) -> None:
    result = storm(scenes, tmp_path, 1, bugs=["deaf"], world=2, **SAVES, training={"epochs": 3})["deaf"]
    assert result["differing"][0] in ("exit codes [-9, 'hangs']", "exit codes ['hangs', -9]")
