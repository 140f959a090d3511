"""`samlet masks`: one COCO file, label images and overlays; killed, started again, and never anything but its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from samlet import cli
from samlet.data.images import read_image
from samlet.data.opening import open_split
from samlet.engine import automatic_masks
from samlet.errors import SamletError
from samlet.models import load_sam
from samlet.models.amg import AmgSettings, AutomaticMaskGenerator, save_tuned
from samlet.recipes.check_data import check_data
from samlet.recipes.masks import label_map, masks
from tests.distill.automatic import block
from tests.distill.test_pseudo_labels import SIZE, kept
from tests.tiny import write_teacher

EASY: dict[str, Any] = {
    "points_per_side": 3,
    "pred_iou_thresh": -1.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which only a power cut would notice


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of three sizes; two share a stem in different folders, two in one."""
    for number, name in enumerate(("a.jpg", "sub/a.jpg", "b.png", "b.jpg")):
        place = tmp_path / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        size = (40, 56 - 8 * (number // 2), 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, size, np.uint8)).save(place)
    return tmp_path / "images"


def run(weights: Path, images: Path, out: Path, **options: Any) -> int:
    thresholds = {**EASY, **options.pop("thresholds", {})}
    options = {"plain": True, "overlays": False, **options}
    return masks(weights, images, out=out, thresholds=thresholds, image_size=64, device="cpu", **options)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(place for place in folder.rglob("*") if place.is_file() and place.name != ".lock")
    return {place.relative_to(folder).as_posix(): place.read_bytes() for place in files}


@contextmanager
def searched() -> Iterator[list[str]]:
    """The images whose masks are found meanwhile."""
    names, real = list[str](), automatic_masks.compute

    def compute(asked: Any, *rest: Any) -> Any:
        names.append(asked.item.image.name)
        return real(asked, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic_masks, "compute", compute)
        yield names


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own
def test_the_coco_file_says_what_the_generator_found(weights: Path, images: Path, tmp_path: Path) -> None:
    assert run(weights, images, tmp_path / "out") == 0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "out" / "masks.json")
    assert [entry["file_name"] for entry in coco.imgs.values()] == ["a.jpg", "b.jpg", "b.png", "sub/a.jpg"]
    generator = AutomaticMaskGenerator.of(load_sam(weights, image_size=64), AmgSettings(**EASY, fast=False))
    total = 0
    for image_id, entry in coco.imgs.items():
        found = generator.find(read_image(images / entry["file_name"]))
        assert (entry["height"], entry["width"]) == found.size
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(found.rles) > 1
        assert [annotation["label"] for annotation in annotations] == list(range(1, len(annotations) + 1))
        for number, annotation in enumerate(annotations):
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"] == found.area[number]
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation["predicted_iou"] == pytest.approx(float(found.predicted_iou[number]), abs=1e-6)
            assert annotation["stability_score"] == pytest.approx(float(found.stability_score[number]), abs=1e-6)
            np.testing.assert_allclose(annotation["point_coords"], [found.points[number]])
            total += 1
    assert total == len(coco.anns)


def test_training_and_check_data_read_it(weights: Path, images: Path, tmp_path: Path) -> None:
    (images / "b.png").unlink()  # training wants one name for one image
    assert run(weights, images, tmp_path / "out") == 0
    shutil.copy(tmp_path / "out" / "masks.json", images / "annotations.json")
    assert check_data(images, sheet=tmp_path / "sheet.png") in (0, 2)  # 2: tiny random masks
    data = open_split(images)
    assert [item.image_id for item in data] == ["a", "b", "sub/a"]
    assert all(len(item.masks) > 1 for item in data)


def test_labels_and_overlays_lie_under_names_of_their_own(weights: Path, images: Path, tmp_path: Path) -> None:
    before = contents(images)
    assert run(weights, images, images / "found", overlays=True) == 0
    written = contents(images / "found")
    expected = ["a.png", "b.jpg.png", "b.png.png", "sub/a.png"]
    for folder in ("labels", "overlays"):
        assert [name for name in written if name.startswith(folder)] == [f"{folder}/{name}" for name in expected]
    with Image.open(images / "found" / "labels" / "sub" / "a.png") as picture:
        assert (picture.mode, picture.size) == ("I;16", (56, 40))
    assert run(weights, images, images / "found", overlays=True) == 0  # its own pictures are no images to it
    assert contents(images / "found") == written
    assert {name: content for name, content in contents(images).items() if not name.startswith("found")} == before


def test_smaller_masks_lie_above_larger_ones(tmp_path: Path) -> None:
    small, large, hidden = block(SIZE, 2, 2, 6, 6), block(SIZE, 0, 0, 20, 10), block(SIZE, 2, 2, 6, 5)
    labels = label_map(kept(tmp_path, [small, large, hidden]))
    assert labels.dtype == np.uint16
    assert (labels[3, 3], labels[5, 3], labels[9, 9], labels[15, 25]) == (3, 1, 2, 0)


def test_what_is_there_is_kept_and_what_has_changed_is_found_anew(weights: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with searched() as names:
        assert run(weights, images, out) == 0
    assert names == ["a.jpg", "b.jpg", "b.png", "a.jpg"]
    first = contents(out)
    with searched() as names:
        assert run(weights, images, out) == 0
    assert (names, contents(out)) == ([], first)

    Image.fromarray(np.full((40, 56, 3), 90, np.uint8)).save(images / "a.jpg")
    part = out / "parts" / "b.png.json"
    part.write_text(part.read_text().replace("1", "2", 1))
    with searched() as names:
        assert run(weights, images, out) == 0
    assert names == ["a.jpg", "b.png"]
    assert contents(out)["labels/b.png.png"] == first["labels/b.png.png"]
    assert contents(out)["labels/a.png"] != first["labels/a.png"]

    with searched() as names:
        assert run(weights, images, out, thresholds={"points_per_side": 2}) == 0
    assert len(names) == 4
    with searched() as names:
        other = write_teacher(tmp_path / "other.pth", seed=7)
        assert run(other, images, out, thresholds={"points_per_side": 2}) == 0
    assert len(names) == 4


def test_pictures_are_always_those_of_the_masks(weights: Path, images: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    (images / "b.png").unlink()
    (images / "b.jpg").unlink()
    assert run(weights, images, out, overlays=True) == 0
    assert run(weights, images, out, thresholds={"points_per_side": 2}) == 0
    assert not list((out / "overlays").rglob("*.png"))  # the former ones showed other masks
    (out / "labels" / "a.png").unlink()
    with searched() as names:
        assert run(weights, images, out, thresholds={"points_per_side": 2}, overlays=True) == 0
    assert names == []
    assert run(weights, images, fresh, thresholds={"points_per_side": 2}, overlays=True) == 0
    assert contents(out) == contents(fresh)


def test_killed_at_any_moment_it_goes_on(weights: Path, images: Path, tmp_path: Path) -> None:
    assert run(weights, images, tmp_path / "calm") == 0
    script = (
        "import sys, torch; from tests.recipes.test_masks import run; from pathlib import Path; "
        "torch.set_num_threads(1); sys.exit(run(*map(Path, sys.argv[1:])))"
    )
    words = [sys.executable, "-c", script, str(weights), str(images), str(tmp_path / "out")]
    parts = tmp_path / "out" / "parts"
    for _ in range(2):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        there = len(list(parts.rglob("*.json")))
        while process.poll() is None and len(list(parts.rglob("*.json"))) == there:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (parts / ".a.jpg.json.1.2.tmp").write_text("half")
    with searched() as names:
        assert run(weights, images, tmp_path / "out") == 0
    assert len(names) < 4
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_a_signal_ends_it_between_two_images(weights: Path, images: Path, tmp_path: Path) -> None:
    real = automatic_masks.compute

    def compute(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic_masks, "compute", compute)
        assert run(weights, images, tmp_path / "out") == 143
    assert len(list((tmp_path / "out" / "parts").rglob("*.json"))) == 1
    assert not (tmp_path / "out" / "masks.json").exists()
    assert run(weights, images, tmp_path / "out") == 0


def test_a_broken_image_is_one_sentence_and_stops_no_other(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:200])
    (images / "notes.xyz").write_text("no image")
    assert run(weights, images, tmp_path / "out") == 2
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if str(images / "b.jpg") in line]
    assert "1 file(s) are not called like images" in said.out
    assert "on 3 of 4 images" in said.out
    listed = json.loads((tmp_path / "out" / "masks.json").read_text())["images"]
    assert [entry["file_name"] for entry in listed] == ["a.jpg", "b.png", "sub/a.jpg"]


def test_pictures_of_an_earlier_search_are_no_images(weights: Path, images: Path, tmp_path: Path) -> None:
    assert run(weights, images, images / "found", overlays=True) == 0
    assert run(weights, images, tmp_path / "out") == 0
    names = [entry["file_name"] for entry in json.loads((tmp_path / "out" / "masks.json").read_text())["images"]]
    assert names == ["a.jpg", "b.jpg", "b.png", "sub/a.jpg"]


def test_an_image_of_its_own(weights: Path, images: Path, tmp_path: Path) -> None:
    assert run(weights, images / "a.jpg", tmp_path / "out", overlays=True) == 0
    assert sorted(contents(tmp_path / "out")) == [
        *("labels/a.png", "masks.json", "overlays/a.png", "parts/a.jpg.json", "settings.json"),
    ]


def test_tuned_thresholds_are_taken_and_said(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned.pth"
    shutil.copy(weights, tuned)
    save_tuned(tuned, AmgSettings(**{**EASY, "points_per_side": 2, "pred_iou_thresh": 0.01}))
    given: dict[str, Any] = {"out": tmp_path / "out", "image_size": 64, "device": "cpu"}
    assert masks(tuned, images / "a.jpg", **given) == 0  # the fast search, for once
    assert "predicted IoU above 0.01, stability from 0, 2 x 2 points (tuned for this checkpoint)" in (
        capsys.readouterr().out
    )
    assert masks(tuned, images / "a.jpg", thresholds={"points_per_side": 1}, plain=True, **given) == 0
    assert "1 x 1 points (tuned for this checkpoint; points_per_side, fast as asked)" in capsys.readouterr().out
    used = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (used["points_per_side"], used["pred_iou_thresh"], used["fast"]) == (1, 0.01, False)


def test_what_is_not_its_own_is_never_written_over(weights: Path, images: Path, tmp_path: Path) -> None:
    for name in ("masks.json", "labels", "settings.json"):
        out = tmp_path / f"for {name}"
        (out / name).mkdir(parents=True)
        with pytest.raises(SamletError, match="was not written by `samlet masks`"):
            run(weights, images, out)
    with pytest.raises(SamletError, match=f"is a model, .* write samlet masks {weights} {images}"):
        run(images, weights, tmp_path / "out")
    with pytest.raises(SamletError, match="is the folder of the images"):
        run(weights, images, images)
    with pytest.raises(SamletError, match="is a file"):
        run(weights, images, images / "a.jpg")
    inside = tmp_path / "labels"
    shutil.move(images, inside)
    with pytest.raises(SamletError, match="lies where the results go"):
        run(weights, inside, tmp_path)
    with pytest.raises(SamletError, match="no such file"):
        run(weights, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SamletError, match="there is no image"):
        run(weights, tmp_path / "empty", tmp_path / "out")


def test_the_command(
    weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["samlet", "masks", str(weights), str(images / "a.jpg"), "--out", str(tmp_path / "out"), "--image-size"]
    words += ["64", "--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-thresh", "0", "--crop-layers"]
    words += ["1", "--min-area", "3", "--plain", "--no-overlays", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    used = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    asked = {"points_per_side": 2, "crop_n_layers": 1, "min_mask_region_area": 3, "fast": False}
    assert used == {**used, **asked, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    assert not (tmp_path / "out" / "overlays").exists()
    assert "masks on 1 of 1 images" in capsys.readouterr().out
