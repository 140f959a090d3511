"""P10: every one of some fifty broken or odd inputs is named with its reason; training takes none in silence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from samlet.data.configs import AugmentationConfig, PromptConfig
from samlet.data.inspection import inspect
from samlet.data.sampler import SampleKey
from samlet.errors import DataError
from tests.data.builders import config, disc, picture, save, write_split
from tests.data.test_formats import annotation, coco, entry, uncompressed
from tests.data.test_images import damaged

SIZE = (48, 64)
MASK = disc(SIZE, 30, 24, 12)
Break = Callable[[Path], object]  # spoils a sound split whose image is images/im000.png with masks/im000/0.png


def _image(place: Path) -> Path:
    return place / "images" / "im000.png"


def _mask(place: Path) -> Path:
    return place / "masks" / "im000" / "0.png"


def _replace(name: str) -> Break:
    """Put one of the damaged files in the image's place."""

    def spoil(place: Path) -> None:
        source = damaged(place)[name]
        content = source.read_bytes()
        for path in damaged(place).values():
            path.unlink(missing_ok=True)
        target = _image(place).with_suffix(source.suffix)
        _image(place).unlink()
        target.write_bytes(content)

    return spoil


def _soft(place: Path) -> None:
    save(np.asarray(Image.fromarray(MASK.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.7))), _mask(place))


def _turned(place: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(SIZE)).save(_image(place), exif=exif)


def _upper(place: Path) -> None:
    _image(place).rename(_image(place).with_suffix(".PNG"))


def _many_labels(place: Path) -> None:
    labels = np.zeros(SIZE, np.uint16)
    labels[:20, :20] = np.arange(1, 401).reshape(20, 20)
    save(labels, _mask(place))


REFUSED: dict[str, tuple[Break, str]] = {
    "truncated jpeg": (_replace("truncated.jpg"), "truncated"),
    "truncated png": (_replace("truncated.png"), "cut off|truncated"),
    "flipped byte": (_replace("flipped.png"), "checksum"),
    "0 bytes": (_replace("empty.jpg"), "0 bytes"),
    "html": (_replace("page.jpg"), "cannot"),
    "postscript": (_replace("script.png"), "cannot"),
    "bomb": (_replace("bomb.png"), "larger than"),
    "huge bomb": (_replace("huge.png"), "larger than"),
    "animated gif": (_replace("animated.gif"), "3 frames"),
    "animated png": (_replace("animated.png"), "3 frames"),
    "pages": (_replace("pages.tif"), "3 frames"),
    "floating point": (_replace("float.tif"), "floating-point"),
    "mask of another size": (lambda place: save(MASK[:-1], _mask(place)), "64 x 47"),
    "mask turned": (_turned, "EXIF"),
    "empty mask": (lambda place: save(np.zeros(SIZE, np.uint8), _mask(place)), "empty"),
    "truncated mask": (lambda place: _mask(place).write_bytes(_mask(place).read_bytes()[:60]), "cut off|truncated"),
    "labels as a mask": (lambda place: save(MASK * np.uint8(2) + np.uint8(1), _mask(place)), "instance_labels"),
    "over 255 ids in a mask": (_many_labels, "instance_labels"),
    "mask of no image": (lambda place: save(MASK, place / "masks" / "ghost" / "0.png"), "no image"),
    "twins": (lambda place: save(picture(), place / "images" / "im000.bmp"), "same name"),
    "link": (lambda place: os.symlink(__file__, place / "images" / "l.png"), "leads out"),
}

NOTED: dict[str, tuple[Break, str]] = {
    "cmyk": (lambda place: Image.fromarray(picture(SIZE)).convert("CMYK").save(_image(place), format="TIFF"), "CMYK"),
    "16 bit": (lambda place: save(picture(SIZE)[..., 0].astype(np.uint16) * 200, _image(place)), "I;16"),
    "palette": (lambda place: Image.fromarray(picture(SIZE)).quantize().save(_image(place)), "stored as P"),
    "alpha": (lambda place: Image.fromarray(picture(SIZE)).convert("RGBA").save(_image(place)), "RGBA"),
    "all ones": (lambda place: save(np.full(SIZE, 255, np.uint8), _mask(place)), "whole image"),
    "soft edges": (_soft, "soft edges"),
    "tiny": (lambda place: save(disc(SIZE, 9, 9, 0), _mask(place)), "under 9 pixels"),
    "upper case": (_upper, "upper-case"),
    "not an image": (lambda place: (place / "images" / "clip.mov").write_bytes(b"x"), "not called like an image"),
    "the same mask twice": (lambda place: save(MASK, place / "masks" / "im000" / "1.png"), "same mask"),
    "the same picture twice": (lambda place: save(picture(SIZE, 1), _image(place)), "same picture"),
}


@pytest.fixture
def split(tmp_path: Path) -> Path:
    place = write_split(tmp_path / "data" / "train", images=3, objects=1, size=SIZE)
    save(MASK, _mask(place))
    write_split(tmp_path / "data" / "val", images=1, seed=5)
    return place


def _first_pass(root: Path, broken: str) -> tuple[list[str], int]:
    """What a pass over the training split reports, and how many images it could use."""
    dataset = config(root, broken=broken, unlabelled="use").build_train(
        image_size=64, seed=0, prompts=PromptConfig(), augmentation=AugmentationConfig(enable=False)
    )
    samples = [dataset[SampleKey(0, index)] for index in range(len(dataset))]
    said = [f"{problem.path}: {problem.reason}" for problem in dataset.problems]
    return [*said, *(reason for sample in samples for reason in sample.skipped)], len(dataset)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_is_named_refused_or_skipped_and_counted(split: Path, name: str) -> None:
    spoil, reason = REFUSED[name]
    spoil(split)
    report = inspect(split.parent, image_size=64)
    named = [problem for problem in report.all_problems() if problem.level == "error"]
    assert report.refused
    assert any(re.search(reason, problem.reason) for problem in named), named
    assert all(str(split) in problem.path for problem in named)
    with pytest.raises(DataError, match=reason):
        _first_pass(split.parent, "refuse")
    said, _ = _first_pass(split.parent, "skip")
    assert any(re.search(reason, text) for text in said), said


