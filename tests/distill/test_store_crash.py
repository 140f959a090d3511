"""Killed at any moment, out of room at any byte: nothing half-written is read, and doing it again completes it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from samlet.distill.store import Shard, StoreReader, open_store
from samlet.distill.store.checking import check
from samlet.distill.store.conversion import convert
from samlet.errors import SamletError
from tests.distill.stores import FEATURES, add, contents, fill, identity, maps_of, write_decoder

IMAGES = [f"deep/{number}" for number in range(12)]

pytestmark = pytest.mark.usefixtures("unflushed")


def in_a_child(work: object) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()  # type: ignore[operator]
        code = 0
    finally:
        os._exit(code)


def storm(work: object, root: Path, kills: int, seed: int) -> int:
    """Kill `work` at random moments until it ends by itself or `kills` hit; what is committed is whole each time."""
    moments, hits = random.Random(seed), 0
    while hits < kills:
        child = in_a_child(work)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        hits += 1
        if (root / "manifest.json").exists():
            reader = StoreReader(root, "train")
            for image_id, variant in reader.entries:
                found = reader.read(image_id, variant, FEATURES)
                np.testing.assert_array_equal(found["embedding"], maps_of(image_id, variant)["embedding"])
    return hits


@pytest.mark.parametrize("pack", [False, True])
def test_killed_again_and_again(tmp_path: Path, pack: bool) -> None:
    kind = identity(augmentation={}, variants=2)
    fill(tmp_path / "peaceful", kind, IMAGES[:8])
    fill(tmp_path / "peaceful", kind, IMAGES, pack=pack)
    hits = 0
    for seed in range(4):
        root = tmp_path / f"stormy{seed}"
        hits += storm(lambda root=root: fill(root, kind, IMAGES[:8], pack=not pack), root, 4, seed)
        hits += storm(lambda root=root: fill(root, kind, IMAGES, pack=pack), root, 4, seed)
        fill(root, kind, IMAGES, pack=pack)
        assert contents(root) == contents(tmp_path / "peaceful")
        assert check(root).sound
    assert hits >= 10


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    fill(tmp_path / "s", identity(), IMAGES)
    convert(tmp_path / "s", tmp_path / "peaceful", "int8", True)
    hits = 0
    for seed in range(4):
        root = tmp_path / f"stormy{seed}"
        while hits < 8 * (seed + 1):
            child = in_a_child(lambda root=root: convert(tmp_path / "s", root, "int8", True))
            time.sleep(random.Random(hits).uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            hits += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
            if (root / "train" / "packs").exists() and check(root).sound:
                break
        convert(tmp_path / "s", root, "int8", True)
        assert contents(root) == contents(tmp_path / "peaceful")


def test_a_torn_last_line_does_not_count_and_is_cut_off(tmp_path: Path) -> None:
    kind = open_store(tmp_path, identity(shards=1), write_decoder)
    shard = Shard(tmp_path, "train", 0, kind)
    for name in ("a", "b"):
        add(shard, name)
    journal = tmp_path / "train" / "shards" / "00000.jsonl"
    whole = journal.read_bytes()
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        journal.write_bytes(whole[:cut])
        committed = whole[:cut].count(b"\n")
        again = Shard(tmp_path, "train", 0, kind)
        assert [name for name, _ in again.entries] == ["a", "b"][:committed]
        if cut % 5 == 0:
            add(again, "c")
            found = [name for name, _ in Shard(tmp_path, "train", 0, kind).entries]
            assert found == [*["a", "b"][:committed], "c"]


def test_a_writer_whose_shard_another_finished_stops(tmp_path: Path) -> None:
    kind = open_store(tmp_path, identity(shards=1), write_decoder)
    late = Shard(tmp_path, "train", 0, kind)
    add(late, "a")
    Shard(tmp_path, "train", 0, kind).finish(pack=False)
    with pytest.raises(SamletError, match=r"00000\.jsonl: could not be written"):
        add(late, "b")
    assert Shard(tmp_path, "train", 0, kind).is_finished(pack=False)


@pytest.mark.parametrize("pack", [False, True])
def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, pack: bool) -> None:
    """On a file system of 256 KiB, where the machine lets us mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        root, names = mount / "s", [str(number) for number in range(100)]
        with pytest.raises(SamletError, match=r"could not be written \(.*[Nn]o space.*Make room"):
            fill(root, identity(), names, pack=pack)
        reader = StoreReader(root, "train")
        for image_id, variant in reader.entries:
            reader.read(image_id, variant, FEATURES)
        assert reader.entries
        subprocess.run(["mount", "-o", "remount,size=4m", str(mount)], check=True)
        fill(root, identity(), names, pack=pack)
        fill(tmp_path / "roomy", identity(), names, pack=pack)
        assert contents(root) == contents(tmp_path / "roomy")
    finally:
        subprocess.run(["umount", str(mount)], check=False)
