"""The command line answers fast, in one sentence, and with the right exit code."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from samlet.cli import app
from samlet.run import plain_config
from tests.tiny import tiny_config, write_scenes

REPOSITORY = Path(__file__).resolve().parents[1]


def samlet(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from samlet.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["schema"],
        ["check-data", "--help"],
        ["doctor", "--help"],
        ["interpolate", "--help"],
    ],
)
def test_help_and_configuration_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom samlet.cli import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(get_command(app).commands))  # type: ignore[attr-defined]
def test_the_help_of_a_command_ends_with_an_example_that_parses(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    word, program, called, *arguments = shlex.split(command.epilog or "")
    assert (word, program, called) == ("Example:", "samlet", name)
    command.make_context(name, arguments)
    shown = CliRunner().invoke(app, [name, "--help"]).output
    assert f"Example: samlet {name}" in " ".join(shown.split())


def test_the_help_says_how_several_points_are_written() -> None:
    for name, words in (
        ("predict", ["X,Y[,0]", "Once for each click"]),
        ("interpolate", ["A B ...", "with spaces between"]),
    ):
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert all(word in shown for word in words), shown


def test_a_bad_configuration_lists_every_mistake_and_exits_2(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(
        "dataset: {root: nowhere, mode: pointt}\n"
        "training:\n  epoch: 3\n  precision: bf61\n  learning_rate: fast\n"
        "teachers:\n  - {name: H, checkpoint: weights/sam.pth}\n"
    )
    done = samlet("train", str(config))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 6
    for number, words in (
        (1, "no such file or folder: 'nowhere'"),
        (1, "did you mean 'point'?"),
        (3, "training.epoch: unknown key (did you mean 'epochs'?)"),
        (4, "did you mean 'bf16'?"),
        (5, "must be a valid number, got 'fast'"),
        (7, "teachers.0.checkpoint: no such file"),
    ):
        assert any(f"{config}:{number}: " in line and words in line for line in lines), (number, words, lines)
    assert "Traceback" not in done.stderr


def test_both_entry_points_train_and_predict_and_evaluate(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=4, val=1)
    config = tmp_path / "run.json"
    config.write_text(json.dumps(plain_config(tiny_config(scenes, tmp_path / "run", training={"epochs": 1}))))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "--config", str(config), "training.max_steps=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert samlet("train", str(config), "training.max_steps=1").returncode == 0  # finished already
    assert samlet("train", str(config), "training.max_steps=2").returncode == 2  # another configuration
    image = next((scenes / "val" / "image").iterdir())
    done = samlet(
        "predict", "run", str(image), "--point", "30,30", "--out", "mask.png", "--overlay", "see.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mask.png").exists()
    assert (tmp_path / "see.png").exists()
    done = samlet("evaluate", "run", str(scenes), "--out", "scores", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run" in json.loads((tmp_path / "scores/evaluate.json").read_text())["checkpoints"]
    assert "|" in (tmp_path / "scores/evaluate.md").read_text()


def test_check_data_exits_2_on_what_training_refuses(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=2, val=1)
    assert samlet("check-data", str(scenes), cwd=tmp_path).returncode == 0
    victim = next((scenes / "train" / "image").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    done = samlet("check-data", str(scenes), cwd=tmp_path)
    assert done.returncode == 2
    assert victim.name in done.stdout.replace("\n", "")


def test_what_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    done = samlet("predict", "absent.pt", "absent.png", "--point", "1,2", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "absent" in done.stderr
