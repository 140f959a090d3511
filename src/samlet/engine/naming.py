"""Checkpoints as they are given on the command line, under the names they have in tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from samlet.errors import CheckpointError, DataError

WEIGHTS = (".pt", ".pth", ".safetensors")


class Named(NamedTuple):
    """A checkpoint under the name it has in the tables."""

    name: str
    path: Path


def name_checkpoints(given: Sequence[str]) -> list[Named]:
    """Each checkpoint with its name: `name=path`, or the file's stem, or the run's folder.

    Raises:
        CheckpointError: one that does not exist, or two of one name.
    """
    named: list[Named] = []
    for text in given:
        name, equals, path = text.partition("=")
        one = Named(name, Path(path)) if equals and name and not Path(text).exists() else _by_itself(Path(text))
        if not one.path.exists():
            raise CheckpointError(f"{one.path}: no such file or folder; give a checkpoint, a run, or name=path")
        if one.name in {other.name for other in named}:
            raise CheckpointError(f"{one.path}: another checkpoint is called '{one.name}' too; write name={one.path}")
        named.append(one)
    if not named:
        raise CheckpointError("checkpoints: there is none to evaluate")
    return named


def refuse_model(data: Path, named: Sequence[Named], command: str = "evaluate") -> None:
    """Say how it is meant where a model stands in the data set's place, the last one.

    Raises:
        DataError: it does.
    """
    if not is_model(data):
        return
    models = [str(one.path) for one in named if is_model(one.path)]
    others = [str(one.path) for one in named if not is_model(one.path)]
    meant = " ".join([*models, str(data), *(others[:1] or ["my_images/"])])
    raise DataError(f"{data}: is a model, and the data set comes last; write samlet {command} {meant}")


def is_model(path: Path) -> bool:
    """Whether a path looks like weights, a run or a Hugging Face model."""
    from samlet.models.checkpoints import STUDENT
    from samlet.models.hf import is_hf_folder

    if path.is_file():
        return path.suffix.lower() in WEIGHTS
    return is_hf_folder(path) or any((folder / STUDENT).is_file() for folder in (path, path / "best"))


def _by_itself(path: Path) -> Named:
    whole = path.resolve()
    folder = whole.parent if whole.name == "best" else whole
    return Named(folder.name if whole.is_dir() else whole.stem, path)
