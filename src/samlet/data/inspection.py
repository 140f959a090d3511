"""Reading a whole data set the way training would, and noting all that is wrong or odd with any file of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from samlet.data.configs import DatasetConfig
from samlet.data.formats import ALIASES, FormatName, as_split, exists, read_split, split_place
from samlet.data.formats.instance_labels import LabelImage
from samlet.data.images import is_image_name, probe_image, read_image, read_values
from samlet.data.masks import VOID, object_labels, single_channel
from samlet.data.records import Found, MaskFiles, ObjectMasks, Problem, Record, hidden
from samlet.data.splits import Split, train_split, val_split
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool

SPLITS = ("train", "val", "test")
_OF_MASKS = frozenset({"images", "image", "masks", "mask", "labels", "instances", "annotations", "sa1b"})
_SPLIT_NAMES = frozenset((*SPLITS, *(alias for aliases in ALIASES.values() for alias in aliases)))
NO_MASKS = {
    "refuse": "has no masks; only a teacher could supervise it (dataset.unlabelled: use)",
    "use": "has no masks; only a teacher can supervise it",
    "drop": "has no masks; it is left out",
}
USUAL_MODES = frozenset({"RGB", "L"})

Unlabelled = Literal["refuse", "use", "drop"]
Advance = Callable[[str, int, int], object]  # split, images done, images in all


@dataclass
class SplitReport:
    """What one split holds."""

    name: str
    format: str
    also_seen: tuple[str, ...] = ()
    images: int = 0
    labelled: int = 0
    objects: int = 0
    image_size: int = 1024
    min_area: int = 9
    tiny: int = 0  # objects with fewer than min_area pixels in the input frame of image_size
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (H, W) of every readable image
    areas: list[int] = field(default_factory=list)  # of every readable mask, pixels of the original frame
    kinds: Counter[str] = field(default_factory=Counter)  # file format and mode of the images
    storage: Counter[str] = field(default_factory=Counter)  # how mask files store their values
    problems: list[Problem] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # of the pixels -> the first image that has them

    def note(self, path: str | Path, reason: str, level: Literal["error", "warning"] = "warning") -> None:
        """Add a problem; a reason that begins with its path is shortened."""
        self.problems.append(Problem(str(path), reason.removeprefix(f"{path}: "), level))


@dataclass
class Report:
    """What a data set holds, split by split."""

    root: Path
    splits: list[SplitReport]
    problems: list[Problem] = field(default_factory=list)  # of the data set as a whole

    def note(self, path: str, reason: str) -> None:
        """Add what stops training on the data set as a whole, once."""
        problem = Problem(path, reason, "error")
        if problem not in self.problems:
            self.problems.append(problem)

    def all_problems(self) -> list[Problem]:
        """Everything that was noted, split by split."""
        return [*self.problems, *(problem for split in self.splits for problem in split.problems)]

    @property
    def refused(self) -> bool:
        """Whether training would refuse the data set as it is."""
        return any(problem.level == "error" for problem in self.all_problems())

    def to_json(self) -> dict[str, Any]:
        """Counts and problems as plain values."""
        left_out = {"records", "digests", "sizes", "areas", "problems"}
        splits = [{key: value for key, value in vars(split).items() if key not in left_out} for split in self.splits]
        problems = [problem._asdict() for problem in self.all_problems()]
        return {"root": str(self.root), "refused": self.refused, "splits": splits, "problems": problems}


def split_names(path: Path) -> tuple[Path, list[str | None]]:
    """A data set's root and its splits; a path without splits is one split itself."""
    if path.is_file():
        root, name = as_split(path)
        return root, [name]
    names: list[str | None] = [name for name in SPLITS if exists(path, name)]
    return path, names or [None]


