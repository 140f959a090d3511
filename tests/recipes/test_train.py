"""Whole runs of seconds: what a run leaves, what it refuses, and that every promise about it holds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from samlet.artefacts import read_manifest, sha256_of
from samlet.config import RunConfig
from samlet.engine import checkpoint
from samlet.engine.run_dir import RunDir
from samlet.engine.schedule import learning_rate
from samlet.engine.step import TrainStep
from samlet.errors import SamletError
from samlet.models import load_sam
from samlet.recipes import train as recipe
from samlet.recipes.train import train
from samlet.run import Run, plain_config
from samlet.schema import load_config
from tests.tiny import IMAGE_SIZE, STUDENT, tiny_config, write_scenes, write_teacher

SNIPPET = """
"distillation": {
  "enable": true,
  "lambda_coef": 1.0,
  "encoder_patch":      { "enable": true,  "w_l2": 1.0, "w_cos": 1.0 },
  "prompt_embed":       { "enable": true,  "w_mse": 0.7, "w_cos": 0.3 },
  "decoder_mask_token": { "enable": true,  "w_kl": 1.0, "temperature": 0.5 },
  "dense_mask_logits":  { "enable": true,  "w_kl": 0.6, "w_focal": 0.4, "gamma": 2.0 }
},
"teachers": [
  { "name": "SAM-H",          "weight": 0.7, "checkpoint": "%(big)s" },
  { "name": "MobileSAM_orig", "weight": 0.3, "checkpoint": "%(small)s" }
]
"""
TERMS = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def distilling(teacher: Path, **terms: Any) -> dict[str, Any]:
    return {
        "distillation": {"enable": True, **terms},
        "teachers": [{"name": "T", "checkpoint": str(teacher)}],
    }


def test_the_seeds_snippet_trains_as_it_is(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    small = write_teacher(tmp_path / "mobile.pt", seed=2, kind="vit_t", **STUDENT)
    base = plain_config(tiny_config(scenes, tmp_path / "run"))
    base = {key: value for key, value in base.items() if key not in ("distillation", "teachers")}
    pasted = json.dumps(base)[:-1] + "," + SNIPPET % {"big": teacher, "small": small} + "}"
    path = tmp_path / "run.json"
    path.write_text(pasted)
    assert train(load_config(RunConfig, path)) == 0
    first = rows(tmp_path / "run")[0]
    for term in TERMS:
        assert first[f"distill/{term}"] > 0
        assert first[f"distill/{term}/weighted"] == pytest.approx(first[f"distill/{term}"])
    weighted = sum(value for name, value in first.items() if name.endswith("/weighted"))
    assert first["loss"] == pytest.approx(weighted)


def test_a_run_leaves_what_a_person_looks_for(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "a run"
    config = tiny_config(
        scenes, out, **distilling(teacher), validation={"overlays": 1}, logging={"tensorboard": True, "curves": True}
    )
    assert train(config) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "overlays",
        "curves.png",
        "best",
        "checkpoints",
        "student.safetensors",
        "mobile_sam.pt",
    }
    assert load_config(RunConfig, out / "config.yaml") == config
    facts = json.loads((out / "run.json").read_text())
    assert facts["final_weights_sha256"] == sha256_of(out / "student.safetensors")
    assert {"samlet", "torch", "seed", "config_sha256", "data_sha256", "device"} <= set(facts)
    upstream = torch.load(out / "mobile_sam.pt", weights_only=True)
    student = load_sam(out)
    assert list(upstream) == list(student.state_dict())
    assert all(torch.equal(upstream[name], value) for name, value in student.state_dict().items())
    assert any((out / "tensorboard").iterdir())
    assert list((out / "overlays" / "step-00000006").glob("*.png"))
    assert rows(out, "val")[-1].keys() >= {"point_miou", "box_miou", "mean_miou", "point_mdice"}


def test_the_same_run_twice_gives_the_same_hash(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    for name in ("one", "two"):
        assert train(tiny_config(scenes, tmp_path / name, **distilling(teacher))) == 0
    hashes = [json.loads((tmp_path / name / "run.json").read_text())["final_weights_sha256"] for name in ("one", "two")]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_workers_change_nothing(scenes: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        assert train(tiny_config(scenes, tmp_path / str(workers), training={"epochs": 1, "num_workers": workers})) == 0
    assert (tmp_path / "0/metrics.jsonl").read_bytes() == (tmp_path / "2/metrics.jsonl").read_bytes()


def test_accumulation_equals_the_larger_batch(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    sizes = {"whole": (4, 1), "parts": (2, 2)}
    for name, (batch_size, accumulation) in sizes.items():
        training = {"batch_size": batch_size, "accumulation": accumulation, "max_steps": 1}
        assert train(tiny_config(scenes, tmp_path / name, **distilling(teacher), training=training)) == 0
    whole, parts = (load_file(tmp_path / name / "student.safetensors") for name in sizes)
    assert rows(tmp_path / "whole")[0]["loss"] == pytest.approx(rows(tmp_path / "parts")[0]["loss"], rel=1e-4)
    for name, value in whole.items():
        # Adam's first step is +-lr wherever a gradient is not 0, so rounding near 0 may flip single weights.
        close = torch.isclose(value, parts[name], rtol=0, atol=1e-5)
        assert close.float().mean() > 0.995, name


def test_the_learning_rate_follows_the_formula_under_accumulation(scenes: Path, tmp_path: Path) -> None:
    training = {"batch_size": 1, "accumulation": 4, "epochs": 3, "warmup_steps": 2, "min_learning_rate": 1e-5}
    assert train(tiny_config(scenes, tmp_path / "run", training=training)) == 0
    logged = [row["lr"] for row in rows(tmp_path / "run")]
    assert len(logged) == math.ceil(3 * 6 / 4)
    settings = {"total_steps": 5, "peak": 1e-3, "floor": 1e-5, "warmup_steps": 2}
    assert logged == [learning_rate(step, **settings) for step in range(5)]  # type: ignore[arg-type]


def test_frozen_parts_stay_and_thaw_when_told(scenes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = tiny_config(scenes, tmp_path / "x").model.build().state_dict()
    key = "image_encoder.neck.0.weight"
    for name, unfreeze, moves in (("frozen", None, False), ("thawed", 1, True)):
        training = {"freeze": ["image_encoder"], "unfreeze_epoch": unfreeze}
        out = tmp_path / name
        assert train(tiny_config(scenes, out, training=training, model={"batch_norm": "train"})) == 0
        newest = checkpoint.checkpoints_in(out / "checkpoints")[0]
        left = load_file(newest / "student.safetensors")
        assert torch.equal(left[key], start[key]) is not moves
        encoder = [torch.equal(left[k], v) for k, v in start.items() if k.startswith("image_encoder.")]
        assert all(encoder) is not moves


def test_early_stopping_ends_the_run(scenes: Path, tmp_path: Path) -> None:
    training = {"epochs": 8, "learning_rate": 1e-9, "min_learning_rate": 0.0}
    config = tiny_config(scenes, tmp_path / "run", training=training, validation={"early_stopping_patience": 2})
    assert train(config) == 0
    values = [row["mean_miou"] for row in rows(tmp_path / "run", "val")]
    assert values.index(max(values)) == len(values) - 3
    assert len(values) < 8
    (tmp_path / "run/student.safetensors").unlink()  # as if it had been killed at the very end
    assert train(config) == 0
    assert len(rows(tmp_path / "run", "val")) == len(values)
    assert (tmp_path / "run/student.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(
    scenes: Path, tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"epochs": 3}
    calm = tiny_config(scenes, tmp_path / "calm", training=training)
    assert train(calm) == 0

    def step_and_signal(run: Run, window: Any) -> Any:
        row = original(run, window)
        if run.state.step == 3:
            os.kill(os.getpid(), number)
        return row

    original = recipe.optimizer_step
    stopped = tiny_config(scenes, tmp_path / "stopped", training=training)
    with patch.object(recipe, "optimizer_step", step_and_signal):
        assert train(stopped) == code
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert ("Ctrl-C again" in said) is (number == signal.SIGINT)
    assert read_manifest(tmp_path / "stopped/checkpoints/step-00000004")["step"] == 4
    assert train(stopped) == 0
    assert sha256_of(tmp_path / "calm/student.safetensors") == sha256_of(tmp_path / "stopped/student.safetensors")
    assert (tmp_path / "calm/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()


def test_a_signal_to_the_whole_group_saves_though_workers_hear_it_too(scenes: Path, tmp_path: Path) -> None:
    training = {"epochs": 500, "num_workers": 2}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(plain_config(tiny_config(scenes, tmp_path / "run", training=training))))
    command = [sys.executable, "-m", "samlet", "train", str(config)]
    run = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert run.stderr is not None
    while "step 1/" not in run.stderr.readline():
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGTERM)
    rest = run.communicate(timeout=120)[1]
    assert run.returncode == 143, rest[-1000:]
    assert checkpoint.newest_valid(tmp_path / "run/checkpoints")[0] is not None


FAULTS: dict[str, Callable[[int], Any]] = {
    "write": lambda k: failing("pathlib.Path.write_bytes", k),
    "fsync": lambda k: failing("os.fsync", k),
    "rename": lambda k: failing("os.replace", k),
}


def failing(target: str, k: int) -> Any:
    """The k-th call from now on fails as on a full disk."""
    module, _, name = target.rpartition(".")
    owner = Path if module == "pathlib.Path" else os
    real, calls = getattr(owner, name), iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= k:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    return patch.object(owner, name, call)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_anywhere_loses_nothing(scenes: Path, tmp_path: Path, fault: str) -> None:
    config = tiny_config(scenes, tmp_path / "run", training={"epochs": 1})
    assert train(config) == 0
    folder = tmp_path / "run/checkpoints"
    student = load_sam(tmp_path / "run")
    optimizer = torch.optim.AdamW(student.parameters())
    before, _ = checkpoint.newest_valid(folder)
    states = {"cpu.0": torch.get_rng_state()}
    for k in range(40):
        state = checkpoint.TrainerState(step=1000 + k)
        try:
            with FAULTS[fault](k):
                checkpoint.save_checkpoint(folder, state, student=student, optimizer=optimizer, random_states=states)
        except SamletError as error:
            assert "could not be written (No space left on device)" in str(error)
            newest, complaints = checkpoint.newest_valid(folder)
            assert newest in (
                before,
                folder / f"step-{1000 + k:08d}",
            )  # in place before its folder was flushed, or not at all
            assert not complaints
            before = newest
            assert not [path for path in folder.rglob("*.tmp")]
        else:
            assert k > 0
            break
    else:
        pytest.fail("the save never succeeded")


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(scenes: Path, tmp_path: Path) -> None:
    config = tiny_config(scenes, tmp_path / "run", training={"epochs": 3})
    calm = tiny_config(scenes, tmp_path / "calm", training={"epochs": 3})
    assert train(calm) == 0
    with failing("os.replace", 8), pytest.raises(SamletError, match="No space left on device"):
        train(config)
    assert train(config) == 0
    assert sha256_of(tmp_path / "calm/student.safetensors") == sha256_of(tmp_path / "run/student.safetensors")


def test_a_damaged_checkpoint_is_skipped_by_name_and_refused_when_named(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tiny_config(scenes, tmp_path / "run", training={"epochs": 3})
    assert train(short) == 0
    expected = sha256_of(tmp_path / "run/student.safetensors")
    newest, older = checkpoint.checkpoints_in(tmp_path / "run/checkpoints")
    victim = newest / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert train(short) == 0
    said = capsys.readouterr().out
    assert f"skipped: {victim}: damaged" in said
    assert f"resumed from {older}" in said
    assert sha256_of(tmp_path / "run/student.safetensors") == expected
    victim.write_bytes(content)
    with pytest.raises(SamletError, match="damaged"):
        train(tiny_config(scenes, tmp_path / "other", training={"epochs": 3}, resume=str(newest)))


def test_an_older_checkpoint_of_the_same_run_may_be_named(scenes: Path, tmp_path: Path) -> None:
    blocks: dict[str, Any] = {"training": {"epochs": 3}, "checkpoint": {"keep_last": 9}}
    config = tiny_config(scenes, tmp_path / "run", **blocks)
    assert train(config) == 0
    expected, log = sha256_of(tmp_path / "run/student.safetensors"), (tmp_path / "run/metrics.jsonl").read_bytes()
    oldest = checkpoint.checkpoints_in(tmp_path / "run/checkpoints")[-1].resolve()
    assert train(tiny_config(scenes, tmp_path / "run", **blocks, resume=str(oldest))) == 0
    assert sha256_of(tmp_path / "run/student.safetensors") == expected
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == log


def test_another_configuration_is_refused_by_field(scenes: Path, tmp_path: Path) -> None:
    assert train(tiny_config(scenes, tmp_path / "run", training={"epochs": 1})) == 0
    changed = tiny_config(scenes, tmp_path / "run", training={"epochs": 2, "num_workers": 1})
    with pytest.raises(SamletError, match=r"training.epochs was 1, is 2\. Choose another output_dir"):
        train(changed)
    with pytest.raises(SamletError, match="resume is 'never'"):
        train(tiny_config(scenes, tmp_path / "run", resume="never"))


def test_a_second_trainer_is_locked_out(scenes: Path, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run").locked(), pytest.raises(SamletError, match="another samlet train is writing here"):
        train(tiny_config(scenes, tmp_path / "run"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_never_taken(scenes: Path, tmp_path: Path, where: str) -> None:
    real = TrainStep.forward

    def poisoned(self: TrainStep, batch: Any, lessons: Any, counts: Any) -> Any:
        loss, terms = real(self, batch, lessons, counts)
        if torch.is_grad_enabled() and self.student.training and next(calls) == 2:
            if where == "loss":
                terms.raw["task/dice"] = terms.raw["task/dice"] * float("nan")
            else:
                loss = loss + (loss - loss.detach()) * 1e39
        return loss, terms

    calls = iter(range(100))
    with (
        patch.object(TrainStep, "forward", poisoned),
        pytest.raises(SamletError, match=r"(task/dice|the gradient) not finite at step 3, images scene_"),
    ):
        train(tiny_config(scenes, tmp_path / "run"))
    calls = iter(range(100))
    out = tmp_path / "skipping"
    with patch.object(TrainStep, "forward", poisoned):
        assert train(tiny_config(scenes, out, training={"non_finite": "skip"})) == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 4, 5, 6]
    assert all(value.isfinite().all() for value in load_file(out / "student.safetensors").values())


def test_a_broken_image_is_refused_or_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = write_scenes(tmp_path / "scenes")
    victim = sorted((scenes / "train" / "image").iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(SamletError, match=victim.name):
        train(tiny_config(scenes, tmp_path / "refused", training={"epochs": 1}))
    assert train(tiny_config(scenes, tmp_path / "skipped", dataset={"broken": "skip"}, training={"epochs": 1})) == 0
    assert victim.name in capsys.readouterr().err


def test_teachers_never_leak_into_the_student(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    before = sha256_of(teacher)
    assert train(tiny_config(scenes, tmp_path / "run", **distilling(teacher), training={"epochs": 1})) == 0
    kept = set(load_file(tmp_path / "run/student.safetensors"))
    assert kept == set(load_sam(tmp_path / "run").state_dict())
    assert sha256_of(teacher) == before


def test_a_tap_the_teacher_lacks_stops_before_the_first_step(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    config = tiny_config(scenes, tmp_path / "run", **distilling(teacher, encoder_patch={"teacher_tap": "blocks.30"}))
    with pytest.raises(SamletError, match=r"blocks\.30"):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_decoder_is_taken_over_from_the_teacher(scenes: Path, tmp_path: Path) -> None:
    donor = write_teacher(tmp_path / "donor.pt", seed=5, kind="vit_t", **STUDENT)
    config = tiny_config(scenes, tmp_path / "run", model={"decoder_checkpoint": str(donor)})
    torch.manual_seed(0)
    student, source = config.model.build(), load_sam(donor, image_size=IMAGE_SIZE)
    for name, value in student.state_dict().items():
        if name.startswith(("prompt_encoder.", "mask_decoder.")):
            assert torch.equal(value, source.state_dict()[name]), name
    neck = "image_encoder.neck.0.weight"
    assert not torch.equal(student.get_parameter(neck), source.get_parameter(neck))


def test_bf16_trains_on_a_cpu(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "run"
    training = {"epochs": 1, "precision": "bf16"}
    assert train(tiny_config(scenes, out, **distilling(teacher), training=training)) == 0
    assert all(value.dtype != torch.bfloat16 for value in load_file(out / "student.safetensors").values())


def test_fp16_needs_a_gpu(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(SamletError, match="fp16 needs a CUDA GPU"):
        train(tiny_config(scenes, tmp_path / "run", training={"precision": "fp16"}))


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    from samlet.engine.signals import listen_for_stop

    child = os.fork()
    if not child:
        with listen_for_stop():
            for _ in range(2):
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(0.2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
