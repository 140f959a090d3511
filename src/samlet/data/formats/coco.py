"""COCO instances: one JSON a split with polygons or runs; crowd regions are counted, and kept apart from objects.

The JSON is `<split>.json` beside the split's folder, any single COCO file in that folder, or lies in
`annotations/`, also as `instances_<split>*.json`; image files are looked up by `file_name` in the usual folders
(`<split>/`, `<split>2017/`, both also below `images/`) and never outside the data set. A split without a JSON of its
own shares `annotations.json` of the folder around it: it has the images of that file which lie in its own folder.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from samlet.data.formats import mask_folders
from samlet.data.formats.mask_folders import IMAGES
from samlet.data.images import contained
from samlet.data.records import (
    Found,
    OpenMasks,
    Record,
    entry,
    first_folder,
    identity,
    list_images,
    open_segmentations,
    sub_folders,
)
from samlet.data.segmentations import flaw
from samlet.errors import DataError

_SNIFFED = 1 << 16  # bytes in which a COCO file shows one of its keys
_SHARED = ("annotations.json", "instances.json", "instances_default.json", "coco.json", "labels.json")
_NAMES = ("_annotations.coco.json", "annotations.json", "instances.json", "coco.json", "labels.json")


def _candidates(place: Path) -> Iterator[Path]:
    if place.suffix.lower() == ".json":
        yield place
    yield place.with_name(f"{place.name}.json")
    yield from (place / name for name in _NAMES)
    for folder in (entry(place, "annotations"), entry(place.parent, "annotations"), place.parent):
        yield folder / f"{place.name}.json"
        yield from sorted(folder.glob(f"instances_{place.name}*.json"))
    if place.is_dir():
        yield from sorted(place.glob("*.json"))


def _looks_like_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_SNIFFED)
    except OSError:
        return False
    is_sa1b = b'"image"' in head  # SA-1B's files hold one image
    return not is_sa1b and any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


def annotation_files(place: Path) -> list[Path]:
    """COCO files of a split, the likeliest first."""
    files = dict.fromkeys(path for path in _candidates(place) if path.is_file())
    return [path for path in files if _looks_like_coco(path)]


def shared_files(place: Path) -> list[Path]:
    """COCO files that lie beside the folders of all splits, for a split that has images, the likeliest first."""
    if not place.is_dir() and not sub_folders(place, IMAGES):
        return []
    home = _around(place)
    files = (folder / name for folder in (home, entry(home, "annotations")) for name in _SHARED)
    return [path for path in files if path.is_file() and _looks_like_coco(path)]


def _around(place: Path) -> Path:
    """The folder that holds all splits."""
    return place.parent.parent if place.parent.name.casefold() in IMAGES else place.parent


def matches(place: Path) -> bool:
    """Whether a split has a COCO file."""
    return bool(annotation_files(place) or shared_files(place))


def read(place: Path, root: Path) -> Found:
    """The images of a COCO file with their segmentations; what is wrong with either is noted.

    Raises:
        DataError: there is no COCO file, or it is not JSON of COCO's form.
    """
    files = annotation_files(place)
    if not files and (shared := shared_files(place)):
        return _read_shared(shared[0], place, root)
    if not files:
        raise DataError(f"{place}: there is no COCO annotation file; name it in dataset.train or dataset.val")
    found = Found("coco")
    for other in files[1:]:
        found.warn(other, f"is not used; {files[0].name} is taken")
    return _Reader(files[0], _image_folders(place, files[0]), root, found).read()


def _read_shared(file: Path, place: Path, root: Path) -> Found:
    """The images of a split that a file for all splits lists; where it lists none of them, they are unlabelled."""
    own = first_folder(place, IMAGES) or place
    around = [*sub_folders(_around(place), IMAGES), own.parent, _around(place)]
    others = [path for folder in around for path in sorted(folder.iterdir()) if path.is_dir()]
    found = _Reader(file, list(dict.fromkeys([own, *others, *around])), root, Found("coco"), own).read()
    if found.records or found.problems:
        return found
    found = mask_folders.read(place, root)
    found.warn(file, f"lists no image of {own}; they are taken as unlabelled")
    return found


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object with images and annotations")
    return value


def _image_folders(place: Path, file: Path) -> list[Path]:
    split = place if place.suffix.lower() != ".json" else place.with_suffix("")
    base = split.parent if file.parent != split else split
    if base.name.casefold() == "annotations":
        base = base.parent
    words = (split.name.removeprefix("instances_"), file.stem.removeprefix("instances_"))
    names = [*sub_folders(split, IMAGES), split, *sub_folders(file.parent, IMAGES), file.parent]
    exact = (*words, re.sub(r"20\d\d$", "", words[1]))  # instances_train2017.json also goes with images/train
    names += [folder / word for word in exact for folder in (*sub_folders(base, IMAGES), base)]
    names += [folder for word in words for folder in _beginning_with(word, (*sub_folders(base, IMAGES), base))]
    names += [*sub_folders(base, IMAGES), base]
    return [folder for folder in dict.fromkeys(names) if folder.is_dir()]


def _beginning_with(word: str, folders: Sequence[Path]) -> Iterator[Path]:
    """Folders such as train2017 for train."""
    for folder in folders:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        yield from (path for path in paths if path.name.casefold().startswith(word.casefold()) and path.is_dir())


class _Reader:
    """One COCO file on its way into records."""

    def __init__(self, file: Path, folders: list[Path], root: Path, found: Found, own: Path | None = None) -> None:
        self.file, self.folders, self.root, self.found = file, folders, root, found
        self.own = own  # the folder of the split, where the file is for other splits too
        self.elsewhere = set[Any]()  # ids of images in other splits' folders
        content = load_json(file)
        self.images = self._list(content, "images")
        self.annotations = self._list(content, "annotations")
        categories = self._list(content, "categories") if "categories" in content else []
        self.categories = {category.get("id") for category in categories}

    def _list(self, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
        items = content.get(key)
        if not isinstance(items, list):
            raise DataError(f"{self.file}: has no list of {key}; it is not COCO")
        sound = [item for item in items if isinstance(item, dict)]
        if len(sound) < len(items):
            self.found.error(self.file, f"{len(items) - len(sound)} of its {key} are not objects")
        return sound

    def read(self) -> Found:
        used: dict[str, Path] = {}
        seen = set[Any]()
        located = [(image, path) for image in self.images if (path := self._locate(image, seen)) is not None]
        by_image = self._by_image()
        for image, path in located:
            image_id = identity(Path(str(image["file_name"])), Path())
            if image_id.casefold() in used:
                self.found.error(path, f"has the same name as {used[image_id.casefold()].name} but for case or suffix")
                continue
            used[image_id.casefold()] = path
            self.found.records.append(self._record(image_id, path, image, by_image.get(image["id"], [])))
        self._note_left_over(set(used.values()))
        return self.found

    def _locate(self, image: dict[str, Any], seen: set[Any]) -> Path | None:
        """The image's file, or None with the reason noted."""
        name, key = image.get("file_name"), image.get("id")
        where = f"{self.file}: image {key}"
        if not isinstance(name, str) or not name or not isinstance(key, int | str):
            self.found.error(where, "has no file_name or no id")
        elif key in seen:
            self.found.error(where, f"has an id that another image has; {name} is not used")
        elif "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            self.found.error(where, f"file_name {name!r} leads out of the data set")
        else:
            seen.add(key)
            return self._existing(name, key, where)
        return None

    def _existing(self, name: str, key: int | str, where: str) -> Path | None:
        try:
            paths = [folder / name for folder in self.folders if (folder / name).is_file()]
        except OSError as error:
            self.found.error(where, f"its file_name is no usable path ({error.strerror})")
            return None
        if not paths:
            self.found.error(where, f"its file {name} is not there")
            return None
        path = paths[0]
        if self.own is not None:
            foreign = [other for other in paths if not other.is_relative_to(self.own)]
            if path in foreign:
                self.elsewhere.add(key)
                return None
            if foreign:
                self.found.error(where, f"its file_name {name} means {path} and {foreign[0]}; write its folder to it")
                return None
        try:
            return contained(path, self.root)
        except DataError as error:
            self.found.error(path, str(error).removeprefix(f"{path}: "))
            return None

    def _record(self, image_id: str, path: Path, image: dict[str, Any], items: list[dict[str, Any]]) -> Record:
        written = image.get("height"), image.get("width")
        alone = [item for item in items if not item.get("iscrowd")]
        crowds = [item for item in items if item.get("iscrowd") and self._is_sound_crowd(item, written)]
        return Record(
            image_id,
            path,
            open_masks=self._opened(alone, written),
            is_complete=len(alone) + len(crowds) == len(items),
            open_crowds=self._opened(crowds, written),
        )

    def _opened(self, items: list[dict[str, Any]], written: tuple[Any, Any]) -> OpenMasks | None:
        named = [(f"{self.file}: annotation {item.get('id')}", item["segmentation"]) for item in items]
        return partial(open_segmentations, tuple(named), written) if named else None

    def _is_sound_crowd(self, item: dict[str, Any], written: tuple[Any, Any]) -> bool:
        height, width = written
        if not isinstance(height, int) or not isinstance(width, int):
            return False  # nor can objects be read then
        reason = flaw(item.get("segmentation"), (height, width))
        if reason is not None:
            self.found.warn(f"{self.file}: annotation {item.get('id')}", f"{reason}; this crowd region is not used")
        return reason is None

    def _by_image(self) -> dict[Any, list[dict[str, Any]]]:
        """Sound annotations by the id of their image; flaws and crowd regions are noted."""
        sizes = {
            image["id"]: (image.get("height"), image.get("width"))
            for image in self.images
            if isinstance(image.get("id"), int | str)
        }
        by_image: dict[Any, list[dict[str, Any]]] = {}
        seen, counts = set[Any](), Counter[str]()
        for item in self.annotations:
            if isinstance(item.get("image_id"), int | str) and item["image_id"] in self.elsewhere:
                continue
            if item.get("iscrowd"):
                counts["crowd"] += 1
                if isinstance(item.get("image_id"), int | str):
                    by_image.setdefault(item["image_id"], []).append(item)
            elif reason := self._flaw(item, sizes, seen):
                self.found.error(f"{self.file}: annotation {item.get('id')}", reason)
            else:
                by_image.setdefault(item["image_id"], []).append(item)
                counts["category"] += bool(self.categories) and item.get("category_id") not in self.categories
        if counts["crowd"]:
            self.found.warn(
                self.file, f"{counts['crowd']} crowd region(s) are no objects; what is found there is not judged"
            )
        if counts["category"]:
            self.found.warn(self.file, f"{counts['category']} annotation(s) name a category that is not listed")
        return by_image

    def _flaw(self, item: dict[str, Any], sizes: dict[Any, tuple[Any, Any]], seen: set[Any]) -> str | None:
        key, image_id = item.get("id"), item.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in sizes:
            return f"belongs to image {image_id}, which is not listed"
        if key is not None and (not isinstance(key, int | str) or key in seen):
            return "has an id that another annotation has"
        seen.add(key)
        box = item.get("bbox")
        if box is not None and not _is_box(box):
            return f"its bbox {box} is not four finite numbers"
        height, width = sizes[image_id]
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            return f"image {image_id} has no height and width"
        return flaw(item.get("segmentation"), (height, width))

    def _note_left_over(self, used: set[Path]) -> None:
        """Image files in the folder the images come from that no entry names."""
        for folder in {path.parent for path in used}:
            for path in list_images(folder, self.root, Found("coco"), deep=False).values():
                if path not in used:
                    self.found.warn(path, f"is not listed in {self.file.name}; it is not used")


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, int | float) and abs(value) < float("inf") for value in box)
    )
