"""Training samples and validation images."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from samlet.data.batches import stack_rows
from samlet.data.grid import GridSettings, ask_everywhere
from samlet.data.images import Decoded, probe_image, read_image, read_picture
from samlet.data.masks import centre_point, mask_box
from samlet.data.prompts import PromptRow, PromptSettings, draw_blind_prompt, draw_prompt
from samlet.data.records import ObjectMasks, Problem, Record, read_crowds, read_masks
from samlet.data.sampler import SampleKey
from samlet.data.streams import Stream, generator, name_index
from samlet.data.transforms import (
    Augmentation,
    Colour,
    Geometry,
    change_colour,
    coverage,
    draw_colour,
    draw_geometry,
    transform_image,
    transform_mask,
    whole,
)
from samlet.errors import DataError
from samlet.frames import LOW_RES_STRIDE, normalize_and_pad
from samlet.types import Prompts, Sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, UInt8

Policy = Literal["refuse", "skip"]
Mask = np.ndarray


class Picture(NamedTuple):
    """An image in the input frame, as one draw of augmentation left it."""

    pixels: Float[torch.Tensor, "3 S S"]  # normalised, then padded with zeros
    input_size: tuple[int, int]  # (H, W) of the unpadded part
    variation: str  # digest of the geometry, and of the colours where they are among the countable variants


class Prompted(NamedTuple):
    """An image with the prompts of all its objects."""

    picture: Picture
    prompts: Prompts
    objects: tuple[int, ...]  # whose each prompt is; of an unlabelled image, the prompt's number


class Asked(NamedTuple):
    """The prompts of a sample and what is known of them; see `Sample`."""

    rows: list[PromptRow]
    whose: Sequence[int]  # the object of each prompt, as the data set numbers them
    masks: torch.Tensor
    labelled: torch.Tensor
    target_of: torch.Tensor | None = None
    background: torch.Tensor | None = None


class StoredLookup(Protocol):
    """Finds what teachers' stores hold of an image; refuses what was made of other pixels or prompts."""

    def __call__(
        self, image_id: str, variant: int, variation: str, objects: Sequence[int], prompts: Prompts
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Of the image and of its prompts, by "teacher/feature", as stored."""


class SegmentationDataset(Dataset[Sample]):
    """One image with a draw of its objects and a prompt for each; `dataset[key]` is a pure function of seed and key.

    A sample has at least one prompt. Where no object is visible after augmentation the image is taken
    unaugmented; where none is visible then either, the prompt is drawn blind, is not `labelled`, and the image
    is reported in `Sample.skipped`.

    Args:
        records: the images, in an order that no run changes.
        image_size: side S of the input frame.
        seed: the run's seed.
        prompts: how prompts are drawn; the default draws single clicks, boxes, and both.
        augmentation: how images are varied; the default leaves them as they are.
        objects_per_image: most objects of a sample.
        min_area: fewest visible pixels in the input frame of an object that is drawn.
        broken: what to do where a file cannot be used.
        problems: what was wrong with files that are not among the records.
        scaled_decode: whether large JPEGs are decoded no larger than they are needed.
        grid: ask about the points of a grid and all objects under them, in place of `objects_per_image` of them.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        image_size: int,
        seed: int,
        prompts: PromptSettings | None = None,
        augmentation: Augmentation | None = None,
        objects_per_image: int = 8,
        min_area: int = 9,
        broken: Policy = "refuse",
        problems: Sequence[Problem] = (),
        scaled_decode: bool = False,
        grid: GridSettings | None = None,
    ) -> None:
        self.grid = grid
        self.records, self.problems, self.scaled_decode = tuple(records), tuple(problems), scaled_decode
        self.image_size, self.seed = image_size, seed
        self.prompts = PromptSettings() if prompts is None else prompts
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.objects_per_image, self.min_area, self.broken = objects_per_image, min_area, broken
        self.embeddings: Callable[[SampleKey], torch.Tensor] | None = None
        self.stored: StoredLookup | None = None

    def varied(self, prompts: PromptSettings, augmentation: Augmentation) -> SegmentationDataset:
        """The same images with other prompts and augmentation."""
        other = copy(self)
        other.prompts, other.augmentation = prompts, augmentation
        return other

    def of_records(self, records: Sequence[Record]) -> SegmentationDataset:
        """Other images, drawn from in the same way."""
        other = copy(self)
        other.records = tuple(records)
        return other

    def with_embeddings(self, lookup: Callable[[SampleKey], torch.Tensor]) -> SegmentationDataset:
        """The same samples with the student's embedding of each."""
        other = copy(self)
        other.embeddings = lookup
        return other

    def with_stored(self, lookup: StoredLookup) -> SegmentationDataset:
        """The same samples with what teachers' stores hold of each."""
        other = copy(self)
        other.stored = lookup
        return other

    def __len__(self) -> int:
        return len(self.records)

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The ids of all images by index."""
        return tuple(record.image_id for record in self.records)

    @property
    def num_labelled(self) -> int:
        """Images whose masks are used."""
        return sum(record.open_masks is not None for record in self.records)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of an epoch and index; with `broken` "skip" an unusable image gives way to the next index.

        Raises:
            DataError: a file cannot be used and `broken` is "refuse", or no image can be read at all.
        """
        skipped: list[str] = []
        for step in range(len(self.records)):
            at = SampleKey(key.epoch, (key.index + step) % len(self.records))
            try:
                sample = self._sample(at, skipped)
                return sample if self.embeddings is None else sample._replace(embedding=self.embeddings(key))
            except DataError as error:
                self._report(error, skipped)
        raise DataError(f"None of {len(self.records)} images can be read; the first: {skipped[0]}")

    def _report(self, error: DataError, skipped: list[str]) -> None:
        if self.broken == "refuse":
            raise error
        skipped.append(str(error))

    def picture(self, key: SampleKey) -> Picture:
        """The pixels of `self[key]` alone; masks are opened only where augmentation might have lost all objects.

        Raises:
            DataError: a file cannot be used.
        """
        image = self._decoded(key)
        geometry, colour = self._settled(key, image.size)
        return self._pictured(image, geometry, colour)

    def prompted(self, key: SampleKey) -> Prompted:
        """The picture, and a prompt for every visible object; where there is none, `objects_per_image` blind ones.

        Raises:
            DataError: a file cannot be used.
        """
        image = self._decoded(key)
        geometry, colour = self._drawn(key, image.size)
        every = copy(self)
        every.objects_per_image = sys.maxsize
        geometry, objects = every._framed(key, image.size, geometry, [], [])
        rows = self._rows(objects, geometry, key)
        whose = tuple(index for index, _ in objects) or tuple(range(len(rows)))
        return Prompted(self._pictured(image, geometry, colour), stack_rows(rows), whose)

    def variation(self, key: SampleKey) -> str:
        """`self.picture(key).variation`, without decoding the image.

        Raises:
            DataError: a file cannot be used.
        """
        return self._variation(*self._settled(key, probe_image(self.records[key.index].image_path).size))

    def _sample(self, key: SampleKey, skipped: list[str]) -> Sample:
        record, image = self.records[key.index], self._decoded(key)
        geometry, colour = self._drawn(key, image.size)
        known = len(skipped)
        too_small: list[Mask] = []
        geometry, objects = self._framed(key, image.size, geometry, skipped, too_small)
        picture = self._pictured(image, geometry, colour)
        if self.grid is None:
            asked = self._asked(objects, geometry, key)
        else:
            unknown = None
            if self.grid.unlabelled == "negative" and record.is_complete and len(skipped) == known:
                crowds = read_crowds(record, image.size)
                unknown = too_small + [transform_mask(mask, geometry) for mask in crowds]
            asked = self._asked_everywhere(self.grid, objects, geometry, key, unknown)
        prompts, stored, answers = stack_rows(asked.rows), None, None
        if self.stored is not None:
            place = record.image_id, self._variant(key), picture.variation
            stored, answers = self.stored(*place, asked.whose, prompts)
        return Sample(
            pixels=picture.pixels,
            input_size=geometry.size,
            prompts=prompts,
            masks=asked.masks,
            labelled=asked.labelled,
            image_id=record.image_id,
            skipped=tuple(skipped),
            stored=stored,
            answers=answers,
            target_of=asked.target_of,
            background=asked.background,
        )

    def _asked(self, objects: list[tuple[int, Mask]], geometry: Geometry, key: SampleKey) -> Asked:
        """A prompt for each object."""
        rows = self._rows(objects, geometry, key)
        grids = [coverage(mask, self.image_size) for _, mask in objects]
        whose = [index for index, _ in objects] or range(len(rows))
        return Asked(rows, whose, self._ground_truth(grids, len(rows)), torch.full((len(rows),), bool(objects)))

    def _asked_everywhere(
        self,
        grid: GridSettings,
        objects: list[tuple[int, Mask]],
        geometry: Geometry,
        key: SampleKey,
        unknown: list[Mask] | None,
    ) -> Asked:
        """A click for each point of the grid and each object under it, boxes of a few objects.

        A point beside all of them and beside the `unknown` is known to lie on no object; None: none is.
        """
        if self.prompts.fixed:
            grid, objects = grid._replace(jitter=False), sorted(objects, key=itemgetter(0))
        masks = [mask for _, mask in objects]
        boxes = self.prompts._replace(mode="box")
        boxed = [
            draw_prompt(self._prompt_rng(key, index), mask, self.image_size, boxes)
            for index, mask in objects[: grid.boxes]
        ]
        found = ask_everywhere(self._rng(Stream.GRID, key), geometry.size, masks, grid, boxed, unknown=unknown)
        grids = [coverage(mask, self.image_size) for mask in found.masks]
        return Asked(
            rows=found.rows,
            whose=range(len(found.rows)),
            masks=torch.from_numpy(np.stack(grids)),
            labelled=torch.from_numpy(found.labelled),
            target_of=torch.from_numpy(found.target_of),
            background=torch.from_numpy(found.background),
        )

    def _variant(self, key: SampleKey) -> int:
        return 0 if self.augmentation.variants is None else self.augmentation.of(key.epoch)

    def _drawn(self, key: SampleKey, size: tuple[int, int]) -> tuple[Geometry, Colour]:
        """How augmentation would vary an image. Countable variants follow its name, so that they can be stored."""
        settings = self.augmentation
        index = key.index if settings.variants is None else name_index(self.records[key.index].image_id)
        which = settings.of(key.epoch), index
        geometry = draw_geometry(generator(Stream.GEOMETRY, self.seed, *which), size, self.image_size, settings)
        return geometry, draw_colour(generator(Stream.COLOUR, self.seed, *which), settings)

    def _framed(
        self, key: SampleKey, size: tuple[int, int], geometry: Geometry, skipped: list[str], too_small: list[Mask]
    ) -> tuple[Geometry, list[tuple[int, Mask]]]:
        """The geometry, or the plain one where no object is visible in it; and objects that are.

        `too_small` gets the others.
        """
        record = self.records[key.index]
        if record.open_masks is None:
            return geometry, []
        masks = record.open_masks(size)
        objects = self._objects(masks, geometry, key, skipped, too_small)
        if not objects and geometry != (plain := whole(size, self.image_size)):
            geometry, objects = plain, self._objects(masks, plain, key, skipped, too_small)
        if not objects:
            skipped.append(f"{record.image_path}: none of its objects has {self.min_area} pixels in the input frame")
        return geometry, objects

    def _settled(self, key: SampleKey, size: tuple[int, int]) -> tuple[Geometry, Colour]:
        """What `_sample` would use; the plain geometry stays whatever the masks say."""
        geometry, colour = self._drawn(key, size)
        if geometry != whole(size, self.image_size):
            geometry, _ = self._framed(key, size, geometry, [], [])
        return geometry, colour

    def _decoded(self, key: SampleKey) -> Decoded:
        """An image as large as the widest crop and the largest scale need it; one size for all draws."""
        enlarged = max(1.0, self.augmentation.scale[1]) / (1 - self.augmentation.crop)
        longest = self.image_size * enlarged if self.scaled_decode else math.inf
        return read_picture(self.records[key.index].image_path, longest)

    def _pictured(self, image: Decoded, geometry: Geometry, colour: Colour) -> Picture:
        placed = geometry._replace(window=image.place(geometry.window))
        resized = change_colour(transform_image(image.pixels, placed), colour)
        pixels = normalize_and_pad(resized, self.image_size)
        return Picture(pixels, geometry.size, self._variation(geometry, colour))

    def _variation(self, geometry: Geometry, colour: Colour) -> str:
        made_with = (geometry,) if self.augmentation.variants is None else (geometry, colour)
        return hashlib.sha256(repr(made_with).encode()).hexdigest()[:16]

    def _objects(
        self, masks: ObjectMasks, geometry: Geometry, key: SampleKey, skipped: list[str], too_small: list[Mask]
    ) -> list[tuple[int, Mask]]:
        """Up to `objects_per_image` visible objects in random order; masks are read one by one until enough are."""
        too_small.clear()
        chosen: list[tuple[int, Mask]] = []
        for index in generator(Stream.OBJECTS, self.seed, *key).permutation(len(masks)):
            try:
                mask = transform_mask(masks.read(int(index)), geometry)
            except DataError as error:
                if str(error) not in skipped:
                    self._report(error, skipped)
                continue
            if np.count_nonzero(mask) >= self.min_area:
                chosen.append((int(index), mask))
            else:
                too_small.append(mask)
            if self.grid is None and len(chosen) == self.objects_per_image:
                break
        return chosen

    def _rows(self, objects: list[tuple[int, Mask]], geometry: Geometry, key: SampleKey) -> list[PromptRow]:
        """A prompt for each object, or `objects_per_image` blind ones where there is none."""
        if objects:
            return [
                draw_prompt(self._prompt_rng(key, index), mask, self.image_size, self.prompts)
                for index, mask in objects
            ]
        return [
            draw_blind_prompt(self._prompt_rng(key, index), geometry.size, self.prompts)
            for index in range(self.objects_per_image)
        ]

    def _prompt_rng(self, key: SampleKey, item: int) -> np.random.Generator:
        return self._rng(Stream.PROMPT, key, item)

    def _rng(self, stream: Stream, key: SampleKey, item: int = 0) -> np.random.Generator:
        """Where prompts are fixed, they follow the image's name and variant, not the epoch."""
        if self.prompts.fixed:
            return generator(stream, self.seed, self._variant(key), name_index(self.records[key.index].image_id), item)
        return generator(stream, self.seed, *key, item)

    def _ground_truth(self, grids: list[Float32[np.ndarray, "h w"]], count: int) -> torch.Tensor:
        side = self.image_size // LOW_RES_STRIDE
        return torch.from_numpy(np.stack(grids)) if grids else torch.zeros(count, side, side)


