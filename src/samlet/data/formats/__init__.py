"""The formats of data sets: one module each with `matches(place)` and `read(place, root)`; order is preference."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from samlet.errors import DataError

if TYPE_CHECKING:
    from samlet.data.records import Found

FormatName = Literal["auto", "mask_folders", "instance_labels", "coco", "sa1b"]
FORMATS = ("mask_folders", "instance_labels", "coco", "sa1b")
ALIASES = {"val": ("valid", "validation")}  # other names of a split, taken where its own is absent


class Format(Protocol):
    """What a format's module offers. A place is a split's folder, or its annotation file; it need not exist."""

    def matches(self, place: Path) -> bool:
        """Whether the split is written this way."""

    def read(self, place: Path, root: Path) -> Found:
        """Every image of the split; files that lead out of `root` are refused."""


def load_format(name: str) -> Format:
    """The module of a format."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def split_place(root: Path, split: str | None) -> Path:
    """Where a split lies: `root` itself for None; its own name in any case, or else another usual name for it."""
    if split is None:
        return root
    places = [_in_any_case(root, name) for name in (split, *ALIASES.get(split, ()))]
    return next((place for place in places if _holds_a_split(place)), places[0])


def exists(root: Path, split: str) -> bool:
    """Whether a data set has this split, in any format."""
    return _holds_a_split(split_place(root, split))


def as_split(path: Path) -> tuple[Path, str]:
    """A split's own folder or annotation file as a data set's root and the split's name in it."""
    path = path.resolve()
    root = path.parent
    if path.is_file() and root.name.casefold() == "annotations":
        root = root.parent
    return root, str(path.relative_to(root))


def _in_any_case(root: Path, split: str) -> Path:
    from samlet.data.records import entry

    own = root / split
    return entry(own.parent, own.name)


def _holds_a_split(place: Path) -> bool:
    """Whether a split has a folder, a file, a share of `images/`, or annotations in any format."""
    from samlet.data.records import sub_folders

    return (
        place.exists()
        or bool(sub_folders(place, ("images", "image")))
        or any(load_format(name).matches(place) for name in FORMATS)
    )


def read_split(root: Path, split: str | None, format: FormatName = "auto") -> Found:
    """Read a split in the given format, or in the first that matches; the others are named in `also_seen`.

    A folder of images that matches no format is read as mask folders: all of it is unlabelled.

    Raises:
        DataError: there is no such split.
    """
    place = split_place(root, split)
    if format != "auto":
        return load_format(format).read(place, root)
    seen = tuple(name for name in FORMATS if load_format(name).matches(place))
    if not seen and (place.is_file() or not _holds_a_split(place)):
        what = "holds no annotations that samlet reads" if place.is_file() else "there is no such folder"
        raise DataError(f"{place}: {what}; name the split's folder or annotation file")
    found = load_format(seen[0] if seen else "mask_folders").read(place, root)
    found.also_seen = seen[1:]
    return found
