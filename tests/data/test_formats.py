"""Every format is found by itself, agrees with the others on the same images, and stays inside its folder (P11)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from samlet.data.formats import FORMATS, FormatName, load_format, read_split
from samlet.data.images import probe_image
from samlet.data.records import Found, read_crowds, read_masks
from samlet.data.segmentations import decode_counts, flaw, to_mask
from samlet.errors import DataError
from tests.data.builders import disc, picture, save, write_split

SIZE = (48, 64)
DISCS = [disc(SIZE, 15, 15, 8), disc(SIZE, 45, 30, 9)]


def all_masks(found: Found) -> dict[str, list[np.ndarray]]:
    masks: dict[str, list[np.ndarray]] = {}
    for record in found.records:
        size = probe_image(record.image_path).size
        masks[record.image_id] = []
        for mask in read_masks(record.open_masks, size) if record.open_masks else []:
            assert not isinstance(mask, DataError), mask
            masks[record.image_id].append(mask)
    return masks


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts if sum(counts) == mask.size else counts[:-1]}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def coco(place: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": 1, "name": "thing"}]
    place.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return place


def entry(name: str = "a.png", key: int = 1) -> dict[str, Any]:
    return {"id": key, "file_name": name, "height": SIZE[0], "width": SIZE[1]}


def annotation(segmentation: Any, key: int = 1, image: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": key, "image_id": image, "category_id": 1, "segmentation": segmentation, **more}


@pytest.mark.parametrize("layout", ["images/masks", "image/mask", "nested", "single", "upper"])
def test_mask_folders(tmp_path: Path, layout: str) -> None:
    images, masks = ("image", "mask") if layout == "image/mask" else ("images", "masks")
    name = {"nested": "day1/a.b", "upper": "a"}.get(layout, "a")
    suffix = ".PNG" if layout == "upper" else ".png"
    save(picture(), tmp_path / images / f"{name}{suffix}")
    if layout == "single":
        save(DISCS[0], tmp_path / masks / "a.png")
    else:
        for number, mask in enumerate(DISCS):
            save(mask, tmp_path / masks / name / f"{number}{suffix}")
    found = read_split(tmp_path, None)
    assert found.format == "mask_folders"
    assert not found.problems
    read = all_masks(found)
    assert list(read) == [name]
    assert np.array_equal(read[name], DISCS[:1] if layout == "single" else DISCS)


@pytest.mark.parametrize("folder", ["labels", "instances", "masks", "mask"])
@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_instance_labels(tmp_path: Path, folder: str, mode: str) -> None:
    save(picture(), tmp_path / "images" / "a.jpg")
    values = DISCS[0] * 3 + DISCS[1] * (700 if mode == "I;16" else 9)
    labels = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        labels.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    (tmp_path / folder).mkdir()
    labels.save(tmp_path / folder / "a.png")
    found = read_split(tmp_path, None)
    assert found.format == "instance_labels"
    assert np.array_equal(all_masks(found)["a"], DISCS)


def test_more_than_255_instances(tmp_path: Path) -> None:
    save(picture(), tmp_path / "images" / "a.png")
    labels = np.zeros(SIZE, np.uint16)
    labels[:20, :20] = np.arange(1, 401).reshape(20, 20)
    save(labels, tmp_path / "labels" / "a.png")
    assert len(all_masks(read_split(tmp_path, None))["a"]) == 400


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("train.json", "train/images"),
        ("train.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/train.json", "images/train"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_train.json", "Images/train2017"),
        ("Annotations/instances_train.json", "Images/Train"),
        ("train/whatever.json", "train/images"),
    ],
)
def test_coco_layouts(tmp_path: Path, annotations: str, images: str) -> None:
    save(picture(), tmp_path / images / "a.png")
    polygon = [[10.0, 10.0, 30.0, 10.0, 30.0, 25.0, 10.0, 25.0]]
    items = [annotation(polygon), annotation(uncompressed(DISCS[0]), 2), annotation(compressed(DISCS[1]), 3)]
    items.append(annotation(uncompressed(DISCS[1]), 4, iscrowd=1))
    coco(tmp_path / annotations, [entry()], items)
    found = read_split(tmp_path, "train")
    assert found.format == "coco"
    assert [problem.reason for problem in found.problems] == [
        "1 crowd region(s) are no objects; what is found there is not judged"
    ]
    assert all(record.is_complete for record in found.records)
    crowds = [region for record in found.records for region in read_crowds(record, SIZE)]
    assert np.array_equal(crowds, DISCS[1:])
    masks = all_masks(found)["a"]
    assert len(masks) == 3
    assert masks[0].sum() == 300
    assert masks[0][10:25, 10:30].all()
    assert np.array_equal(masks[1:], DISCS)


@pytest.mark.parametrize("place", [".", "sa1b", "annotations", "images"])
def test_sa1b(tmp_path: Path, place: str) -> None:
    save(picture(), tmp_path / ("images" if place != "." else ".") / "sa_1.png")
    content = {
        "image": {"file_name": "sa_1.png", "height": 48, "width": 64},
        "annotations": [{"id": number, "segmentation": compressed(mask)} for number, mask in enumerate(DISCS)],
    }
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "sa_1.json").write_text(json.dumps(content))
    found = read_split(tmp_path, None)
    assert found.format == "sa1b"
    assert np.array_equal(all_masks(found)["sa_1"], DISCS)
    content["image"] = {"file_name": "../other.png", "height": 48, "width": 64}
    (tmp_path / place / "sa_1.json").write_text(json.dumps(content))
    (record,) = read_split(tmp_path, None).records
    assert record.open_masks is not None
    (error,) = read_masks(record.open_masks, SIZE)
    assert "describes image '../other.png'" in str(error)


def test_the_format_can_be_named_and_the_others_are_told(tmp_path: Path) -> None:
    write_split(tmp_path / "train", images=1)
    coco(tmp_path / "train.json", [entry("im000.png")], [annotation(uncompressed(DISCS[0]))])
    found = read_split(tmp_path, "train")
    assert (found.format, found.also_seen) == ("mask_folders", ("coco",))
    named = read_split(tmp_path, "train", "coco")
    assert named.format == "coco"
    assert np.array_equal(all_masks(named)["im000"], DISCS[:1])


def test_images_alone_are_unlabelled(tmp_path: Path) -> None:
    save(picture(), tmp_path / "flat" / "A.JPG")
    save(picture(), tmp_path / "deep" / "images" / "b.png")
    for split, name in (("flat", "A"), ("deep", "b")):
        (record,) = read_split(tmp_path, split).records
        assert (record.image_id, record.open_masks) == (name, None)
    with pytest.raises(DataError, match="no such folder"):
        read_split(tmp_path, "absent")


@pytest.mark.parametrize("name", FORMATS)
def test_every_word_has_its_module(name: FormatName, tmp_path: Path) -> None:
    assert not load_format(name).matches(tmp_path / "absent")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "a\0b.png", "link.png", "C:\\x.png", "x" * 400]
)
def test_coco_names_stay_inside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    save(picture(), tmp_path / "secret.png")
    save(picture(), root / "train" / "images" / "a.png")
    os.symlink(tmp_path / "secret.png", root / "train" / "images" / "link.png")
    coco(root / "train.json", [entry(name)], [annotation(uncompressed(DISCS[0]))])
    found = read_split(root, "train")
    assert not found.records
    assert any(problem.level == "error" for problem in found.problems)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    root = write_split(tmp_path / "root", images=1)
    secret = save(picture(), tmp_path / "secret.png")
    os.symlink(secret, root / "images" / "stolen.png")
    os.symlink(save(DISCS[0], tmp_path / "mask.png"), root / "masks" / "im000" / "9.png")
    found = read_split(root, None)
    assert [record.image_id for record in found.records] == ["im000"]
    assert len(all_masks(found)["im000"]) == 3
    assert sorted(Path(problem.path).name for problem in found.problems) == ["9.png", "stolen.png"]


def test_names_that_differ_by_case_or_suffix_collide(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "A.png", "b.png"):
        save(picture(), tmp_path / "images" / name)
    found = read_split(tmp_path, None)
    assert len(found.records) == 2
    assert sum("same name" in problem.reason for problem in found.problems) == 2


@given(st.binary(max_size=80), st.integers(1, 9), st.integers(1, 9))
def test_no_compressed_runs_reach_c_code_unchecked(data: bytes, height: int, width: int) -> None:
    segmentation = {"size": [height, width], "counts": data.decode("latin-1")}
    if flaw(segmentation, (height, width)) is None:
        assert to_mask(segmentation, (height, width)).shape == (height, width)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=30))
def test_compressed_runs_are_read_as_pycocotools_writes_them(counts: list[int]) -> None:
    from pycocotools import mask as coco_mask

    total = sum(counts)
    runs = coco_mask.frPyObjects({"size": [total, 1], "counts": counts}, total, 1)
    assert decode_counts(runs["counts"].decode()) == counts


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        "x",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[float("nan")] * 6],
        [["1"] * 6],
        [[1e12, 0, 5, 5, 9, 9]],
        {"size": [48, 64], "counts": [1, 2]},
        {"size": [48, 64], "counts": [-1, 48 * 64 + 1]},
        {"size": [64, 48], "counts": [48 * 64]},
        {"size": [48, 64], "counts": "\x01"},
        {"counts": [48 * 64]},
    ],
)
def test_flawed_segmentations_are_named(segmentation: Any) -> None:
    assert flaw(segmentation, SIZE)


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


@pytest.mark.parametrize("name", ["coco_cc", "facades", "potholes"])
def test_polygons_of_real_sets_agree_with_their_masks(shared: Path, name: str) -> None:
    root = shared / "data" / name
    folders, polygons = read_split(root, "val"), read_split(root, "val", "coco")
    assert folders.also_seen == ("coco",)
    polygons.records = polygons.records[:3]
    by_id = {record.image_id: record for record in folders.records}
    for image_id, masks in all_masks(polygons).items():
        record = by_id[image_id]
        assert record.open_masks is not None
        size = probe_image(record.image_path).size
        files = [file for file in read_masks(record.open_masks, size) if not isinstance(file, DataError)][:8]
        best = [max(_iou(mask, file) for mask in masks) for file in files]
        assert np.mean(best) > 0.97


@pytest.mark.parametrize("other", ["sa1b", "coco"])
def test_runs_of_the_nuclei_are_their_masks_exactly(shared: Path, other: FormatName) -> None:
    root = shared / "data" / "nuclei_bbbc038"
    folders, runs = read_split(root, "val"), read_split(root, "val", other)
    assert folders.also_seen == ("coco", "sa1b")
    for found in (folders, runs):
        assert not [problem for problem in found.problems if problem.level == "error"]
        found.records = sorted(found.records)[:6]

    def sets(found: Found) -> dict[str, list[bytes]]:
        return {name: sorted(np.packbits(mask).tobytes() for mask in masks) for name, masks in all_masks(found).items()}

    assert sets(folders) == sets(runs)
