"""A teacher's masks and the ground truth on one small image: which objects each method makes of them."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - as loader workers do
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlet.data.records import MaskFiles, OpenMasks, Record
from samlet.distill.kept_masks import Kept, KeptMasks, MaskFacts, mask_file, masks_if_kept, read_masks, write_masks
from samlet.distill.pseudo_labels import Method, best_iou, pseudo_labelled
from samlet.errors import DataError
from samlet.models.amg import AmgSettings
from tests.distill.automatic import FACTS, block, found

SIZE = (20, 30)
TRUTH = [block(SIZE, 0, 0, 10, 10), block(SIZE, 20, 0, 30, 10)]
TEACHERS = [
    block(SIZE, 0, 0, 10, 5),  # IoU 0.5 with the first object, exactly
    block(SIZE, 20, 0, 30, 20),  # IoU 0.5 with the second
    block(SIZE, 0, 0, 10, 4),  # IoU 0.4 with the first
    block(SIZE, 12, 12, 18, 18),  # nothing of the ground truth
]


def kept(folder: Path, masks: list[np.ndarray], name: str = "a") -> KeptMasks:
    place = mask_file(folder / "kept", name)
    write_masks(place, FACTS, "cd" * 32, found(masks, SIZE))
    return read_masks(place)


def truth(folder: Path) -> OpenMasks:
    paths = []
    for number, mask in enumerate(TRUTH):
        paths.append(folder / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(paths[-1])
    return partial(MaskFiles, tuple(paths))


def objects(record: Record) -> list[np.ndarray]:
    assert record.open_masks is not None
    masks = record.open_masks(SIZE)
    return [masks.read(index) for index in range(len(masks))]


def labelled(
    folder: Path, method: Method, open_masks: OpenMasks | None, masks: list[np.ndarray], threshold: float = 0.5
) -> Record:
    record = Record("a", folder / "a.png", open_masks)
    (made,) = pseudo_labelled([record], {"a": kept(folder, masks).brief}, method, threshold)
    return made


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("method", "threshold", "expected"),
    [
        ("replace_gt", 0.5, TEACHERS),
        ("dual_supervision", 0.5, TRUTH + TEACHERS),
        ("gt_override", 0.5, TRUTH + TEACHERS[2:]),  # what reaches the threshold gives way
        ("gt_override", 0.51, TRUTH + TEACHERS),
        ("gt_override", 0.4, TRUTH + TEACHERS[3:]),
    ],
)
def test_the_objects_of_each_method(
    tmp_path: Path, method: Method, threshold: float, expected: list[np.ndarray]
) -> None:
    record = labelled(tmp_path, method, truth(tmp_path), TEACHERS, threshold)
    assert same(objects(pickle.loads(pickle.dumps(record))), expected)  # workers get them by pickle


def test_replace_gt_opens_no_ground_truth(tmp_path: Path) -> None:
    def opened(size: tuple[int, int]) -> MaskFiles:
        raise AssertionError("the ground truth was opened")

    assert same(objects(labelled(tmp_path, "replace_gt", opened, TEACHERS)), TEACHERS)


@pytest.mark.parametrize("method", ["replace_gt", "dual_supervision", "gt_override"])
def test_an_unlabelled_image_is_labelled_by_the_teacher_and_one_without_any_mask_by_nobody(
    tmp_path: Path, method: Method
) -> None:
    assert same(objects(labelled(tmp_path, method, None, TEACHERS)), TEACHERS)
    assert labelled(tmp_path, method, None, []).open_masks is None
    with_truth = labelled(tmp_path, method, truth(tmp_path), [])
    assert (with_truth.open_masks is None) == (method == "replace_gt")


def test_the_names_say_where_each_object_is_written(tmp_path: Path) -> None:
    record = labelled(tmp_path, "dual_supervision", truth(tmp_path), TEACHERS)
    assert record.open_masks is not None
    masks = record.open_masks(SIZE)
    assert masks.name(1) == str(tmp_path / "1.png")
    assert masks.name(2) == f"{tmp_path / 'kept' / 'a.json'}: mask 0"
    with pytest.raises(IndexError):
        masks.read(6)


def test_an_image_that_stands_there_twice_is_compared_once_and_labelled_twice(tmp_path: Path) -> None:
    record, masks = Record("a", tmp_path / "a.png", truth(tmp_path)), kept(tmp_path, TEACHERS).brief
    done = list[int]()
    made = pseudo_labelled([record, record], {"a": masks}, "gt_override", 0.5, advance=done.append)
    assert [len(objects(one)) for one in made] == [4, 4]
    assert done == [1]


def test_a_broken_mask_of_the_ground_truth_is_refused_or_left_out_of_the_comparison(tmp_path: Path) -> None:
    opened, masks = truth(tmp_path), {"a": kept(tmp_path, TEACHERS).brief}
    (tmp_path / "1.png").write_bytes(b"no image")
    record = Record("a", tmp_path / "a.png", opened)
    with pytest.raises(DataError, match=r"1\.png"):
        pseudo_labelled([record], masks, "gt_override", 0.5)
    (made,) = pseudo_labelled([record], masks, "gt_override", 0.5, broken="skip")
    assert made.open_masks is not None
    seen = made.open_masks(SIZE)
    assert same([seen.read(index) for index in (2, 3, 4)], TEACHERS[1:])


def test_iou_is_the_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks, others = ([rng.random(SIZE) > 0.6 for _ in range(3)] for _ in range(2))
    expected = [max((m & o).sum() / (m | o).sum() for o in others) for m in masks]
    np.testing.assert_allclose(best_iou(kept(tmp_path, masks), others), expected)
    assert best_iou(kept(tmp_path, masks), []).tolist() == [0, 0, 0]


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    record = labelled(tmp_path, "replace_gt", None, TEACHERS)
    assert record.open_masks is not None
    with pytest.raises(DataError, match="30 x 20 pixels but the image is 31 x 20"):
        record.open_masks((20, 31))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    masks = kept(tmp_path, TEACHERS, "folder/a")
    assert (masks.facts, masks.image_sha256, masks.size) == (FACTS, "cd" * 32, SIZE)
    assert masks.brief == Kept(tmp_path / "kept" / "folder" / "a.json", 4, masks.digest)
    assert masks.areas == [50, 200, 40, 36]
    assert np.float32(masks.predicted_iou[0]) == np.float32(0.9)
    assert same([masks.segmentations().read(n) for n in range(4)], TEACHERS)
    assert same([masks.segmentations([3]).read(0)], TEACHERS[3:])


@pytest.mark.parametrize(
    ("facts", "image", "said"),
    [
        (FACTS._replace(teacher_sha256="ef" * 32), "cd" * 32, "teacher_sha256 is 'abababababab' there, 'efefefefefef'"),
        (FACTS._replace(image_size=128), "cd" * 32, "image_size is 64 there, 128 is wanted"),
        (
            MaskFacts.of("vit_b", "ab" * 32, 64, AmgSettings(pred_iou_thresh=0.5)),
            "cd" * 32,
            "settings.pred_iou_thresh is 0.88 there, 0.5 is wanted",
        ),
        (FACTS, "00" * 32, "image_sha256 is 'cdcdcdcdcdcd' there"),
    ],
)
def test_masks_of_another_making_are_never_taken(tmp_path: Path, facts: MaskFacts, image: str, said: str) -> None:
    masks = kept(tmp_path, TEACHERS)
    assert said in str(masks.difference(facts, image))
    assert masks_if_kept(masks.place, facts, image) is None
    assert masks_if_kept(masks.place, FACTS, "cd" * 32) == masks


def test_the_size_of_a_batch_of_points_changes_no_mask() -> None:
    assert MaskFacts.of("vit_b", "ab" * 32, 64, AmgSettings(points_per_batch=8)) == FACTS


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "foreign"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    place = kept(tmp_path, TEACHERS).place
    text = place.read_text()
    changed = {"flip": text.replace("0.9", "0.8", 1), "cut": text[:-20], "foreign": json.dumps({"rles": []})}
    place.unlink() if damage == "gone" else place.write_text(changed[damage])
    with pytest.raises(DataError, match=r"a\.json: (damaged|missing)"):
        read_masks(place)
    assert masks_if_kept(place, FACTS, "cd" * 32) is None


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out"):
        mask_file(tmp_path, "../a")