NO_REGIONS = np.zeros((0, 1, 1), np.bool_)


class EvalImage(NamedTuple):
    """One validation image in the original frame with all its O objects; numpy throughout."""

    image_id: str
    image: UInt8[np.ndarray, "H W 3"]
    masks: Bool[np.ndarray, "O H W"]
    points: Float32[np.ndarray, "O 2"]  # (x, y): the most interior pixel of each object
    boxes: Float32[np.ndarray, "O 4"]  # (x0, y0, x1, y1), from pixel edge to pixel edge
    skipped: tuple[str, ...] = ()  # what could not be used, where the policy is to skip
    crowds: Bool[np.ndarray, "K H W"] = NO_REGIONS  # full of objects without masks of their own


class ValidationSet:
    """Validation images at their original resolution with deterministic prompts; nothing is drawn.

    Args:
        records: labelled images.
        broken: "refuse" raises on what cannot be used; "skip" leaves it out and reports it in `EvalImage.skipped`.
        problems: what was wrong with files that are not among the records.
    """

    def __init__(
        self, records: Sequence[Record], *, broken: Policy = "refuse", problems: Sequence[Problem] = ()
    ) -> None:
        self.records, self.problems, self.broken = tuple(records), tuple(problems), broken

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EvalImage]:
        return (self.item(index) for index in range(len(self)))

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The ids of all images by index."""
        return tuple(record.image_id for record in self.records)

    def item(self, index: int) -> EvalImage:
        """An image and all its objects; without objects where the policy is to skip and nothing can be used.

        Raises:
            DataError: a file cannot be used and the policy is to refuse.
        """
        record, skipped = self.records[index], list[str]()
        image = self._image(record, skipped)
        size = (image.shape[0], image.shape[1])
        masks, crowds = self._masks(record, size, skipped), read_crowds(record, size)
        return EvalImage(
            image_id=record.image_id,
            image=image,
            masks=np.stack(masks) if masks else np.zeros((0, *size), np.bool_),
            points=np.array([centre_point(mask) for mask in masks], np.float32).reshape(-1, 2),
            boxes=np.array([mask_box(mask) for mask in masks], np.float32).reshape(-1, 4),
            skipped=tuple(skipped),
            crowds=np.stack(crowds) if crowds else NO_REGIONS,
        )

    def _image(self, record: Record, skipped: list[str]) -> UInt8[np.ndarray, "H W 3"]:
        try:
            return read_image(record.image_path)
        except DataError as error:
            if self.broken == "refuse":
                raise
            skipped.append(str(error))
            return np.zeros((1, 1, 3), np.uint8)

    def _masks(self, record: Record, size: tuple[int, int], skipped: list[str]) -> list[Mask]:
        if record.open_masks is None or skipped:
            return []
        masks: list[Mask] = []
        for mask in read_masks(record.open_masks, size):
            if not isinstance(mask, DataError):
                masks.append(mask)
            elif self.broken == "refuse":
                raise mask
            else:
                skipped.append(str(mask))
        return masks
