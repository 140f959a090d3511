"""`samlet store`: every flipped bit found, repaired by extracting again; other dtypes and forms; sizes."""

from __future__ import annotations

import os
import random
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from samlet.distill.store import Shard, StoreReader, decoded, open_store
from samlet.errors import SamletError
from samlet.recipes.store import convert, du, info, verify
from tests.distill.stores import FEATURES, add, contents, fill, identity, maps_of, write_decoder

IMAGES = ["a", "deep/b", "c"]


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which only a power cut would notice


def say(command: object, *arguments: object, **options: object) -> tuple[int, str]:
    place = StringIO()
    code = command(*arguments, console=Console(file=place, width=200), **options)  # type: ignore[operator]
    return code, place.getvalue()


def flip(place: Path, position: int, bit: int) -> None:
    content = bytearray(place.read_bytes())
    content[position] ^= 1 << bit
    place.write_bytes(content)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_every_flipped_bit_is_found_and_repaired(tmp_path: Path, dtype: str, pack: bool) -> None:
    kind = identity(dtype=dtype, augmentation={}, variants=2)
    fill(tmp_path, kind, IMAGES, pack=pack)
    assert verify(tmp_path) == 0
    whole, chance = contents(tmp_path), random.Random(0)
    places = [(name, position) for name, content in whole.items() for position in range(len(content))]
    for name, position in chance.sample(places, 75):  # 300 in all
        flip(tmp_path / name, position, chance.randrange(8))
        try:
            code, said = say(verify, tmp_path)
        except SamletError as error:
            code, said = 2, str(error)
        assert code == 2, (name, position)
        assert name in said
        assert "extract" in said
        if chance.random() < 0.2 and name != "manifest.json":
            verify(tmp_path, repair_it=True, console=Console(file=StringIO()))
            fill(tmp_path, kind, IMAGES, pack=pack)
            assert contents(tmp_path) == whole
        (tmp_path / name).write_bytes(whole[name])


