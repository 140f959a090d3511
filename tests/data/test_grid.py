"""The grid of segment everything: where its points lie, what lies under them, and which of them a step sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, EverythingConfig, PromptConfig
from samlet.data.dataset import SegmentationDataset
from samlet.data.grid import NO_OBJECT, GridSettings, ask_everywhere, draw_clicks, objects_under, point_grid
from samlet.data.records import open_segmentations
from samlet.data.sampler import SampleKey
from samlet.types import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING, POSITIVE, Sample
from tests.data.builders import config, save, write_small

SIZE = (40, 64)
WHOLE = GridSettings(points_per_side=8, max_points=None, jitter=False)


def square(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


LARGE, MIDDLE, SMALL, TINY = square(0, 0, 40, 40), square(0, 0, 24, 24), square(0, 0, 12, 12), square(0, 0, 5, 5)
APART = square(48, 20, 60, 32)


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def test_points_are_the_centres_of_cells() -> None:
    points = point_grid(4, (40, 80))
    assert points.shape == (16, 2)
    assert points[:5].tolist() == [[10, 5], [30, 5], [50, 5], [70, 5], [10, 15]]
    upstream = np.linspace(1 / 8, 1 - 1 / 8, 4)
    np.testing.assert_allclose(np.unique(points[:, 0]), upstream * 80)
    np.testing.assert_allclose(np.unique(points[:, 1]), upstream * 40)


@pytest.mark.parametrize("shift", [(-0.5, -0.5), (0.4999999, 0.4999999)])
def test_a_shifted_grid_stays_on_the_image(shift: tuple[float, float]) -> None:
    points = point_grid(5, SIZE, shift)
    assert bool((points >= 0).all())
    assert bool((points < [SIZE[1], SIZE[0]]).all())
    assert objects_under(points, [np.ones(SIZE, np.bool_)]).all()


def test_a_point_lies_on_the_pixel_whose_centre_is_nearest() -> None:
    mask = square(10, 7, 11, 8)
    points = np.array([[10, 7], [9.5, 6.5], [10.49, 7.49], [10.5, 7], [9.49, 7], [10, 7.5], [10, 6.49]])
    assert objects_under(points, [mask])[0].tolist() == [True, True, True, False, False, False, False]


def test_several_points_on_an_object_all_learn_it_and_nested_ones_all_of_theirs() -> None:
    """PITFALLS 24: no point is taken from an object because another has it."""
    masks = [LARGE, APART, TINY, MIDDLE, SMALL]
    found = ask_everywhere(rng(), SIZE, masks, WHOLE)
    assert len(found.rows) == len(found.target_of) == len(found.labelled)
    assert bool(found.labelled.all())
    seen: dict[tuple[float, float], list[int]] = {}
    for row, target in zip(found.rows, found.target_of, strict=True):
        assert row.labels.tolist() == [POSITIVE, PADDING]
        place = (float(row.coords[0, 0]), float(row.coords[0, 1]))
        which = next(number for number, mask in enumerate(masks) if mask is found.masks[target])
        seen.setdefault(place, []).append(which)
    points = point_grid(8, SIZE)
    under = objects_under(points, masks)
    by_area = [2, 4, 1, 3, 0]
    for number, point in enumerate(points.astype(np.float32).tolist()):
        expected = [which for which in by_area if under[which, number]][:3]
        assert seen.get((point[0], point[1]), []) == expected
    assert seen[4.0, 2.5] == [2, 4, 3]  # and the largest of the four under it is left out
    counts = [sum(which in targets for targets in seen.values()) for which in range(5)]
    assert counts[1] > 1
    assert counts[0] > counts[3] > 1


def test_masks_are_carried_once_and_only_those_that_are_asked_for() -> None:
    between = square(61, 36, 63, 38)
    found = ask_everywhere(rng(), SIZE, [LARGE, between], WHOLE)
    assert [mask is LARGE for mask in found.masks] == [True]
    assert len(found.rows) > 20
    negative = ask_everywhere(rng(), SIZE, [LARGE, between], WHOLE._replace(unlabelled="negative"))
    assert [mask is LARGE or mask is between for mask in negative.masks] == [True, True, False]


@pytest.mark.parametrize("unlabelled", ["ignore", "teacher", "negative"])
def test_what_becomes_of_points_beside_all_objects(unlabelled: Any) -> None:
    found = ask_everywhere(rng(), SIZE, [APART], WHOLE._replace(unlabelled=unlabelled))
    on = int(objects_under(point_grid(8, SIZE), [APART]).sum())
    assert int(found.labelled.sum()) == on
    assert len(found.rows) == (on if unlabelled == "ignore" else 64)
    assert int(found.background.sum()) == (64 - on if unlabelled == "negative" else 0)
    assert not bool((found.background & found.labelled).any())
    for target, labelled in zip(found.target_of, found.labelled, strict=True):
        assert bool(found.masks[target].any()) is bool(labelled)


def test_an_incomplete_image_has_no_negatives() -> None:
    found = ask_everywhere(rng(), SIZE, [APART], WHOLE._replace(unlabelled="negative"), unknown=None)
    assert bool(found.labelled.all())


def test_no_negative_lies_on_what_is_unknown() -> None:
    unknown = square(2, 2, 40, 30)
    found = ask_everywhere(rng(), SIZE, [APART], WHOLE._replace(unlabelled="negative"), unknown=[unknown])
    on = int(objects_under(point_grid(8, SIZE), [APART]).sum())
    left_out = int(objects_under(point_grid(8, SIZE), [unknown]).sum())
    assert left_out > 0
    assert int(found.background.sum()) == 64 - on - left_out


@pytest.mark.parametrize("unlabelled", ["ignore", "teacher", "negative"])
def test_an_image_without_masks_is_left_to_the_teachers(unlabelled: Any) -> None:
    found = ask_everywhere(rng(), SIZE, [], WHOLE._replace(unlabelled=unlabelled, max_points=10))
    assert len(found.rows) == 10
    assert not bool((found.labelled | found.background).any())
    assert len(found.masks) == 1
    assert not found.masks[0].any()


def clicks(number: int, masks: list[np.ndarray], **settings: Any) -> Any:
    return draw_clicks(rng(number), SIZE, masks, WHOLE._replace(**settings), beside=True)


def test_the_drawn_points_are_shared_between_objects_and_the_rest() -> None:
    found = clicks(0, [LARGE], max_points=20, object_share=0.25)
    assert int((found.objects == NO_OBJECT).sum()) == 15
    few = clicks(0, [APART], max_points=40, object_share=0.9)  # not so many lie on it
    on = int(objects_under(point_grid(8, SIZE), [APART]).sum())
    assert int((few.objects != NO_OBJECT).sum()) == on
    assert len(few.objects) == 40
    many = clicks(0, [np.ones(SIZE, np.bool_)], max_points=20, object_share=0.25)  # nothing lies beside it
    assert many.objects.tolist() == [0] * 20


def test_small_objects_get_as_many_points_as_large_ones_as_far_as_they_go() -> None:
    found = clicks(3, [square(0, 0, 44, 40), square(46, 8, 62, 36)], max_points=8, object_share=1.0)
    assert [int((found.objects == which).sum()) for which in (0, 1)] == [4, 4]


def test_the_shift_is_drawn_and_hits_what_lies_between_the_points() -> None:
    between = square(8, 5, 10, 6)
    assert not objects_under(point_grid(8, SIZE), [between]).any()
    hits = [bool((clicks(number, [LARGE, between], jitter=True).objects == 1).any()) for number in range(200)]
    assert 0.02 < np.mean(hits) < 0.25  # of a cell of 40 pixels it covers 2
    still = [bool((clicks(number, [LARGE, between]).objects == 1).any()) for number in range(20)]
    assert not any(still)


def test_where_no_point_hits_any_object_the_grid_is_shifted_onto_one() -> None:
    between = square(1, 0, 3, 1)
    for number in range(30):
        found = draw_clicks(rng(number), SIZE, [between], WHOLE, beside=False)
        assert found.objects.tolist() == [0]
        assert objects_under(found.points, [between]).all()
        cell = np.array([SIZE[1], SIZE[0]]) / 8
        np.testing.assert_allclose((found.points[0] / cell) % 1, (np.round(found.points[0]) / cell) % 1, atol=1e-5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_small(tmp_path / "data")


def build(
    settings: DatasetConfig, *, prompts: PromptConfig | None = None, seed: int = 0, **everything: Any
) -> SegmentationDataset:
    return settings.build_train(
        image_size=64,
        seed=seed,
        prompts=prompts or PromptConfig(),
        augmentation=AugmentationConfig(),
        everything=EverythingConfig(**{"max_points": 12, **everything}),
    )


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.prompts.point_coords, other.prompts.point_coords) and torch.equal(one.masks, other.masks)


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(root: Path) -> None:
    settings = config(root, mode="everything", grid_points=10)
    first, again, other = build(settings), build(settings), build(settings, seed=1)
    key = SampleKey(2, 1)
    assert same(first[key], again[key])
    assert not same(first[key], first[SampleKey(3, 1)])
    assert not same(first[key], other[key])


def test_each_point_of_a_sample_lies_on_its_target_in_the_augmented_frame(root: Path) -> None:
    dataset = build(config(root, mode="everything", grid_points=10), unlabelled="negative")
    for epoch in range(6):
        for index in range(len(dataset)):
            sample = dataset[SampleKey(epoch, index)]
            assert sample.target_of is not None
            assert sample.background is not None
            assert torch.equal(sample.background, ~sample.labelled)
            height, width = sample.input_size
            for row, target in enumerate(sample.target_of):
                x, y = sample.prompts.point_coords[row, 0]
                assert 0 <= x < width
                assert 0 <= y < height
                cell = sample.masks[target, int(min(y + 0.5, height - 1)) // 4, int(min(x + 0.5, width - 1)) // 4]
                assert bool(cell > 0) is bool(sample.labelled[row])


def test_fixed_prompts_stand_on_the_unshifted_grid_in_every_epoch(root: Path) -> None:
    settings = config(root, mode="everything", grid_points=10)
    still = AugmentationConfig(enable=False)
    fixed = PromptConfig(fixed=True)
    dataset = build(settings, prompts=fixed, boxes=1).varied(fixed.build("everything"), still.build())
    first, later = dataset[SampleKey(0, 1)], dataset[SampleKey(5, 1)]
    assert same(first, later)
    grid = {tuple(point) for point in point_grid(10, first.input_size).astype(np.float32).tolist()}
    assert {tuple(point) for point in first.prompts.point_coords[:-1, 0].tolist()} <= grid


def test_boxes_join_the_points(root: Path) -> None:
    sample = build(config(root, mode="everything", grid_points=10), boxes=2)[SampleKey(0, 1)]
    boxed = sample.prompts.point_labels[:, 0] == BOX_TOP_LEFT
    assert boxed.tolist() == [False] * (len(boxed) - 2) + [True] * 2
    assert bool((sample.prompts.point_labels[boxed, 1] == BOX_BOTTOM_RIGHT).all())
    assert sample.target_of is not None
    assert bool(sample.labelled[boxed].all())
    for row in torch.nonzero(boxed).flatten():
        (x0, y0), (x1, y1) = (sample.prompts.point_coords[row] / 4).tolist()
        rows, columns = torch.nonzero(sample.masks[sample.target_of[row]] > 0.5, as_tuple=True)
        assert x0 - 2 <= float(columns.float().mean()) <= x1 + 2
        assert y0 - 2 <= float(rows.float().mean()) <= y1 + 2


def test_targets_of_a_batch_point_at_the_masks_of_all_samples(root: Path) -> None:
    dataset = build(config(root, mode="everything", grid_points=10), unlabelled="negative")
    samples = [dataset[SampleKey(0, index)] for index in range(3)]
    batch = collate(samples)
    assert batch.target_of is not None
    assert batch.background is not None
    expected = [sample.masks[sample.target_of] for sample in samples if sample.target_of is not None]
    assert torch.equal(batch.masks[batch.target_of], torch.cat(expected))
    assert len(batch.masks) == sum(len(sample.masks) for sample in samples) < len(batch.labelled)


def test_a_mask_that_cannot_be_read_leaves_no_negatives(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    dataset = build(config(root, mode="everything", grid_points=10, broken="skip"), unlabelled="negative")
    key = SampleKey(0, 1)
    assert bool(dataset[key].background.any())  # type: ignore[union-attr]
    masks = dataset.records[1].open_masks
    assert masks is not None
    save(np.zeros((8, 8), np.uint8), Path(masks((48, 64)).name(0)))
    sample = dataset[key]
    assert sample.skipped
    assert bool(sample.labelled.all())


def test_what_is_no_object_of_its_own_gives_no_negatives(root: Path) -> None:
    key, still = SampleKey(0, 1), AugmentationConfig(enable=False).build()

    def sample(min_area: int, *, is_complete: bool = True, crowded: bool = False) -> Sample:
        settings = config(root, mode="everything", grid_points=20, min_area=min_area)
        dataset = build(settings, unlabelled="negative", max_points=None, jitter=False)
        dataset = dataset.varied(PromptConfig().build("everything"), still)
        crowd = partial(open_segmentations, (("crowd", [[0, 0, 32, 0, 32, 48, 0, 48]]),), (48, 64)) if crowded else None
        return dataset.of_records(
            [one._replace(is_complete=is_complete, open_crowds=crowd) for one in dataset.records]
        )[key]

    whole = sample(1)
    largest = int(16 * whole.masks.sum(dim=(1, 2)).max())
    some, none = sample(largest - 1), sample(1, is_complete=False)
    assert whole.background is not None
    assert some.background is not None
    assert none.background is not None
    assert int(some.labelled.sum()) < int(whole.labelled.sum())
    assert int(some.background.sum()) == int(whole.background.sum()) > 0
    assert not bool(none.background.any())
    beside = sample(1, crowded=True)
    assert beside.background is not None
    columns = [one.prompts.point_coords[one.background][:, 0, 0] / one.input_size[1] for one in (whole, beside)]
    assert float(columns[0].min()) < 0.4
    assert 0.48 < float(columns[1].min()) < 0.6
