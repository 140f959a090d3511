"""A long measurement image by image: what was found is kept until all is there, so a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samlet import __version__
from samlet.artefacts import write_file

if TYPE_CHECKING:
    from samlet.data import EvalImage

Arrays = dict[str, np.ndarray]
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile)  # how numpy and zipfile find a damaged archive


class KeptMeasurements:
    """What was found in each image, in a folder that is there as long as the measurement is not finished.

    Args:
        folder: holds nothing else, and may be removed when what was measured has been reported; several may share it.
        facts: what the arrays depend on beside the image and its objects: JSON's types alone.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        known = json.dumps({**facts, "samlet": __version__}, sort_keys=True)
        self._place = folder / hashlib.sha256(known.encode()).hexdigest()[:16]

    def of(self, item: EvalImage, measure: Callable[[], Arrays]) -> Arrays:
        """What was found in an image by a measurement that was cut off, else what `measure` finds.

        Raises:
            SamletError: the disk is full, or not ours to write.
        """
        path = self._place / f"{_digest(item)}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:  # numpy leaves bad ones open
                return dict(found)
        except UNREADABLE:
            arrays = measure()
        write_file(path, lambda temporary: _write(temporary, arrays))
        return arrays


def _write(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:  # numpy adds a suffix to a name that it is given
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any name for `allow_pickle`


def _digest(item: EvalImage) -> str:
    digest = hashlib.sha256(f"{item.image_id} {item.image.shape} {item.masks.shape} {item.crowds.shape}".encode())
    for array in (item.image, np.packbits(item.masks), np.packbits(item.crowds), item.points):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]
