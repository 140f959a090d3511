"""The images that a run trains on, and what a teacher's automatic masks make of their labels.

Masks lie in the run's folder (found before the first step, the images shared by all processes) or in the teacher's
store (`samlet extract`); either way a file an image, and none is used unless it is whole and of this run's making.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from samlet.data.dataset import SegmentationDataset
from samlet.data.sampler import epoch_order
from samlet.distill.kept_masks import FOLDER, Kept, KeptMasks, MaskFacts, mask_file, read_masks
from samlet.distill.pseudo_labels import pseudo_labelled
from samlet.engine.automatic_masks import Asked, Find, ImageToMask, compute, look_at_all, tidy
from samlet.engine.facts import digest
from samlet.engine.progress import ImageBars
from samlet.engine.shard_loop import ImageCount
from samlet.errors import ConfigError, DataError
from samlet.models import load_sam
from samlet.models.amg import AmgSettings, tuned_settings
from samlet.stores import COMMAND, facts_of, refuse_other_making

if TYPE_CHECKING:
    from accelerate import Accelerator

    from samlet.config import RunConfig
    from samlet.data.records import Record
    from samlet.engine.run_dir import RunDir
    from samlet.models.sam import Sam

KEY = "mask_teacher"  # in run.json


class Labelled(NamedTuple):
    """Training images with the objects that are learnt, and what run.json says of how they came about."""

    data: SegmentationDataset
    facts: dict[str, Any]


class StoredLabels(NamedTuple):
    """A store's automatic masks, and what they must have been made with."""

    root: Path  # a folder for each split
    facts: MaskFacts


def training_images(config: RunConfig) -> SegmentationDataset:
    """The training images with the ground truth; where a teacher's masks replace it, images need none.

    Raises:
        DataError: there are none, or some are refused.
    """
    dataset, masks = config.dataset, config.mask_teacher
    if masks.enable and masks.method == "replace_gt" and dataset.unlabelled == "refuse":
        dataset = dataset.model_copy(update={"unlabelled": "use"})
    return dataset.build_train(
        image_size=config.model.image_size,
        seed=config.seed,
        prompts=config.prompts,
        augmentation=config.augmentation,
        everything=config.everything,
    )


def label_by_teacher(
    config: RunConfig,
    data: SegmentationDataset,
    accelerator: Accelerator,
    folder: RunDir,
    *,
    advance: Callable[[], object] = lambda: None,
    most: int | None = None,
) -> Labelled:
    """The training images with the teacher's masks as `mask_teacher` says; found here where they are not stored.

    Args:
        config: the run's, with mask_teacher enabled.
        data: the training images.
        accelerator: the run's.
        folder: the run's.
        advance: called between two images; it may raise, and the masks so far are kept.
        most: find the masks of the first so many images of the first epoch alone; the others have no objects then.

    Raises:
        SamletError: the run began with masks of another making; stored ones are missing, damaged or stale; nothing
            is left to learn.
    """
    if config.masks_are_stored:
        labels = stored_labels(config)
        facts = labels.facts
        _refuse_other_masks(facts, folder)
        kept = stored_masks(labels, data)
    else:
        sam, settings = mask_teacher(config), search_settings(config)
        facts = facts_of_masks(sam, settings)
        _refuse_other_masks(facts, folder)
        first = epoch_order(len(data), config.seed, 0)[:most]
        records = data.records if most is None else [data.records[index] for index in first]
        items = items_of(records, folder.automatic_masks)
        if accelerator.is_main_process:
            tidy(folder.automatic_masks)
        accelerator.wait_for_everyone()
        find = generator_of(sam.to(accelerator.device), settings)
        own = dict(list(items.items())[accelerator.process_index :: accelerator.num_processes])
        is_shared = accelerator.num_processes > 1
        _find_missing(own, facts, find, say=accelerator.print, advance=advance, broken=data.broken, is_shared=is_shared)
        accelerator.wait_for_everyone()
        kept = {name: asked.kept.brief for name, asked in _looked_at(items, facts, data.broken) if asked.kept}
    labelled = with_masks(config, data, kept)
    count = sum(masks.number_of_masks for masks in kept.values())
    accelerator.print(
        f"{config.mask_source.name}: {count} automatic masks on {len(kept)} images ({config.mask_teacher.method}, "
        f"pred_iou_thresh {facts.settings['pred_iou_thresh']:g}, "
        f"stability_score_thresh {facts.settings['stability_score_thresh']:g}); "
        f"{labelled.num_labelled} of {len(labelled)} images have objects"
    )
    if not count:
        _say_that_none_was_found(config, labelled, accelerator, is_whole=most is None)
    masks_sha256 = digest(sorted((image_id, masks.digest) for image_id, masks in kept.items()))
    return Labelled(labelled, {KEY: {**facts._asdict(), "masks_sha256": masks_sha256}})


