"""Folders and files as such."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

LEFTOVER = re.compile(r"\.(.+)\.\d+\.\d+\.tmp")  # what artefacts.write_file leaves when it is killed


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones too."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def flush(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
