"""The smallest run that is still a whole run: a data set of drawn scenes, a tiny student, a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from samlet.config import RunConfig
from samlet.data import read_image
from samlet.data.synthetic import write_dataset
from samlet.models import AutomaticMaskGenerator, build_sam, load_sam
from samlet.models.checkpoints import save_sam_upstream

IMAGE_SIZE = 64
STUDENT: dict[str, Any] = {
    "embed_dims": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 2],
    "window_sizes": [7, 7, 14, 7],
    "num_classes": 2,
    "mlp_ratio": 1.0,
}
TEACHER: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "window_size": 3}


def write_scenes(root: Path, train: int = 6, val: int = 2) -> Path:
    """A data set in the seeds' layout."""
    write_dataset(root, num_train=train, num_val=val, image_size=IMAGE_SIZE, seed=0)
    return root


def write_teacher(path: Path, seed: int = 1, kind: str = "vit_b", **sizes: Any) -> Path:
    """A teacher with random weights, as an upstream checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_sam(kind, IMAGE_SIZE, **(sizes or TEACHER))
    save_sam_upstream(sam, path)
    return path


def add_found_objects(scenes: Path, checkpoint: Path) -> Path:
    """Make one mask that a model of random weights finds an object of each validation image: it is right about it."""
    generator = AutomaticMaskGenerator(
        load_sam(checkpoint, image_size=IMAGE_SIZE), 3, pred_iou_thresh=-9.0, stability_score_thresh=0.0
    )
    for image in sorted((scenes / "val" / "image").iterdir()):
        found = generator.generate(read_image(image))
        mask = max((one["segmentation"] for one in found), key=np.count_nonzero)
        Image.fromarray(mask.astype(np.uint8) * 255).save(scenes / "val" / "mask" / image.stem / "99.png")
    return scenes


def tiny_config(scenes: Path, out: Path, **blocks: Any) -> RunConfig:
    """A run of a few seconds; blocks are laid over the defaults key by key."""
    plain: dict[str, Any] = {
        "output_dir": str(out),
        "model": {"kind": "vit_t", "image_size": IMAGE_SIZE, "encoder": STUDENT},
        "dataset": {"root": str(scenes), "objects_per_image": 2},
        "training": {"epochs": 2, "batch_size": 2, "num_workers": 0, "learning_rate": 1e-3, "device": "cpu"},
        "validation": {"overlays": 0},
        "logging": {"tensorboard": False, "curves": False},
    }
    for name, block in blocks.items():
        plain[name] = {**plain.get(name, {}), **block} if isinstance(block, dict) else block
    return RunConfig.model_validate_json(json.dumps(plain))
