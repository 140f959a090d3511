"""SA-1B: one JSON an image, `{"image": {...}, "annotations": [{"segmentation": ...}]}`, masks as compressed runs.

The JSON lies beside its image, or in `sa1b/` or `annotations/` next to `images/`; it belongs to the image of
its own name, and what it calls the image is only compared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from samlet.data.formats.coco import load_json
from samlet.data.formats.mask_folders import IMAGES
from samlet.data.records import (
    Found,
    Record,
    first_folder,
    hidden,
    identity,
    is_inside,
    list_images,
    open_segmentations,
    sub_folders,
)
from samlet.data.segmentations import Segmentations
from samlet.errors import DataError

_FOLDERS = ("sa1b", "annotations")
_SNIFFED = 1 << 16


def _annotation_folder(place: Path) -> Path | None:
    folders = [*sub_folders(place, (*_FOLDERS, *IMAGES)), place]
    return next((folder for folder in folders if folder.is_dir() and _first_json(folder)), None)


def _first_json(folder: Path) -> bool:
    file = next((path for path in sorted(folder.glob("*.json")) if not hidden(path, folder)), None)
    if file is None:
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(_SNIFFED)
    except OSError:
        return False
    return b'"image"' in head or (b'"segmentation"' in head and b'"images"' not in head)


def matches(place: Path) -> bool:
    """Whether a split has SA-1B's files."""
    return _annotation_folder(place) is not None


def read(place: Path, root: Path) -> Found:
    """All images of a split with their annotation files, which are opened when an image is read.

    Raises:
        DataError: there are no annotation files.
    """
    folder = _annotation_folder(place)
    if folder is None:
        raise DataError(f"{place}: there are no SA-1B annotation files beside the images, in sa1b/ or annotations/")
    found = Found("sa1b")
    home = first_folder(place, IMAGES) or place
    images = list_images(home, root, found, deep=home != place)
    files = {
        identity(path, folder): path
        for path in sorted(folder.rglob("*.json"))
        if not hidden(path, folder) and is_inside(path, root, found)
    }
    for image_id, path in images.items():
        file = files.pop(image_id, None)
        found.records.append(Record(image_id, path, partial(_open, file, path.name) if file else None))
    for file in files.values():
        found.error(file, "belongs to no image here; remove it, or name it after its image")
    return found


def _open(file: Path, image_name: str, size: tuple[int, int]) -> Segmentations:
    content = load_json(file)
    image, annotations = content.get("image"), content.get("annotations")
    if not isinstance(image, dict) or not isinstance(annotations, list):
        raise DataError(f"{file}: has no image or no list of annotations; it is not SA-1B")
    named = image.get("file_name", image_name)
    if named != image_name:
        raise DataError(f"{file}: describes image {named!r}, but lies beside {image_name}; rename one")
    items = [(f"{file}: annotation {_key(item, place)}", _segmentation(item)) for place, item in enumerate(annotations)]
    if not items:
        return Segmentations((), size)
    return open_segmentations(items, (image.get("height"), image.get("width")), size)


def _key(item: Any, place: int) -> object:
    return item.get("id", f"no. {place}") if isinstance(item, dict) else f"no. {place}"


def _segmentation(item: Any) -> object:
    return item.get("segmentation") if isinstance(item, dict) else None
