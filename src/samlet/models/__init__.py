"""The models room: encode an image once, decode many prompts. Names resolve on first use, so importing is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.models.amg import AmgSettings as AmgSettings
    from samlet.models.amg import AutomaticMaskGenerator as AutomaticMaskGenerator
    from samlet.models.amg import AutomaticMasks as AutomaticMasks
    from samlet.models.arch import infer_arch as infer_arch
    from samlet.models.build import build_sam as build_sam
    from samlet.models.checkpoints import load_sam as load_sam
    from samlet.models.checkpoints import save_sam_safetensors as save_sam_safetensors
    from samlet.models.checkpoints import save_sam_upstream as save_sam_upstream
    from samlet.models.configs import EncoderConfig as EncoderConfig
    from samlet.models.configs import ModelConfig as ModelConfig
    from samlet.models.norms import freeze_batch_norm as freeze_batch_norm
    from samlet.models.predictor import Predictor as Predictor
    from samlet.models.predictor import make_prompts as make_prompts
    from samlet.models.sam import Sam as Sam

_HOME = {
    "AmgSettings": "samlet.models.amg.settings",
    "AutomaticMaskGenerator": "samlet.models.amg.generator",
    "AutomaticMasks": "samlet.models.amg.found",
    "EncoderConfig": "samlet.models.configs",
    "ModelConfig": "samlet.models.configs",
    "Predictor": "samlet.models.predictor",
    "Sam": "samlet.models.sam",
    "build_sam": "samlet.models.build",
    "freeze_batch_norm": "samlet.models.norms",
    "infer_arch": "samlet.models.arch",
    "load_sam": "samlet.models.checkpoints",
    "make_prompts": "samlet.models.predictor",
    "save_sam_safetensors": "samlet.models.checkpoints",
    "save_sam_upstream": "samlet.models.checkpoints",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
