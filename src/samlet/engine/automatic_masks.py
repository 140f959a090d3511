"""Automatic masks of many images, kept image by image: what is there and of the same making is never computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from samlet.artefacts import remove_leftovers, sha256_of
from samlet.data.images import read_image
from samlet.distill.kept_masks import KeptMasks, MaskFacts, masks_if_kept, read_masks, write_masks
from samlet.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from samlet.models.amg import AutomaticMasks

Find = Callable[["np.ndarray"], "AutomaticMasks"]
HASHING_THREADS = 4


class ImageToMask(NamedTuple):
    """An image, and where its masks are kept."""

    image: Path
    place: Path


class Asked(NamedTuple):
    """What is known of an image before the network runs."""

    item: ImageToMask
    image_sha256: str
    kept: KeptMasks | None  # None: to be computed


def look(item: ImageToMask, facts: MaskFacts) -> Asked:
    """An image's digest, and its masks where they are kept already.

    Raises:
        DataError: the image's file cannot be read.
    """
    try:
        image_sha256 = sha256_of(item.image)
    except OSError as error:
        raise DataError(f"{item.image}: cannot be read ({error.strerror or error})") from error
    return Asked(item, image_sha256, masks_if_kept(item.place, facts, image_sha256))


def look_at_all(items: Sequence[ImageToMask], facts: MaskFacts) -> Iterator[Asked | DataError]:
    """`look` at every image in order; what is wrong with it in its place."""

    def tried(item: ImageToMask) -> Asked | DataError:
        try:
            return look(item, facts)
        except DataError as error:
            return error

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        yield from pool.map(tried, items)


def refuse_other_making(asked: Asked, facts: MaskFacts, store: Path) -> None:
    """Never replace masks that somebody found with another model or other settings.

    Raises:
        DataError: such masks lie where an image's would go; the first field that differs is named.
    """
    if asked.kept is None and asked.item.place.exists():
        try:
            found = read_masks(asked.item.place).other_making(facts)
        except DataError:
            return
        if found:
            raise DataError(
                f"{asked.item.place}: holds masks of another making: {found}; give another folder, or remove {store} "
                "if nobody needs it"
            )


def compute(
    asked: Asked, facts: MaskFacts, find: Find, before: Callable[[], object] = lambda: None
) -> tuple[np.ndarray, KeptMasks]:
    """Find and write the masks of one image; the image and what was written.

    Args:
        asked: the image.
        facts: of `find`.
        find: the generator.
        before: called when the masks are found and not yet written; it may raise.

    Raises:
        DataError: the image cannot be read.
        SamletError: the disk is full, or not ours to write.
    """
    pixels = read_image(asked.item.image)
    masks = find(pixels)
    before()
    write_masks(asked.item.place, facts, asked.image_sha256, masks)
    return pixels, read_masks(asked.item.place)


def tidy(folder: Path) -> None:
    """Remove what killed writers left below a folder; nobody else may be writing there."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        remove_leftovers(place)
