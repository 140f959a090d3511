"""What a format finds on disk: images, where their masks come from, and everything that is wrong with them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from samlet.data.images import contained, is_image_name
from samlet.data.masks import read_mask
from samlet.data.segmentations import Segmentations
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool


class Problem(NamedTuple):
    """One thing that is wrong, or worth knowing, about one file."""

    path: str
    reason: str
    level: Literal["error", "warning"] = "error"  # error: training refuses it, or skips and counts it


class ObjectMasks(Protocol):
    """The masks of one image; nothing is decoded before `read`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the mask is written: a file, or a file and a place in it."""

    def read(self, index: int) -> Bool[np.ndarray, "H W"]:
        """The mask at the image's size, not empty.

        Raises:
            DataError: it is damaged, empty, or of another size.
        """


OpenMasks = Callable[[tuple[int, int]], ObjectMasks]


class Record(NamedTuple):
    """One image of a data set."""

    image_id: str  # its path below the image folder without suffix: unique in a split
    image_path: Path
    open_masks: OpenMasks | None  # from the image's (H, W); None: unlabelled
    is_complete: bool = True  # False: there may be objects that neither have a mask nor lie in a crowd region
    open_crowds: OpenMasks | None = None  # regions full of objects without masks of their own


@dataclass
class Found:
    """One split as a format sees it."""

    format: str
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    also_seen: tuple[str, ...] = ()  # formats that the split would match as well

    def error(self, path: str | Path, reason: str) -> None:
        """Note what training refuses or skips."""
        self.problems.append(Problem(str(path), reason, "error"))

    def warn(self, path: str | Path, reason: str) -> None:
        """Note what training takes, but a person should know."""
        self.problems.append(Problem(str(path), reason, "warning"))


class MaskFiles(NamedTuple):
    """Masks that lie in files of their own."""

    paths: Sequence[Path]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The mask's file."""
        return str(self.paths[index])

    def read(self, index: int) -> Bool[np.ndarray, "H W"]:
        """Decode one file."""
        return read_mask(self.paths[index], self.size)


def entry(folder: Path, name: str) -> Path:
    """The entry of a folder that is called so, in this or in another case; it need not exist."""
    if (folder / name).exists() or not folder.is_dir():
        return folder / name
    named = sorted(path for path in folder.iterdir() if path.name.casefold() == name.casefold())
    return named[0] if named else folder / name


def sub_folders(place: Path, names: Sequence[str]) -> list[Path]:
    """The named folders of a split that are there; without a folder of its own they are `<name>/<split>`."""
    if place.is_dir():
        folders = [entry(place, name) for name in names]
    else:
        folders = [entry(entry(place.parent, name), place.name) for name in names]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def first_folder(place: Path, names: Sequence[str]) -> Path | None:
    """The first of a split's named folders that is there."""
    return next(iter(sub_folders(place, names)), None)


def hidden(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is what a tool left behind: `.ipynb_checkpoints`, `._a.png`, `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def identity(path: Path, folder: Path) -> str:
    """An image's id: its path below its folder, without suffix, in Unicode's composed form."""
    return folder_identity(path.with_suffix(""), folder)


def folder_identity(path: Path, folder: Path) -> str:
    """The id of the image that a folder of masks belongs to."""
    return unicodedata.normalize("NFC", path.relative_to(folder).as_posix())


def list_images(folder: Path, root: Path, found: Found, *, deep: bool = True) -> dict[str, Path]:
    """The images of a folder by id, sorted; what is odd or leads elsewhere is noted in `found`."""
    images: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        if path.is_dir() or hidden(path, folder):
            continue
        if not is_image_name(path):
            if path.suffix.lower() not in {".json", ".csv", ".txt", ".md"}:
                found.warn(path, "is not called like an image; it is not used")
            continue
        image_id = identity(path, folder)
        twin = folded.get(image_id.casefold())
        if twin is not None:
            found.error(path, f"has the same name as {twin.name} but for case or suffix; rename one of them")
        elif is_inside(path, root, found):
            images[image_id] = folded[image_id.casefold()] = path
    return images


def is_inside(path: Path, root: Path, found: Found) -> bool:
    """Whether a file really lies under the data set's folder; noted where it does not."""
    try:
        contained(path, root)
    except DataError as error:
        found.error(path, str(error).removeprefix(f"{path}: "))
        return False
    return True


def open_segmentations(
    items: Sequence[tuple[str, object]], written: tuple[object, object], size: tuple[int, int]
) -> Segmentations:
    """The masks of an image as an annotation file writes them, once the image's true (H, W) is known.

    Raises:
        DataError: the file states another size for the image.
    """
    if written != size:
        raise DataError(
            f"{items[0][0]}: the image is said to be {written[1]} x {written[0]} pixels "
            f"but it is {size[1]} x {size[0]} (upright, as EXIF says); mend the size or the image"
        )
    return Segmentations(items, size)


def read_crowds(record: Record, size: tuple[int, int]) -> list[Bool[np.ndarray, "H W"]]:
    """The crowd regions of an image of (H, W), but for those without a pixel in it."""
    masks = [] if record.open_crowds is None else read_masks(record.open_crowds, size)
    return [mask for mask in masks if not isinstance(mask, DataError)]


def read_masks(open_masks: OpenMasks, size: tuple[int, int]) -> Iterator[Bool[np.ndarray, "H W"] | DataError]:
    """All masks of an image; where one cannot be read, what is wrong with it stands in its place."""
    try:
        masks = open_masks(size)
        count = len(masks)
    except DataError as error:
        yield error
        return
    for index in range(count):
        try:
            yield masks.read(index)
        except DataError as error:
            yield error
