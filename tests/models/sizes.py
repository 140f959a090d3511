"""Sizes of small models that are no special case: unequal widths, windows that pad, several blocks a stage."""

from __future__ import annotations

from typing import Any

from samlet.models import Sam, build_sam
from tests.models.reference import fill

VIT: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "global_attn_indexes": [1],
    "window_size": 3,
    "mlp_ratio": 2.0,
    "decoder_mlp_dim": 64,
}
TINY: dict[str, Any] = {
    "embed_dims": [8, 12, 16, 24],
    "depths": [2, 1, 2, 1],
    "num_heads": [1, 2, 4, 3],
    "window_sizes": [7, 5, 6, 3],
    "mlp_ratio": 1.5,
    "num_classes": 3,
    "decoder_mlp_dim": 64,
}
SIZES = {"vit_t": TINY, "vit_b": VIT}


def small_sam(kind: str = "vit_t", image_size: int = 64, seed: int = 0, **overrides: Any) -> Sam:
    """A model of these sizes with every tensor filled, in eval mode."""
    sam = build_sam(kind, image_size, **{**SIZES[kind], **overrides})
    fill(sam, seed)
    return sam.eval()
