"""The automatic masks of one image in a file that vouches for itself: what they were made with, and that it is whole.

One JSON an image, written whole or not at all, with the sha256 of the rest among its keys. What the masks depend on
(weights, input size, the generator's settings, the image's bytes) stands in the file: masks of anything else are never
taken for these. Whatever keeps automatic masks keeps them so: a run, a teacher's store, `samlet masks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from samlet.data.segmentations import Segmentations
from samlet.distill.store.entries import inside
from samlet.distill.store.identity import described, differences
from samlet.distill.store.sealing import SEAL, read_sealed, write_sealed
from samlet.errors import DataError

if TYPE_CHECKING:
    from samlet.models.amg import AmgSettings, AutomaticMasks

FORMAT = 1
FOLDER = "automatic_masks"  # in a teacher's store
WITHOUT_EFFECT = frozenset({"points_per_batch"})  # settings that masks do not depend on
_PARTS = ("areas", "predicted_iou", "stability_score", "points")


class MaskFacts(NamedTuple):
    """Everything that automatic masks depend on, the image apart."""

    teacher_kind: str
    """The image encoder: vit_h, vit_l, vit_b, vit_t."""
    image_size: int
    """Side of the input frame; named first where both differ, for position tables follow it."""
    teacher_sha256: str
    """Digest of the weights."""
    settings: dict[str, Any]
    """The generator's, but for those without effect on the masks."""

    @classmethod
    def of(cls, kind: str, sha256: str, image_size: int, settings: AmgSettings) -> MaskFacts:
        """The facts of a generator around a model of this kind and digest."""
        plain = {name: value for name, value in settings.as_dict().items() if name not in WITHOUT_EFFECT}
        return cls(kind, image_size, sha256, plain)


class Kept(NamedTuple):
    """A file of masks that was found to be whole."""

    place: Path
    number_of_masks: int
    digest: str


class KeptMasks(NamedTuple):
    """What a file says: N masks in the original frame, in the order in which they were found."""

    place: Path
    facts: MaskFacts
    image_sha256: str
    size: tuple[int, int]  # (H, W) of the original frame
    rles: Sequence[dict[str, Any]]  # COCO's compressed runs
    areas: Sequence[int]
    predicted_iou: Sequence[float]
    stability_score: Sequence[float]
    points: Sequence[Sequence[float]]  # (x, y) that each mask was found with
    digest: str  # of all of this

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def brief(self) -> Kept:
        """Where the masks are, and how many: what can be held of very many images."""
        return Kept(self.place, len(self), self.digest)

    def segmentations(self, chosen: Sequence[int] | None = None) -> Segmentations:
        """The masks as objects of the image; all, or those that are chosen."""
        numbers = range(len(self.rles)) if chosen is None else chosen
        return Segmentations([(f"{self.place}: mask {n}", self.rles[n]) for n in numbers], self.size)

    def difference(self, facts: MaskFacts, image_sha256: str) -> str | None:
        """The first field in which the masks are others than those that are wanted, with both values."""
        wanted = {**facts._asdict(), "image_sha256": image_sha256}
        return _difference({**self.facts._asdict(), "image_sha256": self.image_sha256}, wanted)

    def other_making(self, facts: MaskFacts) -> str | None:
        """The same, the image apart, which may be edited at any time."""
        return _difference(self.facts._asdict(), facts._asdict())


def _difference(made: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    found = next(differences(made, wanted), None)
    return None if found is None else described(*found)


def mask_file(folder: Path, image_id: str) -> Path:
    """Where the masks of an image lie.

    Raises:
        DataError: the image's name leads out of the folder.
    """
    return folder / f"{inside(image_id)}.json"


def write_masks(place: Path, facts: MaskFacts, image_sha256: str, masks: AutomaticMasks) -> None:
    """Write the masks of one image, whole or not at all.

    Raises:
        SamletError: the disk is full, or not ours to write.
    """
    content: Mapping[str, Any] = {
        "format": FORMAT,
        **facts._asdict(),
        "image_sha256": image_sha256,
        "size": [int(side) for side in masks.size],
        "rles": [{"size": list(map(int, rle["size"])), "counts": rle["counts"]} for rle in masks.rles],
        "areas": [int(area) for area in masks.area],
        "predicted_iou": [float(value) for value in masks.predicted_iou],
        "stability_score": [float(value) for value in masks.stability_score],
        "points": [[float(value) for value in point] for point in masks.points],
    }
    write_sealed(place, content)


def read_masks(place: Path) -> KeptMasks:
    """What `write_masks` wrote.

    Raises:
        DataError: it is not there, cannot be read, is damaged, or of a newer samlet.
    """
    content = read_sealed(place)
    if content.get("format", 0) != FORMAT:
        raise DataError(f"{place}: has format {content.get('format')}, this samlet reads {FORMAT}; upgrade samlet")
    try:
        facts = MaskFacts(*(content[name] for name in MaskFacts._fields))
        height, width = content["size"]
        parts = {name: content[name] for name in _PARTS}
        if any(len(part) != len(content["rles"]) for part in parts.values()):
            raise ValueError("its lists are of different lengths")
        return KeptMasks(
            place, facts, content["image_sha256"], (height, width), content["rles"], digest=content[SEAL], **parts
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: does not describe automatic masks ({error})") from error


def masks_if_kept(place: Path, facts: MaskFacts, image_sha256: str) -> KeptMasks | None:
    """The masks of an image, where they are whole and made with these facts from these bytes."""
    try:
        kept = read_masks(place)
    except DataError:
        return None
    return None if kept.difference(facts, image_sha256) else kept
