"""A data set that is only measured on: from a folder or annotation file to its labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from samlet.errors import DataError

if TYPE_CHECKING:
    from samlet.data.dataset import ValidationSet
    from samlet.data.formats import FormatName

DEFAULT_SPLIT = "val"


def open_split(
    data: Path, split: str = DEFAULT_SPLIT, format: str = "auto", broken: Literal["refuse", "skip"] = "refuse"
) -> ValidationSet:
    """The labelled images of a split; all of `data` where it has no `val` and none was named.

    Raises:
        DataError: there is no such split, or it cannot be used.
    """
    from samlet.data.configs import DatasetConfig
    from samlet.data.formats import FORMATS, as_split, exists

    if format not in ("auto", *FORMATS):
        raise DataError(f"format: '{format}' is not one of auto, {', '.join(FORMATS)}")
    if not data.exists():
        raise DataError(f"{data}: no such file or folder; give the data set's folder")
    root = data
    if not (data.is_dir() and exists(data, split)):
        if split != DEFAULT_SPLIT:
            raise DataError(f"{data}: has no split '{split}'; name a folder or annotation file in it")
        root, split = as_split(data)
    config = DatasetConfig(root=root, val=split, format=cast("FormatName", format), unlabelled="use", broken=broken)
    return config.build_val(seed=0)