def _say_that_none_was_found(
    config: RunConfig, labelled: SegmentationDataset, accelerator: Accelerator, *, is_whole: bool
) -> None:
    """Warn, or refuse where the teacher's masks were all that there was to learn.

    Raises:
        DataError: so it is.
    """
    source = config.mask_source
    said = f"{source.name}: found no mask on any image; lower mask_teacher.pred_iou_thresh and stability_score_thresh"
    if source.checkpoint is not None:
        said += f", or let `samlet tune-amg {source.checkpoint} {config.dataset.root}` find what suits this teacher"
    if config.masks_are_stored:
        said += f"; then remove {config.store_of(source) / FOLDER} and run {COMMAND}"
    if is_whole and not labelled.num_labelled and not config.distills:
        raise DataError(said)
    accelerator.print(f"warning: {said}")


def with_masks(config: RunConfig, data: SegmentationDataset, kept: Mapping[str, Kept]) -> SegmentationDataset:
    """The training images with the objects that the configuration's method makes of ground truth and masks.

    Raises:
        DataError: a mask of the ground truth cannot be read and the policy is to refuse.
    """
    masks = config.mask_teacher
    with ImageBars() as bar:
        task = bar.add_task("objects", total=len({record.image_id for record in data.records}))
        records = pseudo_labelled(
            data.records,
            kept,
            masks.method,
            masks.iou_threshold,
            broken=data.broken,
            advance=lambda count: bar.advance(task, count),
        )
    return data.of_records(records)


def mask_teacher(config: RunConfig) -> Sam:
    """The model whose automatic masks are wanted.

    Raises:
        SamletError: it has no checkpoint, or one that cannot be used.
    """
    teacher = config.mask_source
    if teacher.checkpoint is None:
        raise ConfigError(f"teachers: '{teacher.name}' has no checkpoint, so it cannot find masks; name one")
    return load_sam(teacher.checkpoint, image_size=teacher.image_size or config.model.image_size)


def search_settings(config: RunConfig) -> AmgSettings:
    """How masks are searched for: thresholds that the configuration leaves open are those tuned for the teacher.

    Raises:
        SamletError: the tuned ones are damaged, or belong to other weights or another input size.
    """
    teacher, masks, tuned = config.mask_source, config.mask_teacher, None
    if masks.leaves_thresholds_open and teacher.checkpoint is not None:
        tuned = tuned_settings(teacher.checkpoint, teacher.image_size or config.model.image_size)
    return masks.generator(tuned)


def facts_of_masks(sam: Sam, settings: AmgSettings) -> MaskFacts:
    """What the automatic masks of a model depend on."""
    return MaskFacts.of(*facts_of(sam), sam.image_size, settings)


def generator_of(sam: Sam, settings: AmgSettings) -> Find:
    """What finds the masks of one image, always in float32."""
    from samlet.models.amg import AutomaticMaskGenerator

    generator = AutomaticMaskGenerator.of(sam, settings)
    return generator.find


def items_of(records: Iterable[Record], folder: Path) -> dict[str, ImageToMask]:
    """Every image once, by its id, and where its masks are kept.

    Raises:
        DataError: an image's name leads out of the folder.
    """
    return {record.image_id: ImageToMask(record.image_path, mask_file(folder, record.image_id)) for record in records}


