"""From a data set's folder to the records that training and validation use: policies and deterministic choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from samlet.data.formats import exists, read_split, split_place
from samlet.data.images import probe_image
from samlet.data.records import Found, Problem, Record
from samlet.data.streams import hash_order
from samlet.errors import DataError

if TYPE_CHECKING:
    from samlet.data.configs import DatasetConfig

_SHOWN = 8  # problems that an error message lists


class Split(NamedTuple):
    """What is used of a split, and what was wrong with the rest."""

    records: list[Record]
    problems: list[Problem]


def names_taken(config: DatasetConfig) -> list[str]:
    """A sentence for each split that is read from a folder or file of another name than the configuration's."""
    asked = [("train", config.train), ("val", config.val)]
    places = [(key, name, split_place(config.root, name)) for key, name in asked if exists(config.root, name)]
    return [
        f"{place}: is taken as dataset.{key} ('{name}')"
        for key, name, place in places
        if place.name.casefold() != Path(name).name.casefold()
    ]


def describe(problems: Sequence[Problem]) -> str:
    """Problems as lines of text; long lists are cut and counted."""
    lines = [f"{problem.path}: {problem.reason}" for problem in problems[:_SHOWN]]
    more = len(problems) - len(lines)
    return "\n".join(lines + ([f"... and {more} more; `samlet check-data` lists them all"] if more > 0 else []))


def pick(records: Sequence[Record], fraction: float, seed: int) -> set[str]:
    """ceil(fraction * n) ids, chosen by a seeded hash of each id: adding an image moves few others."""
    ids = [record.image_id for record in records]
    return {ids[position] for position in hash_order(ids, seed)[: math.ceil(fraction * len(ids))]}


def withhold_labels(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """Keep the masks of a share of the labelled records; the others become unlabelled."""
    kept = pick([record for record in records if record.open_masks], fraction, seed)
    return [record if record.image_id in kept else record._replace(open_masks=None) for record in records]


def train_split(config: DatasetConfig, seed: int) -> Split:
    """The training records of a data set.

    Raises:
        DataError: there are none, or the configuration refuses some.
    """
    place, found = _find(config, config.train)
    if not exists(config.root, config.val):
        held = pick(found.records, config.val_fraction, seed)
        found.records = [record for record in found.records if record.image_id not in held]
        if held and not found.records:
            raise DataError(
                f"{place}: has {len(held)} image(s), all of which validation takes; "
                f"add images, or give dataset.val ('{config.val}') its own"
            )
    split = _usable(found, config, place)
    records = withhold_labels(split.records, config.labelled_fraction, seed)
    if config.unlabelled == "drop":
        records = [record for record in records if record.open_masks]
    if not records:
        raise DataError(f"{place}: no image of the training split '{config.train}' has masks")
    labelled = [record for record in records if record.open_masks]
    return Split(records + labelled * (config.labelled_repeat - 1), split.problems)


def val_split(config: DatasetConfig, seed: int) -> Split:
    """The labelled validation records of a data set.

    Raises:
        DataError: there are none, or the configuration refuses some.
    """
    place, found = _find(config, config.val if exists(config.root, config.val) else config.train)
    if not exists(config.root, config.val):
        held = pick(found.records, config.val_fraction, seed)
        found.records = [record for record in found.records if record.image_id in held]
    split = _usable(found, config, place)
    labelled = [record for record in split.records if record.open_masks]
    if not labelled:
        raise DataError(f"{place}: no image of the validation split '{config.val}' has masks")
    return Split(labelled, split.problems)


def _find(config: DatasetConfig, split: str) -> tuple[Path, Found]:
    """Where a split lies and what it holds; the root where there is no such split."""
    name = split if exists(config.root, split) else None
    return split_place(config.root, name), read_split(config.root, name, config.format)


def _usable(found: Found, config: DatasetConfig, place: Path) -> Split:
    """Check headers and apply the policies on broken and unlabelled images."""
    records = [record for record in found.records if _header_reads(record, found)]
    errors = [problem for problem in found.problems if problem.level == "error"]
    if errors and config.broken == "refuse":
        raise DataError(
            f"{place}: {len(errors)} file(s) cannot be used; mend them, or set dataset.broken to skip\n"
            + describe(errors)
        )
    bare = [record for record in records if record.open_masks is None]
    if bare and config.unlabelled == "refuse":
        reasons = [Problem(str(record.image_path), "has no masks") for record in bare]
        raise DataError(
            f"{place}: {len(bare)} of {len(records)} images have no masks; "
            f"set dataset.unlabelled to use if a teacher is to supervise them, or to drop\n{describe(reasons)}"
        )
    if not records:
        raise DataError(f"{place}: there is no image that can be used; `samlet check-data` says why")
    return Split(sorted(records, key=lambda record: record.image_id), found.problems)


def _header_reads(record: Record, found: Found) -> bool:
    try:
        probe_image(record.image_path)
    except DataError as error:
        found.error(record.image_path, str(error).removeprefix(f"{record.image_path}: "))
        return False
    return True
