"""The doctor on whole runs of seconds: what it sees, and that it leaves and changes nothing."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from samlet.cli import app
from samlet.config import RunConfig
from samlet.distill.teacher import LiveTeacher
from samlet.engine.diagnosis import StepTimes
from samlet.engine.diagnosis_page import show
from samlet.engine.parts import set_trainable
from samlet.engine.step import TrainStep
from samlet.errors import SamletError
from samlet.extraction import Extractor, job_of
from samlet.losses import dice
from samlet.models import Sam, load_sam
from samlet.recipes import train as loop
from samlet.recipes.doctor import doctor, examine, seconds_of_step, without_nan
from samlet.recipes.train import train
from samlet.run import plain_config
from tests.tiny import tiny_config, write_scenes, write_teacher


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


def distilling(scenes: Path, out: Path, teacher: Path, **blocks: Any) -> RunConfig:
    terms = {"encoder_patch": {"enable": True}, "dense_mask_logits": {"enable": True}}
    return tiny_config(
        scenes,
        out,
        **{
            "distillation": {"enable": True, "lambda_coef": 2.0, **terms},
            "teachers": [{"name": "T", "checkpoint": str(teacher)}],
            **blocks,
        },
    )


def test_it_sees_every_term_where_it_goes_and_what_it_costs(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    config = distilling(scenes, tmp_path / "run", teacher, training={"freeze": ["prompt_encoder"]})
    report = examine(config, tmp_path)
    (stage,) = report["stages"]
    assert len(stage["batches"]) == 2
    for batch in stage["batches"]:
        terms = batch["terms"]
        assert set(terms) == {
            "task/focal",
            "task/dice",
            "task/iou",
            "distill/encoder_patch",
            "distill/dense_mask_logits",
        }
        assert terms["distill/encoder_patch"]["weighted"] == pytest.approx(2 * terms["distill/encoder_patch"]["raw"])
        assert terms["distill/encoder_patch"]["gradients"]["image_encoder"] > 0
        assert terms["distill/encoder_patch"]["gradients"]["mask_decoder"] == 0
        assert terms["distill/dense_mask_logits"]["gradients"]["mask_decoder"] > 0
        assert all(term["gradients"]["prompt_encoder"] == 0 for term in terms.values())  # it is frozen
        assert all(term["milliseconds"] > 0 for term in terms.values())
        assert 0 <= batch["student_iou"] <= 1
        assert set(batch["teacher_iou"]) == {"T"}
    assert all(stage["milliseconds"][part] > 0 for part in ("data", "teacher", "student", "backward", "optimizer"))
    assert stage["moved"] == []
    assert stage["frozen"] > 0
    assert report["memory"]["peak_rss_bytes"] > 2**20
    assert report["predicted_seconds"]["validation_count"] == 2
    assert report["run"]["steps"] == 6


def test_the_first_batch_is_the_one_that_training_logs(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    config = distilling(scenes, tmp_path / "run", teacher)
    report = examine(config, tmp_path / "doctor")
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for batch, row in zip(report["stages"][0]["batches"], rows, strict=False):
        for name, term in batch["terms"].items():
            assert term["raw"] == pytest.approx(row[name], rel=1e-5)
            assert term["weighted"] == pytest.approx(row[f"{name}/weighted"], rel=1e-5)
    assert report["stages"][0]["grad_norms"] == pytest.approx([row["grad_norm"] for row in rows[:2]], rel=1e-5)


def test_it_leaves_nothing_and_the_run_is_the_same_after_it(
    scenes: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    config = distilling(scenes, tmp_path / "run", teacher)
    with patch("tempfile.tempdir", str(temporary)):
        assert doctor(config) == 0
    assert not (tmp_path / "run").exists()
    assert list(temporary.glob("samlet*")) == []  # torch may make its compiler's folder there
    assert train(config) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert doctor(config) == 0  # beside a finished run
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert train(distilling(scenes, tmp_path / "alone", teacher)) == 0
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert "image_encoder" in capsys.readouterr().out


def test_a_batch_norm_that_drifts_is_an_error(scenes: Path, tmp_path: Path, capsys: Any) -> None:
    def drifting(student: Sam, frozen: Any, batch_norm: str) -> None:
        set_trainable(student, frozen, batch_norm)
        for layer in student.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.training = True  # whatever was asked for

    with patch("samlet.recipes.train.set_trainable", drifting):
        assert doctor(tiny_config(scenes, tmp_path / "run")) == 2
        shown = " ".join(capsys.readouterr().out.split())
        assert "running_mean, image_encoder" in shown
        assert "more: frozen, but moved" in shown
        assert doctor(tiny_config(scenes, tmp_path / "run", model={"batch_norm": "train"})) == 0


def test_a_frozen_part_that_trains_is_an_error(scenes: Path, tmp_path: Path) -> None:
    def forgetful(student: Sam, frozen: Any, batch_norm: str) -> None:
        set_trainable(student, (), batch_norm)

    config = tiny_config(scenes, tmp_path / "run", training={"freeze": ["mask_decoder"]})
    with patch("samlet.recipes.train.set_trainable", forgetful):
        report = examine(config, tmp_path)
    assert report["stages"][0]["moved"]
    assert all(name.startswith("mask_decoder.") for name in report["stages"][0]["moved"])
    assert examine(config, tmp_path / "again")["stages"][0]["moved"] == []


def test_a_frozen_parameter_that_is_stepped_on_is_an_error(scenes: Path, tmp_path: Path) -> None:
    real = loop.optimizer_step

    def careless(run: Any, window: Any) -> Any:
        row = real(run, window)
        with torch.no_grad():
            run.student.prompt_encoder.no_mask_embed.weight.add_(1e-3)
        return row

    config = tiny_config(scenes, tmp_path / "run", training={"freeze": ["prompt_encoder"]})
    with patch.object(loop, "optimizer_step", careless):
        report = examine(config, tmp_path)
    assert report["stages"][0]["moved"] == ["prompt_encoder.no_mask_embed.weight"]
    assert not report["healthy"]


def test_a_term_without_effect_is_an_error(scenes: Path, tmp_path: Path, teacher: Path, capsys: Any) -> None:
    config = distilling(scenes, tmp_path / "run", teacher, training={"freeze": ["image_encoder"]})
    assert doctor(config) == 2
    assert "error: distill/encoder_patch: has a weight and a value, but moves nothing" in capsys.readouterr().out


def test_a_non_finite_term_is_named(scenes: Path, tmp_path: Path, capsys: Any) -> None:
    def broken(*given: Any) -> Any:
        return real(*given) * float("nan")

    real = dice.dice_per_mask
    with patch("samlet.losses.task.dice_per_mask", broken):
        assert doctor(tiny_config(scenes, tmp_path / "run"), as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["stages"][0]["batches"][0]["terms"]["task/dice"]["raw"] is None
    assert "task/dice not finite" in report["findings"][0]["text"]


def test_stages_are_seen_one_by_one(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    stages = [
        {"name": "alone", "distillation": {"enable": False}},
        {"name": "taught", "training": {"epochs": 1}},
    ]
    report = examine(distilling(scenes, tmp_path / "run", teacher, stages=stages), tmp_path)
    assert [stage["stage"] for stage in report["stages"]] == ["alone", "taught"]
    alone, taught = (set(stage["batches"][0]["terms"]) for stage in report["stages"])
    assert taught - alone == {"distill/encoder_patch", "distill/dense_mask_logits"}
    assert report["run"]["steps"] == 9


def test_a_step_is_all_of_its_micro_batches(
    scenes: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"batch_size": 1, "accumulation": 3}
    config = distilling(scenes, tmp_path / "run", teacher, training=training)
    real, seconds = TrainStep.forward, 0.05

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return real(*given)

    with patch.object(TrainStep, "forward", slow):
        report = examine(config, tmp_path / "doctor")
    (stage,) = report["stages"]
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert stage["grad_norms"] == pytest.approx([row["grad_norm"] for row in rows[:2]], rel=1e-5)
    taken = stage["milliseconds"]
    assert taken["student"] > 3 * 1000 * seconds
    assert all(taken[part] > 0 for part in ("data", "teacher", "backward", "optimizer"))
    assert stage["seconds"] == pytest.approx(4 * sum(taken.values()) / 1000)
    show(report)
    shown = capsys.readouterr().out
    assert "one step of 3 micro-batches" in shown
    assert "mean of 2 micro-batches" in shown


def test_the_whole_run_is_steps_validations_and_checkpoints(scenes: Path, tmp_path: Path) -> None:
    def saved(run: Any) -> None:
        time.sleep(0.2)
        real(run)

    real = loop.save
    stages = [{"name": "one", "training": {"max_steps": 5}}, {"name": "two", "training": {"max_steps": 4}}]
    blocks = {"validation": {"every_steps": 4}, "checkpoint": {"every_steps": 3}, "stages": stages}
    config = tiny_config(scenes, tmp_path / "run", **blocks)
    with patch.object(loop, "save", saved):
        report = examine(config, tmp_path / "doctor")
    predicted = report["predicted_seconds"]
    assert [stage["validations"] for stage in report["stages"]] == [2, 1]  # after 4, 5; 9
    assert [stage["checkpoints"] for stage in report["stages"]] == [3, 2]  # after 3, 4, 5; 6, 9
    assert predicted["checkpoint_count"] == 5
    assert predicted["checkpoints"] > 5 * 0.2
    parts = ("steps", "validations", "checkpoints")
    assert predicted["whole"] == pytest.approx(sum(predicted[part] for part in parts))
    written: list[int] = []
    with patch.object(loop, "save", lambda run: written.append(run.state.step)):
        assert train(config) == 0
    assert written == [3, 4, 5, 6, 9]


def test_the_time_of_a_step_knows_workers() -> None:
    times = StepTimes(data=4.0, teacher=1.0, student=0.5, backward=0.5, optimizer=0.25)
    assert seconds_of_step(times, 0) == 6.25
    with patch("os.cpu_count", lambda: 8):
        assert seconds_of_step(times, 1) == 4.25
        assert seconds_of_step(times, 4) == 2.25


def test_the_command_prints_json_and_nothing_else(scenes: Path, tmp_path: Path, teacher: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(plain_config(distilling(scenes, tmp_path / "run", teacher))))
    done = CliRunner().invoke(app, ["doctor", str(file), "training.batch_size=3", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["run"]["batch_size"] == 3


def test_what_training_refuses_it_refuses(scenes: Path, tmp_path: Path) -> None:
    config = tiny_config(scenes, tmp_path / "run", training={"precision": "fp16"})
    with pytest.raises(SamletError, match="fp16 needs a CUDA GPU"):
        doctor(config)


def test_null_stands_for_what_json_cannot_say() -> None:
    assert without_nan({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}) == {"a": [None, 1.0], "b": {"c": None}}


def reading_a_store(scenes: Path, out: Path, teacher: Path, dtype: str, *, written_by: Path | None = None) -> RunConfig:
    """A run whose store was just extracted, by another teacher under this one's identity where `written_by` says so."""
    config = distilling(
        scenes,
        out,
        teacher,
        distillation={
            "enable": True,
            "use_precomputed_features": True,
            "precomputed_root": str(out.parent / "stores"),
            "encoder_patch": {"teacher_tap": "blocks.0", "student_tap": "blocks.-1", "projection": "learnt"},
        },
        extraction={"dtype": dtype},
        augmentation={"horizontal_flip": 0.0, "scale": [1.0, 1.0], "brightness": 0.5},
    )
    job = job_of(config, config.teachers[0], config.store_of(config.teachers[0]))
    extractor = Extractor(job)
    if written_by is not None:
        other = load_sam(written_by, image_size=config.model.image_size)
        extractor.teacher = LiveTeacher("T", other, extractor.identity.taps)
    for shard in extractor.shards:
        extractor.extract(shard, lambda: None)
    return config


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_a_store_is_compared_with_its_live_teacher(
    scenes: Path, tmp_path: Path, teacher: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = reading_a_store(scenes, tmp_path / "run", teacher, dtype)
    report = examine(config, tmp_path / "doctor")
    (store,) = report["stores"]
    assert set(store["differences"]) == {"embedding", "blocks.0"}
    assert all(difference <= store["allowed"] for difference in store["differences"].values())
    assert report["healthy"]
    show(report)
    assert re.search(rf"teacher T: stored = live to \S+ \({dtype}\)", capsys.readouterr().out)


def test_a_store_of_another_teacher_under_this_ones_name_is_found(
    scenes: Path, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_teacher(tmp_path / "other.pth", seed=5)
    config = reading_a_store(scenes, tmp_path / "run", teacher, "fp16", written_by=other)
    assert doctor(config) == 2
    shown = capsys.readouterr().out
    assert "error: teacher T: embedding in " in shown
    assert "remove that folder and run samlet extract" in shown


def test_a_store_of_pictures_decoded_in_full_is_not_one_of_smaller_ones(
    scenes: Path, tmp_path: Path, teacher: Path
) -> None:
    config = reading_a_store(scenes, tmp_path / "run", teacher, "fp16")
    dataset = config.dataset.model_copy(update={"scaled_decode": True})
    with pytest.raises(SamletError, match=r"preprocessing.*scaled decode"):
        doctor(config.model_copy(update={"dataset": dataset}))
