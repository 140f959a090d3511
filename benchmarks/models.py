"""Models with random weights for benchmarks: of the published sizes, or tiny ones that only show that all runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from samlet.models import Sam, build_sam

TINY: dict[str, dict[str, Any]] = {
    "vit_t": {
        "embed_dims": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 2],
        "window_sizes": [7, 7, 14, 7],
        "num_classes": 2,
        "decoder_mlp_dim": 32,
    },
    "vit_b": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "global_attn_indexes": [1],
        "window_size": 3,
        "decoder_mlp_dim": 32,
    },
}


def build(kind: str, image_size: int, tiny: bool = False) -> Sam:
    """A model in eval mode, channels-last; weights are drawn from a fixed seed."""
    torch.manual_seed(0)
    sizes = TINY["vit_t" if kind == "vit_t" else "vit_b"] if tiny else {}
    sam = build_sam(kind, image_size, **sizes).eval()
    sam.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return sam


def command(script: str, arguments: list[str] | None) -> str:
    """The command line that repeats a run."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *given])
