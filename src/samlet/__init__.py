"""samlet: distil a Segment-Anything teacher into a MobileSAM that is good on your own images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.models import AutomaticMaskGenerator as AutomaticMaskGenerator
    from samlet.models import Predictor as Predictor
    from samlet.models import Sam as Sam
    from samlet.models import build_sam as build_sam
    from samlet.models import load_sam as load_sam

__version__ = "0.1.0"
__all__ = ["AutomaticMaskGenerator", "Predictor", "Sam", "__version__", "build_sam", "load_sam"]


def __getattr__(name: str) -> object:
    """Import the models, and with them torch, only when they are asked for."""
    if name in __all__:
        return getattr(importlib.import_module("samlet.models"), name)
    raise AttributeError(f"module 'samlet' has no attribute {name!r}")
