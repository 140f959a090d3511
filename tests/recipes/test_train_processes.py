"""Two processes see the samples of one, come to its weights, and do so to the bit each time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samlet.artefacts import sha256_of
from samlet.recipes.train import train
from samlet.run import plain_config
from tests.tiny import tiny_config, write_scenes, write_teacher

RUNS = ("one", "first")
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


def run_in_two(scenes: Path, out: Path, **blocks: Any) -> Path:
    config = out.with_suffix(".json")
    config.write_text(json.dumps(plain_config(tiny_config(scenes, out, **blocks))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(config)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-1500:] + said[1][-1500:]
    return out


def test_two_processes_equal_one_and_themselves(blocks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    scenes, settings = blocks
    assert train(tiny_config(scenes, tmp_path / "one", **settings)) == 0
    first = run_in_two(scenes, tmp_path / "first", **settings)
    again = run_in_two(scenes, tmp_path / "again", **settings)

    assert sha256_of(first / "student.safetensors") == sha256_of(again / "student.safetensors")
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()

    for newest in sorted((again / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newest)
    run_in_two(scenes, again, **settings)  # goes on after the part has thawed
    assert sha256_of(first / "student.safetensors") == sha256_of(again / "student.safetensors")
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()

    one, two = load_file(tmp_path / "one" / "student.safetensors"), load_file(first / "student.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in RUNS]
    for alone, shared in zip(*rows, strict=True):
        assert alone.pop("split") == shared.pop("split")
        assert alone == pytest.approx(shared, rel=2e-4, abs=1e-5)
