"""Segment everything: masks of one image from a grid of points. Names resolve on first use, so importing is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.models.amg.found import AutomaticMasks as AutomaticMasks
    from samlet.models.amg.generator import AutomaticMaskGenerator as AutomaticMaskGenerator
    from samlet.models.amg.settings import AmgSettings as AmgSettings
    from samlet.models.amg.settings import amg_path as amg_path
    from samlet.models.amg.settings import save_tuned as save_tuned
    from samlet.models.amg.settings import tuned_settings as tuned_settings

_HOME = {
    "AmgSettings": "samlet.models.amg.settings",
    "AutomaticMaskGenerator": "samlet.models.amg.generator",
    "AutomaticMasks": "samlet.models.amg.found",
    "amg_path": "samlet.models.amg.settings",
    "save_tuned": "samlet.models.amg.settings",
    "tuned_settings": "samlet.models.amg.settings",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
