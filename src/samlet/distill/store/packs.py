"""Shards in one file each, for file systems that hate millions of files: safetensors, read in place."""

from __future__ import annotations

import os
import shutil
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
        folder = place.with_name(f"{place.name}.d")  # safetensors has temporary files of its own, of any name
        try:
            folder.mkdir()
            save_file(dict(arrays), folder / path.name)
            (folder / path.name).chmod(mode)  # it lets nobody else read what it writes, whatever the umask says
            os.replace(folder / path.name, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    _remove_leftovers(path)
    write_file(path, write)
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def remove_pack(path: Path) -> None:
    """Remove a pack and what killed writers left of it."""
    path.unlink(missing_ok=True)
    _remove_leftovers(path)


def _remove_leftovers(path: Path) -> None:
    for folder in path.parent.glob(f".{path.name}.*.tmp.d"):  # a pack has one writer, so they are of killed ones
        shutil.rmtree(folder, ignore_errors=True)
