"""One PNG an image that numbers its objects: palette, 8 or 16 bits, in `labels/`, `instances/` or `masks/`.

0 is the ground. 255 in an 8-bit file is void (Pascal VOC's border), unless the numbers run through to it.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlet.data.formats.mask_folders import IMAGES, label_like, single_files
from samlet.data.images import read_values
from samlet.data.masks import check_size, object_labels, single_channel
from samlet.data.records import Found, Record, first_folder, list_images
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool

LABELS = ("labels", "instances", "masks", "mask")


class LabelImage:
    """The objects of one label image, which is decoded once, when it is first asked."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path, self.size = path, size

    @cached_property
    def _labels(self) -> np.ndarray:
        values = read_values(self.path)
        check_size(self.path, (values.shape[0], values.shape[1]), self.size)
        if values.ndim == 3 and (values[..., :1] != values[..., :3]).any():
            raise DataError(f"{self.path}: numbers objects by colours; save it as a palette or 16-bit PNG")
        return single_channel(values)

    @cached_property
    def _present(self) -> list[int]:
        return object_labels(self._labels)

    def __len__(self) -> int:
        return len(self._present)

    def name(self, index: int) -> str:
        """The file and the object's number in it."""
        return f"{self.path}: object {self._present[index]}"

    def read(self, index: int) -> Bool[np.ndarray, "H W"]:
        """Where the object's number stands."""
        mask: Bool[np.ndarray, "H W"] = self._labels == self._present[index]
        return mask


def matches(place: Path) -> bool:
    """Whether a split's folder has label images."""
    if first_folder(place, LABELS[:2]) is not None:
        return True
    masks = first_folder(place, LABELS[2:])
    return masks is not None and label_like(single_files(masks))


def read(place: Path, root: Path) -> Found:
    """All images of a split with their label images; nothing is decoded."""
    found = Found("instance_labels")
    folder = first_folder(place, IMAGES) or place
    images = list_images(folder, root, found, deep=folder != place)
    labels = first_folder(place, LABELS)
    files = list_images(labels, root, found) if labels else {}
    for image_id, path in images.items():
        file = files.pop(image_id, None)
        found.records.append(Record(image_id, path, partial(LabelImage, file) if file else None))
    for path in files.values():
        found.error(path, "is the label image of no image here; remove it, or name it after its image")
    return found
