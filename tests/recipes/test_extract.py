"""`samlet extract`: what is missing is computed, nothing else; all ways leave the same bytes; disks are not filled."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import samlet.extraction
from samlet import cli
from samlet.config import RunConfig
from samlet.distill.store import Entry, Shard, StoreReader
from samlet.distill.store.checking import check
from samlet.engine import shard_team
from samlet.extraction import Extractor
from samlet.recipes.train import train
from samlet.run import plain_config
from tests.distill.stores import contents
from tests.tiny import tiny_config, write_scenes, write_teacher

NEVER_COMPARED = (".lock", ".leases/")
TAPS = {"encoder_patch": {"teacher_tap": "blocks.0", "student_tap": "blocks.-1", "projection": "neck"}}


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which only a power cut would notice


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes, 7 and 3, and a teacher."""
    folder = tmp_path_factory.mktemp("made")
    return write_scenes(folder / "scenes", train=7, val=3), write_teacher(folder / "teacher.pth")


@pytest.fixture
def scenes(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """Scenes that a test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "scenes"))


def written_config(scenes: Path, teacher: Path, root: Path, place: Path, **blocks: Any) -> Path:
    """A configuration's file; the store will be `root`/T."""
    distillation = {"enable": True, "use_precomputed_features": True, "precomputed_root": str(root), **TAPS}
    config = tiny_config(
        scenes,
        place.with_suffix(""),
        distillation={**distillation, **blocks.pop("distillation", {})},
        teachers=[{"name": "T", "checkpoint": str(teacher)}],
        augmentation=blocks.pop("augmentation", {"enable": False}),
        extraction={"splits": ["train", "val"], "images_per_shard": 3, **blocks.pop("extraction", {})},
        training={"max_steps": 1},
        **blocks,
    )
    place.write_text(json.dumps(plain_config(config)))
    return place


def samlet_extract(*words: object) -> int:
    """The exit code of the command, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["samlet", "extract", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def stored(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(root).items() if not name.startswith(NEVER_COMPARED)}


def images_of(scenes: Path, split: str = "train") -> list[Path]:
    return sorted((scenes / split / "image").iterdir())


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of the images that are committed meanwhile."""
    names, real = list[str](), Shard.add_stored

    def add_stored(shard: Shard, entry: Entry, arrays: Mapping[str, np.ndarray]) -> None:
        names.append(entry.image_id)
        real(shard, entry, arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "add_stored", add_stored)
        yield names


def test_the_plan_is_shown_and_what_is_there_is_kept(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, store = written_config(scenes, made[1], tmp_path / "stores", tmp_path / "c.json"), tmp_path / "stores/T"
    with watched() as names:
        assert samlet_extract(config) == 0
    assert len(names) == 10
    said = capfd.readouterr().out
    for words in (
        f"T -> {store}",
        "images      10, 10 to compute",
        " an image, ",
        " in all, ",
        " free",
        "time        about ",
    ):
        assert words in said
    assert check(store).sound
    whole = stored(store)

    with watched() as names:
        assert samlet_extract(config) == 0
    assert (names, stored(store)) == ([], whole)
    assert "10, 0 to compute" in capfd.readouterr().out

    edited = images_of(scenes)[2]
    Image.fromarray(np.asarray(Image.open(edited))[::-1]).save(edited)
    added = edited.with_name(f"added{edited.suffix}")
    shutil.copy(images_of(scenes)[0], added)
    shutil.copytree(scenes / "train" / "mask" / images_of(scenes)[1].stem, scenes / "train" / "mask" / "added")
    with watched() as names:
        assert samlet_extract(config) == 0
    assert sorted(names) == sorted([edited.stem, "added"])
    assert "11, 2 to compute" in capfd.readouterr().out
    assert check(store).sound
    fresh = written_config(scenes, made[1], tmp_path / "fresh", tmp_path / "f.json")
    assert samlet_extract(fresh) == 0
    arrays = [
        {name: content for name, content in stored(place).items() if name.endswith(".npy")}
        for place in (store, tmp_path / "fresh/T")
    ]
    assert arrays[0] == arrays[1]
    assert train(tiny_config_of(config)) == 0


def tiny_config_of(place: Path) -> Any:
    return RunConfig.model_validate_json(place.read_text())


def test_a_start_with_nothing_to_do_runs_no_network(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written_config(*made, tmp_path / "stores", tmp_path / "c.json")
    assert samlet_extract(config) == 0

    def encode(*_: object) -> None:
        raise AssertionError("the network ran")

    monkeypatch.setattr(Extractor, "encode", encode)
    assert samlet_extract(config) == 0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("teacher_sha256", {}),
        ("taps", {"distillation": {"encoder_patch": {}}}),
        ("dtype", {"extraction": {"dtype": "int8"}}),
        ("augmentation", {"augmentation": {"variants": 2}}),
    ],
)
def test_another_kind_of_features_in_the_same_folder_is_refused_by_the_name_of_the_field(
    made: tuple[Path, Path], tmp_path: Path, field: str, changes: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    scenes, teacher = made
    assert samlet_extract(written_config(scenes, teacher, tmp_path / "stores", tmp_path / "c.json")) == 0
    whole = stored(tmp_path / "stores/T")
    if field == "teacher_sha256":
        teacher = write_teacher(tmp_path / "other.pth", seed=5)
    other = written_config(scenes, teacher, tmp_path / "stores", tmp_path / "o.json", **changes)
    capfd.readouterr()
    assert samlet_extract(other) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"{field} is " in said[0]
    assert stored(tmp_path / "stores/T") == whole


def test_one_folder_for_two_teachers_is_refused_before_anything_is_computed(
    made: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_teacher(tmp_path / "other.pth", seed=5)
    two = [{"name": "A", "checkpoint": str(made[1])}, {"name": "B", "checkpoint": str(other)}]
    config = written_config(*made, tmp_path / "stores", tmp_path / "c.json")
    assert samlet_extract(config, f"teachers={json.dumps(two)}", "--store", tmp_path / "s") == 2
    assert "--store" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = written_config(*made, tmp_path / "stores", tmp_path / "c.json")
    with monkeypatch.context() as patch:
        patch.setattr(samlet.extraction.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 9000))  # type: ignore[attr-defined]
        assert samlet_extract(config) == 2
    captured = capfd.readouterr()
    assert "10 to compute" in captured.out
    (sentence,) = captured.err.strip().splitlines()
    for words in (str(tmp_path / "stores/T"), "needs", "are free", "make room", "int8"):
        assert words in sentence
    assert not (tmp_path / "stores/T/train").exists()
    assert samlet_extract(config) == 0


@pytest.mark.parametrize("pack", [False, True])
def test_a_full_disk_is_one_sentence_and_keeps_what_was_committed(
    made: tuple[Path, Path], tmp_path: Path, pack: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a small file system, where the machine lets us mount one: somebody else fills it after the plan was made."""
    mount = tmp_path / "small"
    mount.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=17m", "tmpfs", str(mount)]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        config = written_config(*made, mount, tmp_path / "c.json", extraction={"pack": pack})
        extractor = tmp_path / "room"
        roomy = written_config(*made, extractor, tmp_path / "r.json", extraction={"pack": pack})
        assert samlet_extract(roomy) == 0
        begin = sum(len(stored(extractor / "T")[name]) for name in ("manifest.json", "decoder.safetensors"))
        free = 4096 * (begin // 4096 + 30)
        (mount / "somebody").write_bytes(bytes(shutil.disk_usage(mount).free - free))
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samlet.extraction.Plan, "refuse_full_disk", lambda *_: None)
            assert samlet_extract(config) == 2
        (sentence,) = [line for line in capfd.readouterr().err.strip().splitlines() if "/10" not in line]
        assert "No space left" in sentence
        assert "ake room" in sentence
        entries = {split: StoreReader(mount / "T", split).entries for split in ("train", "val")}
        assert 0 < sum(map(len, entries.values())) < 10
        (mount / "somebody").unlink()
        with watched() as names:
            assert samlet_extract(config) == 0
        assert len(names) == 10 - sum(map(len, entries.values()))
        assert check(mount / "T").sound
        assert stored(mount / "T") == stored(tmp_path / "room/T")
    finally:
        subprocess.run(["umount", str(mount)], check=False)


@pytest.mark.parametrize("pack", [False, True])
def test_number_of_processes_and_batch_size_leave_the_same_bytes(
    made: tuple[Path, Path], tmp_path: Path, pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_team, "CONTEXT", multiprocessing.get_context("fork"))
    found = []
    for processes, batch in ((1, 1), (1, 8), (2, 3)):
        root = tmp_path / f"{processes}-{batch}"
        extraction = {"pack": pack, "batch_size": batch}
        config = written_config(*made, root, tmp_path / "c.json", extraction=extraction)
        assert samlet_extract(config, "--processes", processes) == 0
        assert check(root / "T").sound
        found.append(stored(root / "T"))
    assert found[0] == found[1] == found[2]
    assert any(name.endswith(".safetensors") and "packs" in name for name in found[0]) is pack


def test_a_broken_image_is_skipped_by_extraction_and_training_alike(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    victim = images_of(scenes)[1]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    config = written_config(scenes, made[1], tmp_path / "stores", tmp_path / "c.json")
    assert samlet_extract(config, "dataset.broken=skip") == 0
    assert len(StoreReader(tmp_path / "stores/T", "train").entries) == 6
    assert samlet_extract(config, "dataset.broken=skip", "--threads", 1) == 0
    plain = json.loads(config.read_text())
    plain["dataset"]["broken"] = "skip"
    plain["training"]["max_steps"] = 4
    assert train(RunConfig.model_validate_json(json.dumps(plain))) == 0
    assert os.listdir(tmp_path / "stores/T/.leases") == []
