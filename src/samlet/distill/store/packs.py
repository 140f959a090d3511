"""Shards in one file each, for file systems that hate millions of files: safetensors, read in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from samlet.artefacts import sha256_of, write_file
from samlet.distill.store.arrays import ArrayFacts, checked
from samlet.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class Pack:
    """An open pack; arrays are views of the mapped file.

    Raises:
        DataError: it is missing, or not a pack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise DataError(f"{path}: missing") from error
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise DataError(f"{path}: damaged: {' '.join(str(error).split())[:120]}") from error

    def read(self, key: str, facts: ArrayFacts) -> Tensor:
        """One array.

        Raises:
            DataError: it is not there, or not what it must be.
        """
        try:
            values: Tensor = self._file.get_tensor(key)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: damaged: {' '.join(str(error).split())[:120]}") from error
        return checked(values, facts, f"{self.path} ({key})")


def write_pack(path: Path, arrays: Mapping[str, Tensor], mode: int) -> dict[str, Any]:
    """Write a pack whole or not at all, from arrays that may be mapped; its sha256 and size.

    Raises:
        SamletError: it could not be written.
    """

    def write(place: Path) -> None:
        save_file(dict(arrays), place)
        place.chmod(mode)  # safetensors lets nobody else read what it writes, whatever the user's umask says

    write_file(path, write)
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}
