"""The folder of a run: one trainer at a time, no traceback for a place that cannot be one, nothing left by a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from samlet.artefacts import read_manifest, write_directory
from samlet.engine.run_dir import RunDir
from samlet.errors import SamletError


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(SamletError, match=rf"{place}: cannot be used as output_dir \(.+\); choose another$"),
        RunDir(tmp_path / place).locked(),
    ):
        pass


def test_an_error_inside_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), RunDir(tmp_path).locked():
        raise PermissionError(13, "Permission denied", "somewhere/else")
    with RunDir(tmp_path).locked():
        pass


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    with RunDir(tmp_path).locked():
        for _ in range(2):
            said = (
                rf"writing here \(process {os.getpid()} on {re.escape(socket.gethostname())}\); wait for it or stop it$"
            )
            with pytest.raises(SamletError, match=said), RunDir(tmp_path).locked():
                pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def fails(run: RunDir, error: Exception, *, begun: bool = False, steps: int = 0) -> None:
    """A start that comes to nothing: before or after the run's first files, or after some steps."""
    with pytest.raises(type(error)) as caught, run.locked():  # noqa: PT012
        assert (run.path / ".lock").exists()
        if begun:
            run.write_config({"seed": 0})
            run.update_facts(seed=0, outcome="not finished")
        for step in range(steps):
            run.log({"step": step}, events=False)
        raise error
    assert caught.value is error


def test_a_start_that_is_refused_leaves_nothing_that_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("the user's own")
    before = sorted(tmp_path.rglob("*"))
    for place in ("new/deep/run", "there", "there/run"):
        for begun in (False, True):
            fails(RunDir(tmp_path / place), SamletError("it teaches nothing"), begun=begun)
            assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_says_why_and_keeps_what_it_has(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    fails(run, ValueError("an\n  accident"), begun=True, steps=2)
    assert json.loads(run.facts.read_text()) == {"seed": 0, "outcome": "failed: an accident"}
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "run.json", "metrics.jsonl"}
    before = run.facts.read_bytes()
    fails(RunDir(run.path), SamletError("another configuration"))  # which is no outcome of the run that is there
    assert run.facts.read_bytes() == before


def test_a_worker_that_outlives_a_killed_trainer_keeps_nobody_out(tmp_path: Path) -> None:
    """DataLoader's workers are forked under the lock, and notice the trainer's end only after seconds."""
    reading, writing = os.pipe()
    trainer = os.fork()
    if not trainer:
        with RunDir(tmp_path).locked():
            worker = os.fork()
            if not worker:
                signal.pause()
            os.write(writing, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(trainer, 0)
    worker = int(os.read(reading, 20))
    try:
        with RunDir(tmp_path).locked():
            os.kill(worker, 0)  # it is there still
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_directory(run.best, lambda folder: (folder / "x").write_text("new"))
    keep = {".hidden.tmp", "notes.1.2.tmp", ".env.old"}
    for name in keep:
        (tmp_path / name).write_text("the user's own")
    for folder in (run.path, run.checkpoints, run.overlays):
        (folder / ".step-00000003.12.34.tmp").mkdir(parents=True)
        (folder / ".step-00000003.12.34.tmp" / "student.safetensors").write_text("half")
        (folder / ".x.json.12.34.tmp").write_text("half")
    write_directory(tmp_path / ".best.12.34.old", lambda folder: (folder / "x").write_text("old"))
    with run.locked():
        assert {path.name for path in tmp_path.iterdir()} == keep | {
            "best",
            "checkpoints",
            "overlays",
            ".lock",
            ".lock-holder",
        }
        assert list(run.checkpoints.iterdir()) == list(run.overlays.iterdir()) == []
        assert (run.best / "x").read_text() == "new"


def test_a_kill_between_two_renames_does_not_lose_the_best(tmp_path: Path) -> None:
    for time, text in ((34, "older"), (100, "newest"), (35, "old")):
        write_directory(tmp_path / f".best.12.{time}.old", lambda folder, text=text: (folder / "x").write_text(text))  # type: ignore[misc]
    (tmp_path / ".best.12.101.tmp").mkdir()
    with RunDir(tmp_path).locked():
        assert {path.name for path in tmp_path.iterdir()} == {"best", ".lock", ".lock-holder"}
    read_manifest(tmp_path / "best")
    assert (tmp_path / "best" / "x").read_text() == "newest"
