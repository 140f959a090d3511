"""`samlet check-data`: what it says, what it draws, and its exit code; torch stays out of it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from samlet.cli import app
from samlet.data.splits import train_split, val_split
from samlet.errors import DataError
from samlet.recipes.check_data import check_data
from tests.data.builders import config, picture, save, write_small, write_split
from tests.data.test_formats import DISCS, annotation, coco, entry, uncompressed


def _run(path: Path, **more: object) -> tuple[int, str, Path]:
    text, sheet = io.StringIO(), path.parent / "out" / "sheet.png"
    code = check_data(path, sheet=sheet, console=Console(file=text, width=120), **more)  # type: ignore[arg-type]
    return code, text.getvalue(), sheet


def test_a_sound_set_is_counted_and_drawn(tmp_path: Path) -> None:
    code, text, sheet = _run(write_small(tmp_path / "data", train=4))
    assert code == 0
    for word in (
        "mask_folders",
        "train",
        "val",
        "18",
        "64 / 64 / 64",
        "PNG RGB",
        "0/255 (L)",
        "can use all",
        str(sheet),
    ):
        assert word in text, word
    drawn = Image.open(sheet)
    assert drawn.format == "PNG"
    assert drawn.width > 1000
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 1000


def test_what_training_refuses_is_named_and_exits_2(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    (root / "train" / "images" / "im001.png").write_bytes(b"")
    save(picture(), root / "val" / "images" / "BARE.PNG")
    code, text, _ = _run(root, json=tmp_path / "report.json")
    assert code == 2
    for word in ("Training refuses", "im001.png", "0 bytes", "BARE.PNG", "upper-case", "has no masks", "2 file(s)"):
        assert word in text, word
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["refused"]
    assert {Path(problem["path"]).name for problem in report["problems"]} == {"im001.png", "BARE.PNG"}
    (root / "train" / "images" / "im001.png").unlink()
    for mask in (root / "train" / "masks" / "im001").iterdir():
        mask.unlink()
    assert _run(root)[0] == 2
    assert _run(root, unlabelled="use")[0] == 0


def test_one_split_and_one_file_can_be_checked(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    assert _run(root / "train")[0] == 0
    with pytest.raises(DataError, match="no such file or folder"):
        _run(root / "absent")


def test_what_is_no_data_set_is_told_in_one_sentence(tmp_path: Path) -> None:
    for name in ("empty", "data/train", "data/val"):
        (tmp_path / name).mkdir(parents=True)
    save(picture(), tmp_path / "photo.png")
    (tmp_path / "sam.pth").write_bytes(b"x")
    for name, reason in (
        ("absent", "no such file or folder"),
        ("empty", "there is no image in it"),
        ("data", "there is no image in it"),
        ("photo.png", "is a single image"),
        ("sam.pth", "is neither a folder nor annotations in JSON"),
    ):
        text, sheet = io.StringIO(), tmp_path / "sheet.png"
        with pytest.raises(DataError) as caught:
            check_data(tmp_path / name, sheet=sheet, console=Console(file=text))
        remedy = "name the folder that holds train/ and val/, or images/ and masks/"
        assert str(caught.value) == f"{tmp_path / name}: {reason}; {remedy}"
        assert (text.getvalue(), sheet.exists()) == ("", False)


def _only_val(root: Path) -> None:
    write_split(root / "val", images=3)


def _one_image(root: Path) -> None:
    write_split(root, images=1)


def _bare_val(root: Path) -> None:
    write_split(root / "train", images=3)
    save(picture(seed=9), root / "val" / "images" / "a.png")


def _bare_train(root: Path) -> None:
    write_split(root / "val", images=1)
    save(picture(seed=9), root / "train" / "images" / "a.png")


STRUCTURES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "only val": (_only_val, {}, "there is no image that can be used"),
    "a single image": (_one_image, {}, "all of which validation takes"),
    "bare val": (_bare_val, {"unlabelled": "use"}, "no image of the validation split 'val' has masks"),
    "bare train": (_bare_train, {"unlabelled": "drop"}, "no image of the training split 'train' has masks"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_splits_that_training_refuses_exit_2_though_every_file_is_sound(tmp_path: Path, name: str) -> None:
    write, options, reason = STRUCTURES[name]
    write(tmp_path / "data")
    code, text, _ = _run(tmp_path / "data", **options)
    assert code == 2
    assert text.count(reason) == 1
    assert "Training cannot start" in text
    assert "can use all" not in text
    settings = config(tmp_path / "data", **options)
    with pytest.raises(DataError, match=reason):
        (val_split if name == "bare val" else train_split)(settings, 0)


def test_a_file_at_fault_is_not_blamed_on_the_splits_as_well(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data", val=1)
    (root / "val" / "images" / "im000.png").write_bytes(b"x")
    code, text, _ = _run(root)
    assert code == 2
    assert "1 file(s) stop training" in text
    assert "no image" not in text


def test_what_is_wrong_with_the_test_split_stops_no_training(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    save(picture(seed=8), root / "test" / "images" / "bare.png")
    (root / "test" / "images" / "broken.png").write_bytes(b"x")
    code, text, _ = _run(root)
    assert code == 0
    assert "bare.png" in text
    assert "broken.png" in text
    config(root).build_val(seed=0)


def test_a_damaged_test_json_stops_no_training(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    save(picture(seed=8), root / "test" / "a.png")
    (root / "test.json").write_text('{"images": [')
    code, text, _ = _run(root)
    assert code == 0
    assert f"{root / 'test.json'}: is not JSON" in text
    for split in ("train", "val"):
        shutil.rmtree(root / split)
    with pytest.raises(DataError, match=r"test\.json: is not JSON"):
        _run(root)


def test_images_without_masks_may_be_left_out(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    save(picture(seed=8), root / "train" / "images" / "bare.png")
    assert _run(root)[0] == 2
    code, text, _ = _run(root, unlabelled="drop")
    assert code == 0
    assert "it is left out" in text
    arguments = ["check-data", str(root), "--unlabelled", "drop", "--sheet", str(tmp_path / "cli.png")]
    assert CliRunner().invoke(app, arguments).exit_code == 0


@pytest.mark.parametrize("size", ["0", "31", "-1"])
def test_an_input_size_that_no_model_has(tmp_path: Path, size: str) -> None:
    done = CliRunner().invoke(app, ["check-data", str(write_small(tmp_path / "data")), "--image-size", size])
    assert done.exit_code == 2
    assert "image-size" in done.output


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_a_split_under_another_name_is_said(tmp_path: Path, name: str) -> None:
    root = write_small(tmp_path / "data")
    (root / "val").rename(root / name)
    code, text, _ = _run(root)
    assert code == 0
    assert f"{root / name}: is taken as the split 'val'" in text


def test_folders_of_images_in_no_split_are_said(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    save(picture(seed=8), root / "more" / "deep" / "a.png")
    save(picture(seed=8), root / ".cache" / "a.png")
    (root / "notes").mkdir()
    code, text, _ = _run(root)
    assert code == 0
    assert f"{root / 'more'}: holds images that belong to no split" in text
    assert text.count("belong to no split") == 1


def test_an_annotation_file_can_be_checked(tmp_path: Path) -> None:
    save(picture(), tmp_path / "data" / "images" / "val2017" / "a.png")
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    coco(file, [entry()], [annotation(uncompressed(DISCS[0]))])
    code, text, _ = _run(file)
    assert code == 0, text


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    (root / "train" / "images" / "[red]x[-1].png").write_bytes(b"x")
    code, text, _ = _run(root)
    assert code == 2
    assert "[red]x[-1].png" in text


def test_a_real_set_is_sound(shared: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    code = check_data(
        shared / "data" / "potholes", sheet=tmp_path / "s.png", console=Console(file=text, width=120), image_size=256
    )
    assert code == 0
    assert "it could be read as coco as well" in text.getvalue().replace("\n", " ")


def test_checking_data_imports_no_torch(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data", train=1, val=1)
    code = (
        "import sys; from pathlib import Path\n"
        "import samlet.data, samlet.data.configs, samlet.data.synthetic, samlet.data.prompts, samlet.data.transforms\n"
        "import samlet.data.splits, samlet.data.sampler\n"
        "from samlet.recipes.check_data import check_data\n"
        f"code = check_data(Path({str(root)!r}), sheet=Path({str(tmp_path / 'sheet.png')!r}))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("bare", "broken", "said"),
    [
        (True, False, "2 file(s) stop training; set dataset.unlabelled to use if a teacher is to supervise them"),
        (False, True, "1 file(s) stop training; mend them, or set dataset.broken to skip and have them counted."),
        (True, True, "dataset.broken to skip and have them counted; for the 2 without masks set dataset.unlabelled"),
    ],
)
def test_the_verdict_names_the_remedy_that_helps(tmp_path: Path, bare: bool, broken: bool, said: str) -> None:
    root = write_small(tmp_path / "data")
    if bare:
        for name in ("x.png", "y.png"):
            save(picture(seed=ord(name[0])), root / "train" / "images" / name)
    if broken:
        (root / "val" / "images" / "im000.png").write_bytes(b"")
    code, text, _ = _run(root)
    assert code == 2
    assert said in text
    assert ("dataset.broken" in text) is broken


def test_one_annotation_file_for_all_splits_is_checked_and_trains(tmp_path: Path) -> None:
    root = tmp_path / "data"
    images = [{**entry(), "id": number, "file_name": f"{number}.png"} for number in range(3)]
    masks = [{**annotation(uncompressed(DISCS[0])), "id": number, "image_id": number} for number in range(3)]
    for number in range(3):
        save(picture(seed=number), root / "images" / ("val" if number == 2 else "train") / f"{number}.png")
    coco(root / "annotations.json", images, masks)
    code, text, _ = _run(root)
    assert (code, "Training can use all of it." in text) == (0, True)
    assert [record.image_id for record in train_split(config(root), 0).records] == ["0", "1"]
    assert [record.image_id for record in val_split(config(root), 0).records] == ["2"]
