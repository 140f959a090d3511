"""Measurements that are cut off go on, and only where nothing that they depend on has changed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samlet.data import EvalImage
from samlet.engine.kept_measurements import Arrays, KeptMeasurements
from samlet.models.amg import AutomaticMaskGenerator
from samlet.recipes.evaluate_everything import evaluate_everything
from samlet.recipes.tune_amg import tune_amg
from tests.tiny import IMAGE_SIZE, STUDENT, add_found_objects, write_scenes, write_teacher

FACTS = {"weights": "abc", "settings": {"points_per_side": 3}}


def image_of(value: int = 0, objects: int = 1) -> EvalImage:
    return EvalImage(
        image_id="a",
        image=np.full((4, 6, 3), value, np.uint8),
        masks=np.ones((objects, 4, 6), np.bool_),
        points=np.zeros((objects, 2), np.float32),
        boxes=np.zeros((objects, 4), np.float32),
    )


def found() -> Arrays:
    return {"iou": np.arange(6.0).reshape(3, 2), "seconds": np.array(0.5), "none": np.zeros((0, 4), np.float32)}


def refused() -> Arrays:
    pytest.fail("was measured already")


def test_what_was_found_is_not_measured_again(tmp_path: Path) -> None:
    kept = KeptMeasurements(tmp_path / "u", FACTS)
    for measure in (found, refused):
        arrays = kept.of(image_of(), measure)
        assert {name: (array.dtype, array.tolist()) for name, array in arrays.items()} == {
            name: (array.dtype, array.tolist()) for name, array in found().items()
        }
    assert KeptMeasurements(tmp_path / "u", dict(reversed(FACTS.items()))).of(image_of(), refused)


@pytest.mark.parametrize(
    ("facts", "item"),
    [
        (FACTS, image_of(value=1)),
        (FACTS, image_of(objects=2)),
        ({**FACTS, "weights": "abd"}, image_of()),
        ({**FACTS, "settings": {"points_per_side": 4}}, image_of()),
    ],
)
def test_of_something_else_it_is(tmp_path: Path, facts: dict[str, Any], item: EvalImage) -> None:
    KeptMeasurements(tmp_path, FACTS).of(image_of(), found)
    other = {"iou": np.ones(1)}
    assert KeptMeasurements(tmp_path, facts).of(item, lambda: other) is other


@pytest.mark.parametrize("kept_bytes", [0, 10, 400])
def test_a_damaged_file_is_measured_again(tmp_path: Path, kept_bytes: int) -> None:
    kept = KeptMeasurements(tmp_path, FACTS)
    kept.of(image_of(), found)
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:kept_bytes])
    assert kept.of(image_of(), found)["iou"].tolist() == found()["iou"].tolist()
    assert len(file.read_bytes()) == len(whole)
    place = whole.index(found()["iou"].tobytes())
    file.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    assert kept.of(image_of(), found)["iou"].tolist() == found()["iou"].tolist()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=3)


class Finds:
    """`AutomaticMaskGenerator.find`, counted, and cut off at one of its calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls, self.last = 0, -1
        real = AutomaticMaskGenerator.find

        def find(generator: AutomaticMaskGenerator, image: np.ndarray) -> Any:
            self.calls += 1
            if self.calls == self.last:
                raise KeyboardInterrupt
            return real(generator, image)

        patch.setattr(AutomaticMaskGenerator, "find", find)


def test_everything_that_was_cut_off_goes_on_and_says_the_same(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_teacher(tmp_path / "base.pt", kind="vit_t", **STUDENT)
    loose: dict[str, Any] = {
        "points_per_side": 3,
        "pred_iou_thresh": -9.0,
        "stability_score_thresh": 0.0,
        "image_size": IMAGE_SIZE,
    }
    monkeypatch.setattr("samlet.engine.everything.time.perf_counter", lambda: 0.0)

    def measure(out: str) -> dict[str, Any]:
        return evaluate_everything([str(weights)], scenes, out=tmp_path / out, device="cpu", **loose)

    whole = measure("whole")
    finds = Finds(monkeypatch)
    finds.last = 3
    with pytest.raises(KeyboardInterrupt):
        measure("cut")
    assert measure("cut") == whole
    assert finds.calls == 4  # two, the one that was cut off, and the third image
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for name in ("everything.json", "everything.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tuning_that_was_cut_off_goes_on_and_chooses_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_teacher(tmp_path / "base.pt", kind="vit_t", **STUDENT)
    scenes = add_found_objects(write_scenes(tmp_path / "scenes", train=1, val=3), weights)

    def tuned(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        weights = write_teacher(tmp_path / name / "base.pt", kind="vit_t", **STUDENT)
        report = tune_amg(str(weights), scenes, image_size=IMAGE_SIZE, device="cpu", points_per_side=3)
        return {key: value for key, value in report.items() if key != "path"}

    whole = tuned("whole")
    finds = Finds(monkeypatch)
    finds.last = 2
    with pytest.raises(KeyboardInterrupt):
        tuned("cut")
    assert tuned("cut") == whole
    assert finds.calls == 4
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"base.pt", "base.amg.json", "base.amg.png"}


@pytest.mark.parametrize("image", [2, 3])
@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_a_signal_ends_it_between_two_images_and_says_so(
    command: str, image: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_teacher(tmp_path / "base.pt", kind="vit_t", **STUDENT)
    scenes = add_found_objects(write_scenes(tmp_path / "scenes", train=1, val=3), weights)
    given: dict[str, Any] = {"points_per_side": 3, "image_size": IMAGE_SIZE, "device": "cpu"}

    def measure() -> None:
        if command == "tune":
            tune_amg(str(weights), scenes, **given)
        else:
            evaluate_everything([str(weights)], scenes, out=tmp_path / "out", **given)

    finds = Finds(monkeypatch)
    real = KeptMeasurements.of

    def of_and_a_signal(kept: KeptMeasurements, *given: Any) -> Any:
        found = real(kept, *given)
        if finds.calls == image:
            signal.raise_signal(signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(KeptMeasurements, "of", of_and_a_signal)
        with pytest.raises(SystemExit) as stop:
            measure()
    assert stop.value.code == 143
    assert "stopped; the same command goes on from here" in capfd.readouterr().err
    assert finds.calls == image
    measure()
    assert finds.calls == 3