def stored_labels(config: RunConfig) -> StoredLabels:
    """The masks of the teacher's store; any weights will do where the configuration names none, and their thresholds.

    Raises:
        SamletError: there are no masks to ask, or the checkpoint cannot be used.
    """
    root = config.store_of(config.mask_source) / FOLDER
    if config.mask_source.checkpoint is not None:
        return StoredLabels(root, facts_of_masks(mask_teacher(config), search_settings(config)))
    any_file = next(iter(sorted((root / "train").rglob("*.json"))), None)
    if any_file is None:
        raise DataError(f"{root}: holds no automatic masks yet; run {COMMAND}")
    found = _repairable(read_masks, any_file).facts
    image_size = config.mask_source.image_size or config.model.image_size
    settings = config.mask_teacher.generator(AmgSettings.from_dict(found.settings))
    return StoredLabels(root, MaskFacts.of(found.teacher_kind, found.teacher_sha256, image_size, settings))


def stored_masks(labels: StoredLabels, data: SegmentationDataset) -> dict[str, Kept]:
    """The masks of every training image, after a look at every file and image.

    Raises:
        DataError: those of an image are missing, damaged or stale, which field differs is named.
    """
    items, kept = items_of(data.records, labels.root / "train"), dict[str, Kept]()
    for image_id, asked in _looked_at(items, labels.facts, data.broken):
        if asked.kept is None:
            place = asked.item.place
            if not place.exists():
                if data.broken == "skip" and not _is_readable(asked.item.image):
                    continue  # the extraction left it out, too
                raise DataError(f"{place}: missing: there are no automatic masks of {asked.item.image}; run {COMMAND}")
            found = _repairable(read_masks, place)
            if other := found.other_making(labels.facts):
                raise DataError(
                    f"{place}: its masks are of another making: {other}; give the folder of others, or remove "
                    f"{labels.root} and run {COMMAND}"
                )
            difference = found.difference(labels.facts, asked.image_sha256)
            raise DataError(f"{place}: its masks are stale: {difference}; run {COMMAND}, which finds them anew")
        kept[image_id] = asked.kept.brief
    return kept


def _looked_at(items: Mapping[str, ImageToMask], facts: MaskFacts, broken: str) -> Iterable[tuple[str, Asked]]:
    """What is known of every image; those that cannot be read are left out where the policy is to skip.

    Raises:
        DataError: an image cannot be read and the policy is to refuse.
    """
    for image_id, asked in zip(items, look_at_all(list(items.values()), facts), strict=True):
        if not isinstance(asked, DataError):
            yield image_id, asked
        elif broken == "refuse":
            raise asked


def _find_missing(
    items: Mapping[str, ImageToMask],
    facts: MaskFacts,
    find: Find,
    *,
    say: Callable[[str], object],
    advance: Callable[[], object],
    broken: str,
    is_shared: bool,
) -> None:
    """Compute what this process has to; what cannot be read stays without where the policy is to skip."""
    missing = [asked for _, asked in _looked_at(items, facts, broken) if asked.kept is None]
    whose = "this process's " if is_shared else ""
    if missing:
        say(f"{len(missing)} of {whose}{len(items)} images get their automatic masks before the first step")
    with ImageCount(len(missing), "masks") as count:
        for asked in missing:
            advance()
            try:
                compute(asked, facts, find)
            except DataError:
                if broken == "refuse":
                    raise
            count.advance(1)


def _refuse_other_masks(facts: MaskFacts, folder: RunDir) -> None:
    """A run goes on with masks of the making that it began with.

    Raises:
        ConfigError: another one; the first field that differs is named.
    """
    what = "this run learns from other automatic masks"
    refuse_other_making(
        folder.read_facts().get(KEY), facts._asdict(), folder, what, "the teacher's former weights and thresholds"
    )


def _repairable(read: Callable[[Path], KeptMasks], place: Path) -> KeptMasks:
    try:
        return read(place)
    except DataError as error:
        raise DataError(f"{error}; run {COMMAND}, which finds these masks anew") from error


def _is_readable(image: Path) -> bool:
    from samlet.data.images import read_image

    try:
        read_image(image)
    except DataError:
        return False
    return True
