"""Samples, batches and validation images: one image with all its objects, and nothing skipped in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, PromptConfig
from samlet.data.dataset import SegmentationDataset, ValidationSet
from samlet.data.masks import centre_point
from samlet.data.prompts import PromptSettings
from samlet.data.records import MaskFiles
from samlet.data.sampler import SampleKey
from samlet.data.splits import pick, train_split, withhold_labels
from samlet.data.synthetic import write_dataset
from samlet.errors import DataError
from samlet.frames import preprocess
from samlet.types import Sample
from tests.data.builders import config, disc, picture, save, write_small, write_split
from tests.data.test_images import photograph

PLAIN = AugmentationConfig(enable=False)


def build(
    settings: DatasetConfig, augmentation: AugmentationConfig = PLAIN, size: int = 64, seed: int = 0
) -> SegmentationDataset:
    return settings.build_train(image_size=size, seed=seed, prompts=PromptConfig(), augmentation=augmentation)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_small(tmp_path / "data")


def _valid(sample: Sample, side: int) -> None:
    count = len(sample.labelled)
    assert count >= 1
    assert sample.masks.shape == (count, side // 4, side // 4)
    assert sample.prompts.image_index.tolist() == [0] * count
    height, width = sample.input_size
    assert not sample.pixels[:, height:].any()
    assert not sample.pixels[:, :, width:].any()
    assert bool((sample.masks.flatten(1).sum(1) > 0).eq(sample.labelled).all())
    real = sample.prompts.point_labels >= 0
    coords = sample.prompts.point_coords[real]
    assert bool((coords >= 0).all())
    assert bool((coords <= torch.tensor([width, height])).all())


def test_a_sample_is_one_image_with_its_objects(root: Path) -> None:
    dataset = build(config(root, objects_per_image=2))
    sample = dataset[SampleKey(0, 3)]
    _valid(sample, 64)
    assert len(sample.labelled) == 2
    assert sample.image_id == "im003" == dataset.image_ids[3]
    assert sample.masks.dtype == torch.float32
    assert sample.skipped == ()


def test_augmented_samples_are_sound_and_repeatable(root: Path) -> None:
    wild = AugmentationConfig(scale=(0.5, 2.5), crop=0.4, vertical_flip=0.5)
    dataset = build(config(root), wild)
    for epoch in range(12):
        for index in range(6):
            sample = dataset[SampleKey(epoch, index)]
            _valid(sample, 64)
            assert sample.skipped == ()
            assert torch.equal(sample.pixels, dataset[SampleKey(epoch, index)].pixels)


def test_dataset_pixels_are_the_predictors_to_the_bit(tmp_path: Path) -> None:
    place = tmp_path / "data" / "train"
    for number, size in enumerate([(40, 64), (64, 40), (100, 30), (33, 47)]):
        save(picture(size, number), place / "image" / f"{number}.png")
        save(disc(size, 15, 15, 8), place / "mask" / f"{number}.png")
    dataset = build(config(tmp_path / "data", val_fraction=0.01))
    for index, name in enumerate(dataset.image_ids):
        sample = dataset[SampleKey(5, index)]
        pixels, size = preprocess(picture([(40, 64), (64, 40), (100, 30), (33, 47)][int(name)], int(name)), 64)
        assert torch.equal(sample.pixels, pixels)
        assert sample.input_size == size


def test_the_draw_of_objects_varies_and_reads_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path / "train", images=2, objects=30)
    dataset = build(config(tmp_path, objects_per_image=4, val_fraction=0.1))
    reads: list[int] = []
    original = MaskFiles.read

    def counted(self: MaskFiles, index: int) -> np.ndarray:
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(MaskFiles, "read", counted)
    for epoch in range(20):
        dataset[SampleKey(epoch, 0)]
    assert len(reads) == 80
    assert len(set(reads)) > 25


def test_prompts_of_an_object_do_not_depend_on_which_others_are_drawn(root: Path) -> None:
    few, many = build(config(root, objects_per_image=1)), build(config(root, objects_per_image=3))
    first, second = few[SampleKey(0, 0)], many[SampleKey(0, 0)]
    width = first.prompts.point_coords.shape[1]
    assert torch.equal(first.masks[0], second.masks[0])
    assert torch.equal(first.prompts.point_coords[0], second.prompts.point_coords[0, :width])


def test_mixed_token_counts_are_padded_with_holes_and_only_then(root: Path) -> None:
    base = build(config(root))

    def samples(mode: str) -> list[Sample]:
        settings = PromptConfig().build(mode)  # type: ignore[arg-type]
        dataset = SegmentationDataset(base.records, image_size=64, seed=0, prompts=settings)
        return [dataset[SampleKey(0, index)] for index in range(2)]

    points, boxes = samples("point"), samples("box")
    assert all(sample.prompts.absent is None for sample in (*points, *boxes))
    assert collate([*points, *boxes]).prompts.absent is None
    both = SegmentationDataset(
        base.records, image_size=64, seed=0, prompts=PromptSettings("mixed", (1, 3), (0, 2), 0.1, (1, 1, 1))
    )
    batch = collate([points[0], *(both[SampleKey(epoch, 1)] for epoch in range(4))])
    prompts = batch.prompts
    assert prompts.absent is not None
    assert prompts.image_index.tolist() == sorted(prompts.image_index.tolist())
    assert set(prompts.image_index.tolist()) == set(range(5))
    assert bool((prompts.point_labels[prompts.absent] == -1).all())
    assert not prompts.point_coords[prompts.absent].any()
    for labels, absent in zip(prompts.point_labels, prompts.absent, strict=True):
        tokens = labels[~absent].tolist()
        assert tokens[-2:] == [2, 3] or tokens.count(-1) == 1
        assert absent.tolist() == sorted(absent.tolist())
    assert batch.masks.shape[0] == batch.labelled.shape[0] == prompts.point_labels.shape[0]
    assert batch.input_sizes.tolist() == [[48, 64]] * 5


def test_unlabelled_images_are_refused_or_prompted_blind(root: Path) -> None:
    save(picture(), root / "train" / "images" / "bare.png")
    with pytest.raises(DataError, match=r"(?s)1 of 7 images have no masks.*unlabelled.*bare\.png"):
        build(config(root))
    dataset = build(config(root, unlabelled="use", objects_per_image=5))
    assert dataset.num_labelled == 6
    sample = dataset[SampleKey(0, dataset.image_ids.index("bare"))]
    _valid(sample, 64)
    assert len(sample.labelled) == 5
    assert not sample.labelled.any()
    assert not sample.masks.any()


def test_unlabelled_images_can_be_left_out(root: Path) -> None:
    save(picture(), root / "train" / "images" / "bare.png")
    assert "bare" not in build(config(root, unlabelled="drop")).image_ids
    few = build(config(root, unlabelled="drop", labelled_fraction=0.3))
    use = build(config(root, unlabelled="use", labelled_fraction=0.3))
    labelled = {record.image_id for record in use.records if record.open_masks}
    assert set(few.image_ids) == labelled
    assert few.num_labelled == len(few) == use.num_labelled == 2


def test_blind_prompts_follow_the_mode(root: Path) -> None:
    for mode, labels in (("point", {1, -1}), ("box", {2, 3})):
        dataset = build(config(root, unlabelled="use", labelled_fraction=0.0, mode=mode))
        found = {
            int(label) for epoch in range(4) for label in dataset[SampleKey(epoch, 0)].prompts.point_labels.ravel()
        }
        assert found == labels


def test_the_labelled_share_is_fixed_by_seed_and_id(root: Path) -> None:
    write_split(root / "train", images=40, objects=1)
    settings = config(root, unlabelled="use", labelled_fraction=0.2)
    chosen = {record.image_id for record in train_split(settings, 3).records if record.open_masks}
    assert len(chosen) == 8
    assert chosen == {record.image_id for record in train_split(settings, 3).records if record.open_masks}
    assert chosen != {record.image_id for record in train_split(settings, 4).records if record.open_masks}
    records = train_split(config(root), 3).records
    assert chosen == pick(list(reversed(records)), 0.2, 3)
    assert chosen < pick(records, 0.5, 3)  # more labels are a superset: curves over the fraction are nested
    assert len([record for record in withhold_labels(records, 0.101, 0) if record.open_masks]) == 5


def test_a_single_split_is_divided_without_overlap(tmp_path: Path) -> None:
    write_split(tmp_path, images=10, objects=1)
    settings = config(tmp_path, val_fraction=0.3)
    train, val = build(settings), settings.build_val(seed=0)
    assert len(train) == 7
    assert len(val) == 3
    assert not set(train.image_ids) & set(val.image_ids)


@pytest.fixture
def broken(root: Path) -> Path:
    """One image without a sound header, one that is truncated, one object with an empty mask."""
    folder = root / "train" / "images"
    (folder / "im000.png").write_bytes(b"<html>")
    whole = (folder / "im002.png").read_bytes()
    (folder / "im002.png").write_bytes(whole[: len(whole) // 2])
    save(np.zeros((48, 64), np.uint8), root / "train" / "masks" / "im004" / "0.png")
    return root


def test_broken_files_stop_training_with_their_paths(broken: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)cannot be used.*im000\.png"):
        build(config(broken))
    os.remove(broken / "train" / "images" / "im000.png")
    for mask in (broken / "train" / "masks" / "im000").iterdir():
        mask.unlink()
    dataset = build(config(broken))
    with pytest.raises(DataError, match=r"im002\.png"):
        dataset[SampleKey(0, dataset.image_ids.index("im002"))]
    with pytest.raises(DataError, match=r"im004.0\.png.*empty"):
        dataset[SampleKey(0, dataset.image_ids.index("im004"))]


def test_broken_files_are_skipped_and_counted_if_asked(broken: Path) -> None:
    dataset = build(config(broken, broken="skip"))
    assert [Path(problem.path).name for problem in dataset.problems if problem.level == "error"][-1] == "im000.png"
    assert "im000" not in dataset.image_ids
    at = dataset.image_ids.index("im002")
    sample = dataset[SampleKey(2, at)]
    following = dataset[SampleKey(2, at + 1)]
    assert sample.image_id == following.image_id == "im003"
    assert torch.equal(sample.pixels, following.pixels)
    assert len(sample.skipped) == 1
    assert "im002.png" in sample.skipped[0]
    part = dataset[SampleKey(0, dataset.image_ids.index("im004"))]
    assert len(part.labelled) == 2
    assert collate([sample, part]).skipped == (*sample.skipped, *part.skipped)
    assert "im004/0.png" in part.skipped[0]


def test_where_nothing_can_be_read_it_says_so(tmp_path: Path) -> None:
    place = write_split(tmp_path / "train", images=2)
    dataset = build(config(tmp_path, broken="skip", val_fraction=0.1))
    for path in (place / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="None of 1 images"):
        dataset[SampleKey(0, 0)]


def test_objects_too_small_to_see_leave_a_reported_blind_sample(tmp_path: Path) -> None:
    place = tmp_path / "train"
    for name in "ab":
        save(picture((300, 400)), place / "images" / f"{name}.png")
        save(disc((300, 400), 50, 50, 2), place / "masks" / f"{name}.png")
    dataset = build(config(tmp_path), AugmentationConfig())
    sample = dataset[SampleKey(0, 0)]
    assert not sample.labelled.any()
    assert "none of its objects has 9 pixels" in sample.skipped[0]


def test_an_object_that_the_crop_lost_is_found_unaugmented(tmp_path: Path) -> None:
    place = tmp_path / "train"
    for name in "ab":
        save(picture((64, 64)), place / "images" / f"{name}.png")
        save(disc((64, 64), 5, 5, 4), place / "masks" / f"{name}.png")
    dataset = build(config(tmp_path), AugmentationConfig(scale=(4.0, 4.0), horizontal_flip=0))
    for epoch in range(10):
        sample = dataset[SampleKey(epoch, 0)]
        assert sample.labelled.all()
        assert sample.skipped == ()


def test_validation_holds_every_object_at_the_original_resolution(root: Path) -> None:
    val = config(root).build_val(seed=0)
    item = val.item(1)
    assert item.image.shape == (48, 64, 3)
    assert item.masks.shape == (3, 48, 64)
    assert item.points.tolist() == [list(map(float, centre_point(mask))) for mask in item.masks]
    for mask, (x0, y0, x1, y1) in zip(item.masks, item.boxes.astype(int), strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
    again = config(root).build_val(seed=9).item(1)
    assert np.array_equal(item.points, again.points)
    assert len(list(val)) == len(val) == 2


def test_validation_refuses_or_reports_what_is_broken(root: Path) -> None:
    save(np.zeros((48, 64), np.uint8), root / "val" / "masks" / "im001" / "1.png")
    with pytest.raises(DataError, match="empty"):
        config(root).build_val(seed=0).item(1)
    item = config(root, broken="skip").build_val(seed=0).item(1)
    assert len(item.masks) == 2
    assert "1.png" in item.skipped[0]
    records = config(root).build_val(seed=0).records
    (root / "val" / "images" / "im000.png").write_bytes(b"")
    assert ValidationSet(records, broken="skip").item(0).masks.shape[0] == 0


def test_no_split_and_no_masks_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image that can be used"):
        build(config(tmp_path))
    save(picture(), tmp_path / "images" / "a.png")
    save(picture(seed=1), tmp_path / "images" / "b.png")
    with pytest.raises(DataError, match="validation split 'val' has masks"):
        config(tmp_path, unlabelled="use").build_val(seed=0)


def test_labelled_images_may_come_more_often(tmp_path: Path) -> None:
    write_dataset(tmp_path, num_train=10, num_val=1, image_size=64, seed=0)
    config = DatasetConfig(root=tmp_path, labelled_fraction=0.2, labelled_repeat=4, unlabelled="use")
    ids = config.build_train(image_size=64, seed=0, prompts=PromptConfig(), augmentation=AugmentationConfig()).image_ids
    assert sorted(ids.count(name) for name in set(ids)) == [1] * 8 + [4] * 2


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three JPEGs, two of them large (one lying on its side) and one small, each with a mask of its bright square."""
    for name, size, orientation in (("large", (403, 601), 1), ("lying", (601, 403), 6), ("small", (80, 120), 1)):
        photograph(tmp_path / "train" / "images" / f"{name}.jpg", size, orientation)
        mask = np.zeros(size, np.bool_)
        mask[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = True
        save(mask, tmp_path / "train" / "masks" / f"{name}.png")
    return tmp_path


def test_large_jpegs_may_be_decoded_smaller_and_masks_still_lie_on_the_object(photographs: Path) -> None:
    wild = AugmentationConfig(
        scale=(0.8, 1.2), crop=0.2, vertical_flip=0.5, brightness=0, contrast=0, saturation=0, horizontal_flip=0.5
    )
    for augmentation in (PLAIN, wild):
        full, scaled = (
            build(config(photographs, val_fraction=0.01, scaled_decode=asked), augmentation) for asked in (False, True)
        )
        for index, name in enumerate(full.image_ids):
            for epoch in range(4):
                one, other = full[SampleKey(epoch, index)], scaled[SampleKey(epoch, index)]
                assert torch.equal(one.masks, other.masks)
                assert torch.equal(one.prompts.point_coords, other.prompts.point_coords)
                assert one.input_size == other.input_size
                assert full.variation(SampleKey(epoch, index)) == scaled.picture(SampleKey(epoch, index)).variation
                difference = (one.pixels - other.pixels).abs() * 57  # in grey levels, about
                assert bool(difference.any()) == (name != "small")
                assert difference.mean() < 1
                assert difference.max() < 60  # at the square's edges; 190 is its height
                height, width = other.input_size
                bright = (other.pixels[2, :height, :width] * 57.375 + 103.53) > 125
                inside = one.masks[0].repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
                assert (_middle(bright.float()) - _middle(inside)).abs().max() < 1


def _middle(weights: torch.Tensor) -> torch.Tensor:
    sums = [weights.sum(dim) for dim in (0, 1)]
    return torch.stack([(torch.arange(len(found)) + 0.5) @ found for found in sums]) / weights.sum()


def test_validation_never_decodes_smaller(photographs: Path) -> None:
    settings = config(photographs, val_fraction=0.9, scaled_decode=True)
    assert {item.image.shape[:2] for item in settings.build_val(seed=0)} <= {(403, 601), (601, 403), (80, 120)}
