"""The masks that SamAutomaticMaskGenerator keeps of a stand-in's answers, with crops and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samlet.models import AutomaticMaskGenerator
from tests.models.amg_stand_in import Blobs, scene
from tests.models.sizes import small_sam


@pytest.fixture(scope="module", params=[0, 1], ids=["whole", "crops"])
def record(request: pytest.FixtureRequest, shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "parity" / f"amg_blobs{request.param}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def generate(record: dict[str, np.ndarray], **changes: Any) -> list[dict[str, Any]]:
    generator = AutomaticMaskGenerator(small_sam(), **{**json.loads(str(record["params"])), **changes})
    generator.predictor = Blobs(record["centres"])
    height, width = record["shape"].tolist()
    return sorted(
        generator.generate(scene(height, width)),
        key=lambda m: (m["bbox"][1], m["bbox"][0], m["area"], m["point_coords"][0][0]),
    )


def test_the_plain_form_keeps_the_same_masks(record: dict[str, np.ndarray]) -> None:
    found = generate(record, fast=False)
    assert len(found) == int(record["n"])
    shape = (len(found), *record["shape"].tolist())
    masks = np.unpackbits(record["masks_packed"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    assert np.array_equal(np.stack([mask["segmentation"] for mask in found]), masks)
    for key in ("bbox", "area", "crop_box"):
        assert np.array_equal([mask[key] for mask in found], record[key]), key
    assert np.allclose([mask["point_coords"][0] for mask in found], record["point_coords"], rtol=0, atol=1e-4)
    for key in ("predicted_iou", "stability_score"):
        assert np.allclose([mask[key] for mask in found], record[key], rtol=0, atol=1e-6), key
