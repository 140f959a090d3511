"""Where splits and their files may lie: usual names, any case, images and masks of all splits side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from samlet.data.formats import as_split, exists, read_split, split_place
from samlet.data.splits import names_taken
from tests.data.builders import config, picture, save, write_split
from tests.data.test_formats import DISCS, all_masks, annotation, coco, compressed, entry, uncompressed


@pytest.mark.parametrize("images", ["images/train", "train2017", "images/train2017", "images"])
def test_an_annotation_file_is_a_split_itself(tmp_path: Path, images: str) -> None:
    save(picture(), tmp_path / images / "a.png")
    file = coco(tmp_path / "annotations" / "instances_train2017.json", [entry()], [annotation(uncompressed(DISCS[0]))])
    assert as_split(file) == (tmp_path.resolve(), "annotations/instances_train2017.json")
    found = read_split(*as_split(file))
    assert found.format == "coco"
    assert not found.problems
    assert np.array_equal(all_masks(found)["a"], DISCS[:1])


def test_a_folder_of_any_other_name_is_its_files_root(tmp_path: Path) -> None:
    file = coco(tmp_path / "train.json", [entry()], [])
    assert as_split(file) == (tmp_path.resolve(), "train.json")
    assert as_split(tmp_path / "annotations") == (tmp_path.resolve(), "annotations")


@pytest.mark.parametrize("name", ["valid", "validation", "Valid", "VAL"])
def test_other_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    write_split(tmp_path / "train", images=2)
    write_split(tmp_path / name, images=1)
    assert exists(tmp_path, "val")
    assert not exists(tmp_path, "test")
    assert split_place(tmp_path, "val") == tmp_path / name
    assert len(read_split(tmp_path, "val").records) == 1


def test_the_own_name_of_a_split_comes_first(tmp_path: Path) -> None:
    write_split(tmp_path / "valid", images=2)
    write_split(tmp_path / "val", images=1)
    assert split_place(tmp_path, "val") == tmp_path / "val"
    assert split_place(tmp_path, "absent") == tmp_path / "absent"


def _splits_by_kind(root: Path, images: str, masks: str) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_split(root / "by_split" / split, images=count)
        for new, old in ((images, "images"), (masks, "masks")):
            (root / new).mkdir(exist_ok=True)
            (root / "by_split" / split / old).rename(root / new / split)
        (root / "by_split" / split).rmdir()
    (root / "by_split").rmdir()


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("image", "mask"), ("Images", "Masks")])
def test_splits_below_images_and_masks_stay_apart(tmp_path: Path, images: str, masks: str) -> None:
    _splits_by_kind(tmp_path, images, masks)
    assert exists(tmp_path, "train")
    assert exists(tmp_path, "val")
    for split, count in (("train", 3), ("val", 2)):
        found = read_split(tmp_path, split)
        assert found.format == "mask_folders"
        assert not found.problems
        assert [len(masks) for masks in all_masks(found).values()] == [3] * count
        assert all(record.image_path.parent == tmp_path / images / split for record in found.records)


def test_label_images_and_bare_images_below_a_kind(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(picture(), tmp_path / "images" / split / "a.png")
    save((DISCS[0] * 1 + DISCS[1] * 2).astype(np.uint8), tmp_path / "labels" / "train" / "a.png")
    found = read_split(tmp_path, "train")
    assert found.format == "instance_labels"
    assert np.array_equal(all_masks(found)["a"], DISCS)
    (bare,) = read_split(tmp_path, "val").records
    assert (bare.image_id, bare.open_masks) == ("a", None)


def test_folders_are_found_in_any_case(tmp_path: Path) -> None:
    write_split(tmp_path / "Train", images=2)
    (tmp_path / "Train" / "images").rename(tmp_path / "Train" / "Images")
    (tmp_path / "Train" / "masks").rename(tmp_path / "Train" / "MASKS")
    found = read_split(tmp_path, "train")
    assert len(found.records) == len([record for record in found.records if record.open_masks]) == 2


LEFT_BEHIND = [".ipynb_checkpoints/im000-checkpoint.png", "__MACOSX/im000.png", ".thumbs/deep/x.png"]


@pytest.mark.parametrize("left", LEFT_BEHIND)
def test_what_tools_leave_behind_is_no_data(tmp_path: Path, left: str) -> None:
    write_split(tmp_path, images=2)
    for folder in ("images", "masks"):
        save(picture(), tmp_path / folder / left)
    found = read_split(tmp_path, None)
    assert found.format == "mask_folders"
    assert not found.problems
    assert [record.image_id for record in found.records] == ["im000", "im001"]


def test_a_hidden_folder_makes_no_mask_folders_of_label_images(tmp_path: Path) -> None:
    save(picture(), tmp_path / "images" / "a.png")
    save((DISCS[0] * 1 + DISCS[1] * 2).astype(np.uint8), tmp_path / "masks" / "a.png")
    (tmp_path / "masks" / ".ipynb_checkpoints").mkdir()
    found = read_split(tmp_path, None)
    assert found.format == "instance_labels"
    assert np.array_equal(all_masks(found)["a"], DISCS)


def test_hidden_files_are_no_sa1b(tmp_path: Path) -> None:
    save(picture(), tmp_path / "images" / "a.png")
    content = {
        "image": {"file_name": "a.png", "height": 48, "width": 64},
        "annotations": [{"id": 1, "segmentation": compressed(DISCS[0])}],
    }
    for name in ("a.json", ".ipynb_checkpoints/a-checkpoint.json"):
        (tmp_path / "sa1b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sa1b" / name).write_text(json.dumps(content))
    found = read_split(tmp_path, None)
    assert (found.format, len(found.records), found.problems) == ("sa1b", 1, [])


def _one_file_for_all(root: Path, names: dict[str, str], home: str = "images", file: str = "annotations.json") -> None:
    """An image a split, all listed in one file; what it calls them."""
    images, annotations = [], []
    for number, (split, name) in enumerate(names.items()):
        save(picture(seed=number), root / home / split / f"{split}_a.png")
        images.append({**entry(), "id": number, "file_name": name})
        annotations.append({**annotation(uncompressed(DISCS[number])), "id": number, "image_id": number})
    coco(root / file, images, annotations)


@pytest.mark.parametrize("file", ["annotations.json", "annotations/instances_default.json"])
@pytest.mark.parametrize(
    ("home", "called"),
    [
        (".", "{split}_a.png"),
        (".", "{split}/{split}_a.png"),
        ("images", "{split}_a.png"),
        ("images", "{split}/{split}_a.png"),
        ("images", "images/{split}/{split}_a.png"),
    ],
)
def test_one_annotation_file_for_all_splits(tmp_path: Path, home: str, file: str, called: str) -> None:
    _one_file_for_all(tmp_path, {split: called.format(split=split) for split in ("train", "val")}, home, file)
    for number, split in enumerate(("train", "val")):
        found = read_split(tmp_path, split)
        assert (found.format, found.problems) == ("coco", [])
        assert [record.image_path.name for record in found.records] == [f"{split}_a.png"]
        (masks,) = all_masks(found).values()
        assert np.array_equal(masks, DISCS[number : number + 1])
    assert len(read_split(tmp_path, "images/train" if home == "images" else "train").records) == 1


def test_a_file_for_all_splits_says_what_it_leaves_open(tmp_path: Path) -> None:
    _one_file_for_all(tmp_path, {"train": "train_a.png", "val": "val_a.png"})
    save(picture(), tmp_path / "images" / "test" / "b.png")
    bare = read_split(tmp_path, "test")
    assert [record.open_masks for record in bare.records] == [None]
    assert "lists no image of" in bare.problems[0].reason

    save(picture(), tmp_path / "images" / "val" / "train_a.png")
    (twice,) = [problem for problem in read_split(tmp_path, "train").problems if problem.level == "error"]
    assert "means" in twice.reason
    assert "write its folder to it" in twice.reason

    (tmp_path / "images" / "val" / "train_a.png").unlink()
    (tmp_path / "images" / "val" / "val_a.png").unlink()
    (lost,) = [problem for problem in read_split(tmp_path, "train").problems if problem.level == "error"]
    assert lost.reason == "its file val_a.png is not there"


def test_what_is_wrong_in_another_split_of_the_same_file_is_not_held_against_this_one(tmp_path: Path) -> None:
    _one_file_for_all(tmp_path, {"train": "train_a.png", "val": "val_a.png"})
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][1]["segmentation"] = [[1, 2]]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert not read_split(tmp_path, "train").problems
    assert [problem.level for problem in read_split(tmp_path, "val").problems] == ["error"]


def test_every_name_that_stands_in_for_a_split_is_said(tmp_path: Path) -> None:
    write_split(tmp_path / "Train", images=2)
    write_split(tmp_path / "valid", images=1)
    assert names_taken(config(tmp_path)) == [f"{tmp_path / 'valid'}: is taken as dataset.val ('val')"]
    (tmp_path / "valid").rename(tmp_path / "val")
    assert names_taken(config(tmp_path)) == []
    assert names_taken(config(tmp_path, val="absent")) == []
