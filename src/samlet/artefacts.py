"""Files that are either whole or absent: written beside their place, flushed to disk, renamed, and vouched for.

A directory artefact is committed by `manifest.json`, written last: sha256 and size of every file. A directory
without a manifest, or one whose files differ from it, is no artefact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from samlet.errors import CheckpointError, SamletError

MANIFEST = "manifest.json"
_REFUSALS = (OSError, RuntimeError, SafetensorError)  # how Python, torch and safetensors report a full disk
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<time>\d+)\.(?P<kind>tmp|old)")  # what `_sibling` makes


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def _cannot_write(path: Path, error: Exception) -> SamletError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return SamletError(
        f"{path}: could not be written ({reason}); what was there before is untouched. "
        "Make room or mend the permissions, then run the same command again"
    )


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one step.

    Raises:
        SamletError: the disk is full, or not ours to write; `path` is as it was.
    """
    temporary = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except _REFUSALS as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # there may be no folder to find it in
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    write_file(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN is refused, for no other reader takes it."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_directory(path: Path, fill: Callable[[Path], object], **facts: Any) -> None:
    """Let `fill` write files into a directory beside `path`, vouch for them in a manifest, put it in place.

    `facts` (versions, positions) enter the manifest as they are. An existing `path` is replaced.

    Raises:
        SamletError: the disk is full, or not ours to write; `path` is as it was.
    """
    temporary = _sibling(path)
    old = _sibling(path).with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        for file in files:
            _flush(file)
        listing = {
            file.relative_to(temporary).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
            for file in files
        }
        write_json(temporary / MANIFEST, {**facts, "files": listing})
        for file in files:  # safetensors lets nobody else read what it writes, whatever the user's umask says
            file.chmod((temporary / MANIFEST).stat().st_mode)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _flush(path.parent)
    except _REFUSALS as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder; where one died between its two renames, put the old back.

    Only for a folder that nobody else is writing into.
    """
    places = folder.iterdir() if folder.is_dir() else ()
    found = [(match, place) for place in places if (match := _LEFTOVER.fullmatch(place.name))]
    for match, place in sorted(found, key=lambda pair: int(pair[0]["time"]), reverse=True):
        target = folder / match["name"]
        if match["kind"] == "old" and not target.exists():
            os.replace(place, target)
        elif place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory artefact, after every file was found to be what the manifest says.

    Raises:
        CheckpointError: no manifest, or a file that is missing, cut short or altered; it is named.
    """
    place = path / MANIFEST
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; a checkpoint is a folder with a {MANIFEST}")
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, facts in files.items():
            if not (path / name).resolve().is_relative_to(path.resolve()):
                raise CheckpointError(f"{place}: names a file outside its directory: {name}")
            if (path / name).stat().st_size != facts["bytes"] or sha256_of(path / name) != facts["sha256"]:
                raise CheckpointError(f"{path / name}: damaged: its content is not what {place} vouches for")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing, so {path} is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place}: damaged: {error}") from error
    return dict(manifest)