@pytest.mark.parametrize("pack", [False, True])
def test_cut_missing_and_stray_files_are_found_and_repaired(tmp_path: Path, pack: bool) -> None:
    kind = identity(dtype="int8")
    fill(tmp_path, kind, IMAGES, pack=pack)
    whole = contents(tmp_path)
    for name, content in whole.items():
        if name == "manifest.json":
            continue
        for harm in ("cut", "longer", "missing"):
            place = tmp_path / name
            place.write_bytes({"cut": content[:-1], "longer": content + b"\0", "missing": b""}[harm])
            if harm == "missing":
                place.unlink()
            assert say(verify, tmp_path)[0] == 2, (name, harm)
            verify(tmp_path, repair_it=True)
            fill(tmp_path, kind, IMAGES, pack=pack)
            assert contents(tmp_path) == whole, (name, harm)
    for name in ("train/z_embedding.npy", "train/deep/.b_embedding.npy.12.34.tmp", "train/packs/00009.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        code, said = say(verify, tmp_path)
        assert code == 2
        assert "nothing vouches for" in said
        assert name in said
        assert verify(tmp_path, repair_it=True) == 0
        assert contents(tmp_path) == whole
    (tmp_path / "train" / "notes.txt").write_text("mine")
    code, said = say(verify, tmp_path, repair_it=True)
    assert code == 2
    assert "left alone" in said
    assert (tmp_path / "train" / "notes.txt").read_text() == "mine"


def test_repair_loses_the_damaged_image_alone(tmp_path: Path) -> None:
    for pack in (False, True):
        root = tmp_path / str(pack)
        fill(root, identity(shards=1), IMAGES, pack=pack)
        if pack:
            place = root / "train" / "packs" / "00000.safetensors"
            flip(place, place.read_bytes().index(maps_of("c")["embedding"].tobytes()), 3)
        else:
            flip(root / "train" / "c_embedding.npy", 130, 3)
        assert verify(root, repair_it=True) == 0
        reader = StoreReader(root, "train")
        assert sorted(name for name, _ in reader.entries) == ["a", "deep/b"]
        for name in ("a", "deep/b"):
            assert np.array_equal(reader.read(name, 0, FEATURES)["embedding"], maps_of(name)["embedding"])


def test_unfinished_is_not_whole(tmp_path: Path) -> None:
    kind = open_store(tmp_path, identity(shards=1), write_decoder)
    shard = Shard(tmp_path, "train", 0, kind)
    add(shard, "a")
    code, said = say(verify, tmp_path)
    assert code == 2
    assert "shard 0 of train" in said
    assert "0 of 1" in say(info, tmp_path)[1]
    shard.finish(pack=False)
    assert verify(tmp_path) == 0


@pytest.mark.parametrize(("old", "new"), [("fp32", "fp16"), ("fp32", "int8"), ("fp16", "int8"), ("int8", None)])
@pytest.mark.parametrize("pack", [False, True])
def test_a_converted_store_is_one_extracted_so(tmp_path: Path, old: str, new: str | None, pack: bool) -> None:
    fill(tmp_path / "s", identity(dtype=old), IMAGES, pack=not pack)
    code, said = say(convert, tmp_path / "s", tmp_path / "out", dtype=new, pack=pack)
    assert code == 0
    assert (new or old) in said
    assert verify(tmp_path / "out") == 0
    fill(tmp_path / "direct", identity(dtype=new or old), IMAGES, pack=pack)
    if old != "fp16":  # which has rounded before
        assert contents(tmp_path / "out") == contents(tmp_path / "direct")
    before, after = StoreReader(tmp_path / "s", "train"), StoreReader(tmp_path / "out", "train")
    for name in IMAGES:
        pair = [decoded(reader.read(name, 0, FEATURES))["embedding"] for reader in (before, after)]
        torch.testing.assert_close(*pair, atol=0.02, rtol=0)


def test_what_convert_refuses(tmp_path: Path) -> None:
    fill(tmp_path / "s", identity(dtype="int8"), IMAGES)
    with pytest.raises(SamletError, match="is stored as int8 and cannot become fp16; extract again with dtype fp16"):
        convert(tmp_path / "s", tmp_path / "out", dtype="fp16")
    for out in ("s", "s/inner", "."):
        with pytest.raises(SamletError, match="give another folder"):
            convert(tmp_path / "s", tmp_path / out)
    fill(tmp_path / "other", identity(dtype="int8", teacher="other"), ["a"])
    with pytest.raises(SamletError, match="teacher is 'other' there"):
        convert(tmp_path / "s", tmp_path / "other")
    flip(tmp_path / "s" / "train" / "c_embedding.npy", 130, 0)
    with pytest.raises(SamletError, match=r"c_embedding\.npy: damaged.*samlet store verify"):
        convert(tmp_path / "s", tmp_path / "out")
    (tmp_path / "s" / "train" / "shards" / "00000.json").unlink()
    with pytest.raises(SamletError, match="shard 0 of train is unfinished"):
        convert(tmp_path / "s", tmp_path / "out2")


def test_info_and_du_say_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path, identity(augmentation={"seed": 0}, variants=2), IMAGES)
    fill(tmp_path, identity(augmentation={"seed": 0}, variants=2), IMAGES, split="val", pack=True)
    code, said = say(info, tmp_path)
    assert code == 0
    for word in ("SAM-B", "vit_b", "abababababab", "fp32", "train", "val", "2 of 2", "6"):
        assert word in said
    code, said = say(du, tmp_path)
    assert code == 0
    for word in ("embedding", "blocks.1@neck", "packs", "manifests", "decoder.safetensors", "12 image-variants"):
        assert word in said
    for command in (info, du, verify):
        with pytest.raises(SamletError, match="holds no teacher features"):
            say(command, tmp_path / "nowhere")
