"""`images/<name>.jpg` with `masks/<name>/*.png`, one binary file an object, or `masks/<name>.png` for one object.

`image/` and `mask/` are the same to it. Images without any mask are unlabelled.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from samlet.data.images import is_image_name, read_values
from samlet.data.masks import holds_labels
from samlet.data.records import (
    Found,
    MaskFiles,
    OpenMasks,
    Record,
    first_folder,
    folder_identity,
    hidden,
    identity,
    is_inside,
    list_images,
)
from samlet.errors import DataError

IMAGES, MASKS = ("images", "image"), ("masks", "mask")
_LOOKED_AT = 8  # single mask files that are opened to tell binary masks from instance labels


def label_like(files: list[Path]) -> bool:
    """Whether the first files that can be read number several objects; soft-edged masks do not."""
    return any(_numbers_objects(file) for file in files[:_LOOKED_AT])


def _numbers_objects(file: Path) -> bool:
    try:
        return holds_labels(read_values(file))
    except DataError:
        return False  # said when its image is read


def single_files(folder: Path) -> list[Path]:
    """Mask files that lie in the folder itself."""
    return sorted(path for path in folder.iterdir() if path.is_file() and is_image_name(path))


def matches(place: Path) -> bool:
    """Whether a split's folder has masks as files of one object each."""
    masks = first_folder(place, MASKS)
    if masks is None:
        return False
    return any(path.is_dir() and not hidden(path, masks) for path in masks.iterdir()) or not label_like(
        single_files(masks)
    )


def read(place: Path, root: Path) -> Found:
    """All images of a split with the files of their masks; nothing is decoded."""
    found = Found("mask_folders")
    folder = first_folder(place, IMAGES) or place
    masks = first_folder(place, MASKS)
    images = list_images(folder, root, found, deep=folder != place)
    single, several = _assign(masks, root, images, found) if masks else ({}, {})
    for image_id, path in images.items():
        if image_id in single and image_id in several:
            found.warn(single[image_id], "is not used: the image has a folder of masks as well")
        found.records.append(Record(image_id, path, _opener(several.get(image_id), single.get(image_id))))
    return found


def _opener(several: list[Path] | None, single: Path | None) -> OpenMasks | None:
    paths = several or ([single] if single else [])
    return partial(MaskFiles, tuple(paths)) if paths else None


def _assign(
    masks: Path, root: Path, images: dict[str, Path], found: Found
) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Mask files by the image they belong to: those of one file, and those in a folder of its name."""
    single: dict[str, Path] = {}
    several: dict[str, list[Path]] = {}
    for path in sorted(masks.rglob("*")):
        if path.is_dir() or hidden(path, masks):
            continue
        if not is_image_name(path):
            found.warn(path, "is not called like an image; it is not used as a mask")
        elif not is_inside(path, root, found):
            continue
        elif (parent := folder_identity(path.parent, masks)) in images:
            several.setdefault(parent, []).append(path)
        elif (own := identity(path, masks)) not in images:
            found.error(
                path,
                "is the mask of no image here; remove it, or name it after its image, with no ending such as _mask",
            )
        elif own in single:
            found.error(path, f"is a second mask file of {own} beside {single[own].name}; keep one")
        else:
            single[own] = path
    return single, several
