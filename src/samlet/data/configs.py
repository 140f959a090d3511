"""Configuration of the data: where it lies, how prompts are drawn, how images are varied. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from samlet.data.formats import FormatName
from samlet.schema import ExistingPath, Loc, StrictModel

if TYPE_CHECKING:
    from samlet.data.dataset import SegmentationDataset, ValidationSet
    from samlet.data.grid import GridSettings
    from samlet.data.prompts import PromptSettings
    from samlet.data.transforms import Augmentation

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Mode = Literal["point", "box", "mixed", "everything"]


class PromptConfig(StrictModel):
    """How clicks and boxes are drawn from masks in training."""

    positive_points: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    """Fewest and most clicks on the object."""
    negative_points: tuple[Count, Count] = (0, 0)
    """Fewest and most clicks beside the object."""
    box_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Each edge of a box moves by up to this share of the side, at most 20 pixels at 1024, in or out."""
    mix: tuple[Weight, Weight, Weight] = (0.4, 0.4, 0.2)
    """Weights of points, box, and box with points in mode `mixed`."""
    fixed: bool = False
    """Each object keeps its prompt through all epochs, drawn once for each stored variant of the image; for stores that
    hold the decoder's answers, too."""
    correction_rounds: Annotated[int, Field(ge=0, le=8)] = 0
    """Prompt in the loop: so many times one more click falls where the student's answer is wrong (by the ground truth,
    without one by the teachers), and student and teachers answer again; the loss is the mean over the rounds."""
    correction_mask_input: bool = False
    """Feed the student's last logits back as a mask prompt with each correction, to student and teachers alike."""
    correction_min_cells: Annotated[int, Field(ge=1)] = 10
    """An answer that is wrong in fewer cells of the low-res grid (4 x 4 pixels of the input frame) gets no click."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """Ranges that are upside down, weights that are all zero."""
        for name in ("positive_points", "negative_points"):
            low, high = getattr(self, name)
            if low > high:
                yield (name,), f"the fewest ({low}) is more than the most ({high})"
        if sum(self.mix) == 0:
            yield ("mix",), "all weights are 0; give one of points, box, both a positive weight"

    def build(self, mode: Mode) -> PromptSettings:
        """The settings of `data.prompts`; the points of a grid are clicks."""
        from samlet.data.prompts import PromptSettings

        return PromptSettings(
            "point" if mode == "everything" else mode,
            self.positive_points,
            self.negative_points,
            self.box_jitter,
            self.mix,
            self.fixed,
        )


class AugmentationConfig(StrictModel):
    """Random variation of training images; masks and prompts follow."""

    enable: bool = True
    """false: every image is laid into the input frame as it is."""
    horizontal_flip: Share = 0.5
    """Probability of a mirror image."""
    vertical_flip: Share = 0.0
    """Probability of an upside-down image; for views from above."""
    scale: tuple[Annotated[float, Field(ge=0.1, le=10)], Annotated[float, Field(ge=0.1, le=10)]] = (0.75, 1.5)
    """Smallest and largest size relative to the fit; below 1 leaves padding, above 1 a random window is cut."""
    crop: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest share of each side that is cut away at random before scaling."""
    brightness: Share = 0.2
    """Brightness is multiplied by 1 - b .. 1 + b."""
    contrast: Share = 0.2
    """As brightness, for the distance from the mean grey."""
    saturation: Share = 0.2
    """As brightness, for the distance from grey."""
    variants: Annotated[int, Field(ge=1)] | None = None
    """So many different variations of each image, which the epochs take in turn; null: a new one in each epoch."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """A range that is upside down."""
        if self.scale[0] > self.scale[1]:
            yield ("scale",), f"the smallest ({self.scale[0]}) is more than the largest ({self.scale[1]})"

    @property
    def moves_images(self) -> bool:
        """Whether it changes more than colours."""
        return self.enable and (self.horizontal_flip, self.vertical_flip, self.scale, self.crop) != (0, 0, (1, 1), 0)

    def build(self) -> Augmentation:
        """The settings of `data.transforms`."""
        from samlet.data.transforms import Augmentation

        return Augmentation(**self.model_dump(exclude={"enable"})) if self.enable else Augmentation()


class EverythingConfig(StrictModel):
    """Mode `everything`: which points of the grid are learnt, and what."""

    unlabelled: Literal["ignore", "teacher", "negative"] = "ignore"
    """Points beside all objects of an image: left out (ignore), left to the teachers (teacher), or the IoU head learns
    there how well masks fit any object, mostly not at all (negative; only where every object has its mask). An image
    without any mask is left to the teachers in any case."""
    max_points: Annotated[int, Field(ge=1)] | None = 64
    """So many of the grid's points are drawn from an image in each step; null: all. One on nested objects asks about up
    to three of them."""
    object_share: Share = 0.5
    """Share of the drawn points that lie on objects, spread evenly over them, as far as there are so many; the others
    lie beside them, unless these are ignored."""
    jitter: bool = True
    """Shift the grid by up to half a cell in each step, so that small objects between its points are met; not where
    prompts.fixed."""
    boxes: Count = 0
    """So many objects of an image get a box prompt as well, so that boxes are not forgotten."""

    def build(self, points_per_side: int) -> GridSettings:
        """The settings of `data.grid`."""
        from samlet.data.grid import GridSettings

        return GridSettings(points_per_side, **self.model_dump())


class DatasetConfig(StrictModel):
    """Images and masks, and how training draws from them."""

    root: ExistingPath
    """The data set's folder."""
    train: str = "train"
    """The training split: a folder or annotation file below root; where absent, root itself is one split."""
    val: str = "val"
    """The validation split (valid and validation stand in for val); where absent, val_fraction is held out for it."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images kept for validation where there is no such split; chosen by seed and image id."""
    format: FormatName = "auto"
    """How masks are written; auto finds out and says so."""
    mode: Mode = "mixed"
    """What training prompts with: clicks, boxes, both, or each point of a grid over the whole image by itself."""
    grid_points: Annotated[int, Field(ge=1)] = 32
    """Mode `everything`: the grid has so many points on each side, and every object takes part."""
    objects_per_image: Annotated[int, Field(ge=1)] = 8
    """Most objects that are drawn from an image in a step; the encoder runs once for all of them."""
    min_area: Annotated[int, Field(ge=1)] = 9
    """Objects with fewer visible pixels in the input frame are not drawn."""
    unlabelled: Literal["refuse", "use", "drop"] = "refuse"
    """Images without masks: refuse them, use them for what a teacher says, or leave them out."""
    labelled_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the training images whose masks are used, chosen by seed and id; the others count as unlabelled."""
    labelled_repeat: Annotated[int, Field(ge=1)] = 1
    """Times that each labelled image comes in an epoch; above 1 keeps a few of them from drowning among the others."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Files that cannot be read or used: stop with their path, or take another and report the path."""
    scaled_decode: bool = False
    """Decode large JPEGs for training at 1/2, 1/4 or 1/8 of their size where augmentation enlarges no pixel of that."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """Left-out labels without leave to use unlabelled images."""
        if self.labelled_fraction < 1 and self.unlabelled == "refuse":
            yield ("labelled_fraction",), "below 1 makes images unlabelled; set dataset.unlabelled to use or drop"

    def build_train(
        self,
        *,
        image_size: int,
        seed: int,
        prompts: PromptConfig,
        augmentation: AugmentationConfig,
        everything: EverythingConfig | None = None,
    ) -> SegmentationDataset:
        """The training images; `everything` is read in mode everything alone.

        Raises:
            DataError: there are none, or some are refused.
        """
        from samlet.data.dataset import SegmentationDataset
        from samlet.data.splits import train_split

        split = train_split(self, seed)
        grid = EverythingConfig() if everything is None else everything
        return SegmentationDataset(
            split.records,
            image_size=image_size,
            seed=seed,
            prompts=prompts.build(self.mode),
            augmentation=augmentation.build(),
            objects_per_image=self.objects_per_image,
            min_area=self.min_area,
            broken=self.broken,
            problems=split.problems,
            scaled_decode=self.scaled_decode,
            grid=grid.build(self.grid_points) if self.mode == "everything" else None,
        )

    def build_val(self, *, seed: int) -> ValidationSet:
        """The validation images with all their objects.

        Raises:
            DataError: there are none, or some are refused.
        """
        from samlet.data.dataset import ValidationSet
        from samlet.data.splits import val_split

        split = val_split(self, seed)
        return ValidationSet(split.records, broken=self.broken, problems=split.problems)


class RetentionConfig(StrictModel):
    """A second data set, of what the student should not forget: measured on, never trained on."""

    root: ExistingPath
    """The data set's folder, or its annotation file."""
    val: str = "val"
    """The split to measure on (valid and validation stand in for val); where it has no `val`, all of root."""
    format: FormatName = "auto"
    """How masks are written; auto finds out and says so."""
    max_images: Annotated[int, Field(ge=1)] | None = None
    """Measure on the first n images only; null: all."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Files that cannot be read or used: stop with their path, or leave them out."""

    def build(self) -> ValidationSet:
        """The labelled images.

        Raises:
            DataError: there are none, or some are refused.
        """
        from samlet.data.opening import open_split

        return open_split(self.root, self.val, self.format, self.broken)