@pytest.mark.parametrize("name", NOTED)
def test_what_is_odd_is_named_and_used(split: Path, name: str) -> None:
    spoil, reason = NOTED[name]
    spoil(split)
    report = inspect(split.parent, image_size=64)
    named = [problem for problem in report.all_problems() if reason in problem.reason]
    assert named, report.all_problems()
    assert all(problem.level == "warning" for problem in named)
    assert not report.refused
    _, usable = _first_pass(split.parent, "refuse")
    assert usable == 3


def test_a_sound_set_has_nothing_to_say(split: Path) -> None:
    assert inspect(split.parent, image_size=64).all_problems() == []


RLE = uncompressed(MASK)
COCO: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str, str]] = {
    "missing image": ([entry("gone.png", 2)], [], "error", "gone.png is not there"),
    "traversal": ([entry("../a.png", 2)], [], "error", "leads out"),
    "duplicate image id": ([entry("b.png", 1)], [], "error", "id that another image has"),
    "duplicate file": ([entry("a.png", 2)], [], "error", "same name"),
    "no size": ([{"id": 2, "file_name": "b.png"}], [annotation(RLE, 2, 2)], "error", "no height and width"),
    "rle of wrong size": ([], [annotation({**RLE, "size": [9, 9]}, 2)], "error", "RLE is for size"),
    "rle of wrong length": ([], [annotation({**RLE, "counts": [5]}, 2)], "error", "RLE counts 5"),
    "damaged rle": ([], [annotation({**RLE, "counts": "ab\u00e9"}, 2)], "error", "damaged"),
    "nan box": ([], [annotation(RLE, 2, bbox=[0, float("nan"), 3, 4])], "error", "four finite numbers"),
    "short polygon": ([], [annotation([[1, 2, 3, 4]], 2)], "error", "4 numbers"),
    "nan polygon": ([], [annotation([[1, 2, 3, 4, 5, float("nan")]], 2)], "error", "NaN"),
    "far polygon": ([], [annotation([[0, 0, 1e9, 0, 1e9, 1e9]], 2)], "error", "far beyond"),
    "outside polygon": ([], [annotation([[70, 2, 90, 2, 90, 9]], 2)], "error", "empty"),
    "no segmentation": ([], [{"id": 2, "image_id": 1, "category_id": 1}], "error", "neither polygons nor"),
    "duplicate annotation id": ([], [annotation(RLE, 1)], "error", "another annotation has"),
    "unknown image": ([], [annotation(RLE, 2, 99)], "error", "image 99"),
    "another size than the file": ([], [], "error", "said to be"),
    "category gap": ([], [annotation(RLE, 2, 1) | {"category_id": 7}], "warning", "not listed"),
    "crowd": ([], [annotation(RLE, 2, 1, iscrowd=1)], "warning", "crowd"),
    "crowd of no image": ([], [annotation(RLE, 2, 1, iscrowd=1) | {"image_id": [1]}], "warning", "crowd"),
    "unlisted image": ([], [], "warning", "not listed in"),
}


@pytest.mark.parametrize("name", COCO)
def test_coco_mistakes_are_named_refused_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    images, annotations, level, reason = COCO[name]
    root = tmp_path / "data"
    save(picture(SIZE), root / "train" / "images" / "a.png")
    if name in {"unlisted image", "no size"}:
        save(picture(SIZE, 1), root / "train" / "images" / "b.png")
    first = entry() | ({"height": 40} if name == "another size than the file" else {})
    own = {"size": [first["height"], 64], "counts": [0, first["height"] * 64]}
    file = coco(root / "train.json", [first, *images], [annotation(own), *annotations])
    coco(root / "val.json", [entry()], [annotation(RLE)])
    save(picture(SIZE, 2), root / "val" / "a.png")
    report = inspect(root, image_size=64, unlabelled="use")
    named = [problem for problem in report.all_problems() if reason in problem.reason]
    assert named, report.all_problems()
    assert {problem.level for problem in named} == {level}
    assert str(file) in named[0].path or "images" in named[0].path
    assert report.refused == (level == "error")
    if level == "error" and name != "another size than the file":
        with pytest.raises(DataError, match=reason):
            _first_pass(root, "refuse")
        said, usable = _first_pass(root, "skip")
        assert usable == (2 if name == "no size" else 1)
        assert any(reason in text for text in said)


def test_a_json_that_is_none_is_one_clear_sentence(tmp_path: Path) -> None:
    save(picture(SIZE), tmp_path / "train" / "a.png")
    for text in ('{"images": [', '["images"]', '{"images": 3, "annotations": []}', '{"images": ' + "[" * 100_000):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(DataError, match=r"train\.json"):
            inspect(tmp_path, format="coco")
    (tmp_path / "train.json").write_text(json.dumps({"images": [3], "annotations": [None]}))
    problems = inspect(tmp_path, format="coco").all_problems()
    assert sum("are not objects" in problem.reason for problem in problems) == 2


def test_pictures_in_two_splits_are_named(split: Path) -> None:
    save(picture(SIZE, 1), split.parent / "val" / "images" / "im000.bmp")
    (split.parent / "val" / "images" / "im000.png").unlink()
    (problem,) = inspect(split.parent, image_size=64).all_problems()
    assert "same picture" in problem.reason
    assert "split 'train'" in problem.reason
