"""Damaged, foreign and hostile files: one sentence each, and nothing is executed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from samlet.errors import CheckpointError
from samlet.models import load_sam, save_sam_safetensors, save_sam_upstream
from tests.models.sizes import small_sam


class Payload:
    """What an attacker's object does when it is unpickled: it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def refuse(path: Path, told: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        load_sam(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600


def bare_pickle(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


@pytest.mark.parametrize("place", ["alone", "beside_weights", "legacy", "as_a_key"])
def test_pickled_code_is_not_executed(place: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    state: dict[Any, Any] = dict(small_sam().state_dict())
    evil = Payload(canary)
    if place == "legacy":
        path.write_bytes(bare_pickle({**state, "evil": evil}))
    else:
        torch.save({"alone": evil, "beside_weights": {**state, "evil": evil}, "as_a_key": {evil: 1}}[place], path)
    refuse(path, "run code")
    assert not canary.exists()
    # The payload is a real one: what samlet refuses does run where pickles are trusted.
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_a_safetensors_name_on_pickled_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save(Payload(canary), tmp_path / "model.safetensors")
    refuse(tmp_path / "model.safetensors", "run code")
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "folder" / "student.safetensors")
    with pytest.raises(CheckpointError, match="run code"):
        load_sam(tmp_path / "folder")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\0" * 4096, "neither"),
        (b"\x80", "pickle"),
        (b"P", "neither"),
        (b"PK\x03\x04", "cut short"),
        (b"PK\x05\x06" + b"\0" * 18, "neither"),
        (b"\x02\0\0\0\0\0\0\0{}", "empty"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{", "damaged"),
        (b'{"model_type": "sam"}', "neither"),
    ],
)
def test_files_that_are_something_else(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refuse(path, told)


def test_no_file_and_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such file"):
        load_sam(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_sam(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has config\.json but no model\.safetensors"):
        load_sam(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.pt"
    path.write_bytes(b"PK")
    path.chmod(0)
    refuse(path, "cannot be read")


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_cut_and_flipped_files(form: str, tmp_path: Path) -> None:
    """Every truncation is refused; every flipped byte is refused, or was padding and changed no weight."""
    sam = small_sam()
    path = tmp_path / f"model.{form}"
    (save_sam_upstream if form == "pt" else save_sam_safetensors)(sam, path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    rng = random.Random(0)
    places = {
        0,
        1,
        7,
        8,
        9,
        100,
        len(content) - 1,
        len(content) // 2,
        *(rng.randrange(len(content)) for _ in range(12)),
    }
    places |= {rng.randrange(header if form == "safetensors" else 4000) for _ in range(12)}
    for place in sorted(places):
        path.write_bytes(content[:place])
        refuse(path)
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(flipped))
        with contextlib.suppress(CheckpointError):
            loaded = load_sam(path, image_size=64).state_dict()
            assert all(torch.equal(t, loaded[n]) for n, t in sam.state_dict().items()), place


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("holiday.jpg", b"...")
    refuse(tmp_path / "photos.pt", "damaged")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "it is empty"),
        ({"model": {"image_encoder.pos_embed": torch.zeros(1)}, "epoch": 3}, "save its part 'model' alone"),
        ({"state_dict": OrderedDict(a=torch.zeros(1)), "optimizer": {}}, "save its part 'state_dict' alone"),
        ({"a": torch.zeros(1), "note": "hello"}, "note is no tensor"),
        ({"module.image_encoder.pos_embed": torch.zeros(1)}, "DistributedDataParallel"),
        ({"image_encoder.trunk.pos_embed": torch.zeros(1), "sam_mask_decoder.x": torch.zeros(1)}, "SAM 2"),
        ({"vision_encoder.pos_embed": torch.zeros(1)}, "Hugging Face"),
        ({"patch_embed.proj.weight": torch.zeros(1)}, "an image encoder alone"),
        ({"fc.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, r"its parts: fc, layer1"),
        ({"image_encoder.pos_embed": torch.zeros(1)}, r"misses key image_encoder\.patch_embed"),
    ],
)
def test_foreign_checkpoints_say_what_was_found(content: object, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    refuse(tmp_path / "foreign.pt", told)


def test_nothing_in_the_room_unpickles_on_trust() -> None:
    import samlet.models

    sources = list(Path(samlet.models.__path__[0]).rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True)"), source
        assert "weights_only=False" not in text
        assert "allow_pickle" not in text


def test_a_poisoned_hf_config_is_only_read(tmp_path: Path) -> None:
    configs: tuple[Any, ...] = (
        {"model_type": "sam2"},
        {"model_type": "sam", "vision_config": 3},
        [],
        {"auto_map": {"A": "evil.py"}},
    )
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_sam_safetensors(small_sam(), tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_sam(tmp_path)


def altered(changes: dict[str, Callable[[torch.Tensor], torch.Tensor]], kind: str = "vit_t") -> dict[str, torch.Tensor]:
    state = dict(small_sam(kind).state_dict())
    return {**state, **{name: change(state.get(name, torch.zeros(1))) for name, change in changes.items()}}


TOKEN = "mask_decoder.iou_token.weight"


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("vit_t", {TOKEN: torch.Tensor.to_sparse}, "no plain tensor"),
        ("vit_t", {TOKEN: lambda x: x.to(torch.complex64)}, "complex64 values"),
        ("vit_t", {TOKEN: lambda x: x * float("nan")}, "NaN or infinite"),
        ("vit_t", {TOKEN: lambda x: x.half() / 0}, "NaN or infinite"),
        ("vit_t", {TOKEN: lambda x: x.to("meta")}, "no plain tensor"),
        ("vit_t", {TOKEN: lambda x: x[:, :1].clone().expand(1, 256)}, "not stored in full"),
        (
            "vit_t",
            {"image_encoder.patch_embed.seq.2.c.weight": lambda x: torch.zeros(1).expand(10**9, 8, 3, 3)},
            "1000000000 x 8 x 3 x 3 is not stored in full",
        ),
        (
            "vit_t",
            {"image_encoder.layers.2.blocks.3000000.mlp.fc1.weight": torch.clone},
            r"misses image_encoder\.layers\.2\.blocks\.2, but has image_encoder\.layers\.2\.blocks\.3000000$",
        ),
        ("vit_t", {"mask_decoder.transformer.layers.3000000.norm1.weight": torch.clone}, r"misses mask_decoder.*\.2,"),
        ("vit_b", {"image_encoder.blocks.4.norm1.weight": torch.clone}, r"misses image_encoder\.blocks\.3"),
        ("vit_b", {"image_encoder.pos_embed": lambda x: torch.zeros(1, 4, 8, 24)}, "1 x 4 x 8 x 24 is not square"),
        ("vit_t", {"pixel_mean": lambda x: torch.zeros(7)}, "pixel_mean is"),
    ],
)
def test_odd_tensors_are_named(
    kind: str, changes: dict[str, Callable[[torch.Tensor], torch.Tensor]], told: str, tmp_path: Path
) -> None:
    torch.save(altered(changes, kind), tmp_path / "odd.pt")
    refuse(tmp_path / "odd.pt", told)


def test_missing_relative_positions_are_named_at_another_size(tmp_path: Path) -> None:
    state = {name: value for name, value in small_sam("vit_b").state_dict().items() if "rel_pos_w" not in name}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"it misses image_encoder\.blocks\.0\.attn\.rel_pos_w"):
        load_sam(tmp_path / "odd.pt", image_size=128)


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        ("vit_t", {"depths": [1, 1, 3_000_000, 1]}, "depths .* must be 1 to 128"),
        ("vit_t", {"depths": [1] * 200}, "depths .* must be a list"),
        ("vit_t", {"depths": [1, 1]}, "four stages"),
        ("vit_t", {"depths": 3}, "depths 3: must be a list"),
        ("vit_t", {"num_heads": [0, 0, 0, 0]}, "num_heads"),
        ("vit_t", {"num_heads": 2}, "num_heads"),
        ("vit_t", {"embed_dims": [8.5, 12, 16, 24]}, "whole numbers"),
        ("vit_t", {"num_classes": -4}, "num_classes -4"),
        ("vit_t", {"mlp_ratio": -1}, "mlp_ratio -1: must be above 0"),
        ("vit_t", {"mlp_ratio": float("nan")}, "mlp_ratio nan"),
        ("vit_t", {"mlp_ratio": "4"}, "mlp_ratio '4'"),
        ("vit_t", {"decoder_mlp_dim": -1}, "decoder_mlp_dim -1"),
        ("vit_t", {"decoder_depth": True}, "decoder_depth True"),
        ("vit_t", {"kind": ["vit_t"]}, "there are vit_t"),
        ("vit_t", {"kind": None}, "there are vit_t"),
        ("vit_t", {"image_size": "64"}, "image_size '64'"),
        ("vit_t", {"image_size": 32_000_000}, "image_size 32000000"),
        ("vit_b", {"num_heads": 0}, "num_heads 0"),
        ("vit_b", {"num_heads": [3]}, r"num_heads \[3\]"),
        ("vit_b", {"window_size": -1}, "window_size -1"),
        ("vit_b", {"global_attn_indexes": [3]}, r"global_attn_indexes \[3\]: there are 3 blocks"),
        ("vit_b", {"global_attn_indexes": [-1]}, r"global_attn_indexes \[-1\]"),
    ],
)
def test_hostile_sizes_are_refused_before_anything_is_built(
    kind: str, sizes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    sam = small_sam(kind)
    sam.arch.update(sizes)
    save_sam_safetensors(sam, tmp_path / "odd.safetensors")
    refuse(tmp_path / "odd.safetensors", told)


def test_sizes_without_a_kind(tmp_path: Path) -> None:
    sam = small_sam()
    del sam.arch["kind"]
    save_sam_safetensors(sam, tmp_path / "odd.safetensors")
    refuse(tmp_path / "odd.safetensors", "there are vit_t")
