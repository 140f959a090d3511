"""Tiny stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from samlet.distill.store import Identity, Shard, open_store, shard_of

FEATURES = ("embedding", "blocks.1@neck")


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "teacher": "SAM-B", "teacher_kind": "vit_b", "teacher_sha256": "ab" * 32, "teacher_image_size": 64,
        "image_size": 64, "precision": "fp32", "taps": FEATURES[1:], "dtype": "fp32", "preprocessing": "cd" * 32,
        "augmentation": None, "variants": 1, "outputs": None, "shards": 2, "samlet": "0.1.0",
    }  # fmt: skip
    return Identity(**{**fields, **changes})


def write_decoder(place: Path) -> None:
    save_file({"weight": torch.arange(4.0)}, place)


def maps_of(image_id: str, variant: int = 0) -> dict[str, np.ndarray]:
    """Features that depend on name and variant alone."""
    chance = np.random.default_rng([variant, *image_id.encode()])
    return {name: chance.normal(size=(3, 2, 2)).astype(np.float32) for name in FEATURES}


def add(shard: Shard, image_id: str, variant: int = 0) -> None:
    shard.add(image_id, variant, f"variation {variant}", f"digest of {image_id}", maps_of(image_id, variant))


def fill(root: Path, kind: Identity, images: list[str], *, split: str = "train", pack: bool = False) -> None:
    """What an extraction does: whatever is missing, shard by shard."""
    kind = open_store(root, kind, write_decoder)
    for number in range(kind.shards):
        shard = Shard(root, split, number, kind)
        keys = [(name, v) for name in sorted(images) if shard_of(name, kind) == number for v in range(kind.variants)]
        for key in keys:
            if key not in shard.entries:
                add(shard, *key)
        shard.finish(pack=pack)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store by its path; locks apart."""
    files = sorted(place for place in root.rglob("*") if place.is_file() and place.name != ".lock")
    return {place.relative_to(root).as_posix(): place.read_bytes() for place in files}
