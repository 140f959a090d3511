"""Drawn scenes: exact masks, pure functions of the seed, quick to write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from samlet.data.images import read_image
from samlet.data.sampler import SampleKey
from samlet.data.streams import Stream, generator
from samlet.data.synthetic import draw_scene, write_dataset
from tests.data.builders import config
from tests.data.test_dataset import build


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.png")):
        digest.update(path.relative_to(root).as_posix().encode() + read_image(path).tobytes())
    return digest.hexdigest()


def test_scenes_are_pure_functions_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dataset(tmp_path / name, 3, 2, 64, seed)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b") != _digest(tmp_path / "c")
    assert _digest(tmp_path / "a" / "train") != _digest(tmp_path / "a" / "val")


def test_the_layout_is_the_seeds_and_trains(tmp_path: Path) -> None:
    write_dataset(tmp_path, 6, 3, 64, 0)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["image", "mask"]
    dataset = build(config(tmp_path))
    assert len(dataset) == 6
    assert {dataset[SampleKey(0, index)].input_size for index in range(3)} == {(64, 64), (48, 64), (64, 48)}
    assert len(config(tmp_path).build_val(seed=0)) == 3


def test_objects_do_not_overlap_and_can_be_told_from_the_ground() -> None:
    counts, contrasts = [], []
    for index in range(30):
        scene = draw_scene(generator(Stream.SCENE, 0, 0, index), (96, 128))
        assert scene.image.shape == (96, 128, 3)
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.any(axis=(1, 2)).all()
        counts.append(len(scene.masks))
        ground = scene.image[~scene.masks.any(axis=0)].mean(axis=0)
        contrasts += [float(np.abs(scene.image[mask].mean(axis=0) - ground).max()) for mask in scene.masks]
    assert 3 <= np.mean(counts) <= 8
    assert len(set(counts)) > 4
    assert float(np.median(contrasts)) > 20