def inspect(
    path: Path,
    *,
    format: FormatName = "auto",
    image_size: int = 1024,
    min_area: int = 9,
    unlabelled: Unlabelled = "refuse",
    advance: Advance = lambda *_: None,
) -> Report:
    """Read every image and mask of a data set once, and try what training would make of it.

    Raises:
        DataError: there is no such folder, or its annotation file is not what it seems.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    root, names = split_names(path)
    report = Report(root, [])
    for name in names:
        try:
            found = read_split(root, name, format)
        except DataError as error:
            if name != "test" or len(names) == 1:
                raise
            place, _, reason = str(error).partition(": ")
            report.problems.append(Problem(place, reason, "warning"))  # training does not read it
            continue
        report.splits.append(_Inspector(found, name or "all", image_size, min_area, unlabelled).run(advance))
    _note_duplicates(report)
    if path.is_dir():
        _note_names(report)
        _forgive_what_is_not_trained(report)
        if path.resolve().name.casefold() not in _SPLIT_NAMES:
            _try_training(report, DatasetConfig(root=root, format=format, unlabelled=unlabelled))
    return report


def _note_names(report: Report) -> None:
    """Splits under other names than they are asked for, and folders of images that belong to none."""
    names = {split.name for split in report.splits} & set(SPLITS)
    places = {name: split_place(report.root, name) for name in sorted(names)}
    for name, place in places.items():
        if place.name != name:
            report.problems.append(Problem(str(place), f"is taken as the split '{name}'", "warning"))
    if len(names) == 1:
        report.problems.append(Problem(str(report.root), f"has only the split '{min(names)}'", "warning"))
    if names:
        used = {path for split in report.splits for record in split.records for path in record.image_path.parents}
        for folder in sorted(set(report.root.iterdir()) - used - set(places.values())):
            if folder.is_dir() and folder.name.casefold() not in _OF_MASKS and _holds_images(folder, report.root):
                reason = "holds images that belong to no split; dataset.train and dataset.val can name it"
                report.problems.append(Problem(str(folder), reason, "warning"))


def _holds_images(folder: Path, root: Path) -> bool:
    return any(is_image_name(path) and not hidden(path, root) for path in folder.rglob("*"))


def _forgive_what_is_not_trained(report: Report) -> None:
    """Training reads no split beside train and val: what is wrong there is only worth knowing."""
    for split in report.splits:
        if split.name == "test":
            split.problems = [problem._replace(level="warning") for problem in split.problems]


def _try_training(report: Report, config: DatasetConfig) -> None:
    """Note why training or its validation would refuse the data set, where no file was named for it already."""
    by_name = {split.name: split for split in report.splits}
    whole = by_name.get("train", by_name.get("all"))
    attempts: list[tuple[Callable[[DatasetConfig, int], Split], SplitReport | None]]
    attempts = [(train_split, whole), (val_split, by_name.get("val", whole))]
    for attempt, source in attempts:
        if source is not None and any(problem.level == "error" for problem in source.problems):
            continue
        try:
            attempt(config, 0)
        except DataError as error:
            place, _, reason = str(error).partition(": ")
            report.note(place, reason)


def _note_duplicates(report: Report) -> None:
    for place, split in enumerate(report.splits):
        for other in report.splits[place + 1 :]:
            for digest in split.digests.keys() & other.digests.keys():
                reason = f"shows the same picture as {split.digests[digest]} of split '{split.name}'"
                report.problems.append(Problem(other.digests[digest], reason, "warning"))


class _Inspector:
    """One split on its way into a report."""

    def __init__(self, found: Found, name: str, image_size: int, min_area: int, unlabelled: Unlabelled) -> None:
        self.report = SplitReport(name, found.format, found.also_seen, len(found.records))
        self.report.problems, self.report.records = list(found.problems), list(found.records)
        self.report.image_size, self.report.min_area = image_size, min_area
        self.unlabelled = unlabelled

    def run(self, advance: Advance) -> SplitReport:
        if not self.report.records:
            self.report.note(self.report.name, "holds no image that can be used", "error")
        for done, record in enumerate(self.report.records):
            advance(self.report.name, done, self.report.images)
            self._image(record)
        advance(self.report.name, self.report.images, self.report.images)
        return self.report

    def _image(self, record: Record) -> None:
        report, path = self.report, record.image_path
        if record.open_masks is None:
            level: Literal["error", "warning"] = "error" if self.unlabelled == "refuse" else "warning"
            report.note(path, NO_MASKS[self.unlabelled], level)
        try:
            info, pixels = probe_image(path), read_image(path)
        except DataError as error:
            report.note(path, str(error), "error")
            return
        report.sizes.append(info.size)
        report.kinds[f"{info.format} {info.mode}"] += 1
        if info.mode not in USUAL_MODES:
            report.note(path, f"is stored as {info.mode}; it is read as 8-bit RGB")
        if info.turned:
            report.note(path, "is turned upright as its EXIF orientation says")
        if path.suffix != path.suffix.lower():
            report.note(path, f"has an upper-case extension ({path.suffix}); it is used all the same")
        self._twin(path, pixels)
        if record.open_masks is not None:
            self._masks(record, info.size)

    def _twin(self, path: Path, pixels: np.ndarray) -> None:
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        first = self.report.digests.setdefault(digest, str(path))
        if first != str(path):
            self.report.note(path, f"shows the same picture as {first}")

    def _masks(self, record: Record, size: tuple[int, int]) -> None:
        assert record.open_masks is not None
        try:
            masks = record.open_masks(size)
            count = len(masks)
        except DataError as error:
            self._refuse(record, error)
            return
        self.report.labelled += 1
        shrink = (self.report.image_size / max(size)) ** 2
        seen = dict[str, str]()
        for index in range(count):
            try:
                mask = masks.read(index)
            except DataError as error:
                self._refuse(record, error)
                continue
            self._mask(masks.name(index), mask, shrink)
            digest = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
            if seen.setdefault(digest, masks.name(index)) != masks.name(index):
                self.report.note(masks.name(index), f"is the same mask as {seen[digest]}")
        self._storage(masks)
        if count == 0:
            self.report.note(record.image_path, "is labelled but has no object; it trains only what a teacher says")

    def _refuse(self, record: Record, error: DataError) -> None:
        """An error's text begins with the place it is about."""
        path, _, reason = str(error).partition(": ")
        while reason.startswith(("annotation", "image")) and ": " in reason:
            more, _, reason = reason.partition(": ")
            path = f"{path}: {more}"
        self.report.note(path if reason else record.image_path, reason or str(error), "error")

    def _mask(self, name: str, mask: Bool[np.ndarray, "H W"], shrink: float) -> None:
        area = int(np.count_nonzero(mask))
        report = self.report
        report.objects += 1
        report.areas.append(area)
        if area * shrink < report.min_area:
            report.tiny += 1
            report.note(name, f"has under {report.min_area} pixels at image_size {report.image_size}; it is not drawn")
        if area == mask.size:
            report.note(name, "covers the whole image")

    def _storage(self, masks: ObjectMasks) -> None:
        """How mask files store their values; odd ways are noted once a file."""
        paths: Sequence[Path] = ()
        if isinstance(masks, MaskFiles):
            paths = masks.paths
        elif isinstance(masks, LabelImage):
            paths = [masks.path]
        for path in paths:
            try:
                self._storage_of(path, labels=isinstance(masks, LabelImage))
            except DataError:
                continue  # noted when its mask was read

    def _storage_of(self, path: Path, *, labels: bool) -> None:
        mode = probe_image(path).mode
        channel = single_channel(read_values(path))
        low, high = int(channel.min()), int(channel.max())
        if labels:
            kind = f"instance numbers ({mode})"
            if high == VOID and VOID not in object_labels(channel):
                self.report.note(path, "has 255 as void: these pixels belong to no object")
        elif ((channel > low) & (channel < high)).any():
            kind = f"soft edges ({mode})"
            self.report.note(path, "has soft edges; the object is what exceeds half of the largest value")
        else:
            kind = f"{low}/{high} ({mode})" if low < high else f"{high} only ({mode})"
        self.report.storage[kind] += 1
        if mode not in {"1", "L", "P"} and not mode.startswith("I"):
            self.report.note(path, f"is a mask stored as {mode}; its largest channel is taken")
