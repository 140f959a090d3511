"""What a run asks of the stores of its teachers' features, and what makes it refuse them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import samlet
from samlet.artefacts import sha256_of
from samlet.data.sampler import SampleKey
from samlet.distill.objectives import build_objectives
from samlet.distill.store import Identity, StoreReader, read_identity, refuse_stale
from samlet.distill.store.identity import described, differences
from samlet.distill.stored import EMBEDDING, IOU, LOGITS, PROMPTS, TOKENS, StoredFeatures, stored_name
from samlet.engine.progress import ImageBars
from samlet.errors import ConfigError, DataError
from samlet.frames import PREPROCESSING
from samlet.models import load_sam
from samlet.models.checkpoints import digest_of, plain_state

if TYPE_CHECKING:
    from samlet.config import RunConfig
    from samlet.data.configs import AugmentationConfig
    from samlet.data.dataset import SegmentationDataset
    from samlet.data.records import Record
    from samlet.distill.configs import TeacherConfig
    from samlet.engine.run_dir import RunDir
    from samlet.models.sam import Sam

COMMAND = "samlet extract with this configuration"
HASHING_THREADS = 4


class TeacherFacts(NamedTuple):
    """What a store's identity says of a teacher's weights."""

    kind: str
    sha256: str


def stores_of(config: RunConfig, data: SegmentationDataset) -> dict[str, StoreReader]:
    """The stores that a run reads, by teacher, once everything in them was found to be what the run needs.

    Raises:
        SamletError: there is none, it was made of something else, or images are missing from it or have changed.
    """
    readers: dict[str, StoreReader] = {}
    stages = [stage for stage in config.resolved() if stage.distillation.enable]
    for teacher in config.teachers if stages else ():
        if not config.is_stored(teacher):
            continue
        root = config.store_of(teacher)
        found = read_identity(root)
        facts = TeacherFacts(found.teacher_kind, found.teacher_sha256)
        if teacher.checkpoint is not None:
            facts = facts_of(load_sam(teacher.checkpoint, image_size=teacher.image_size or config.model.image_size))
        for stage in stages:
            wanted = identity_of(stage, teacher, facts, taps=taps_of(config))
            free = {name: getattr(found, name) for name in ("teacher", "dtype", "precision")}  # any will do
            refuse_stale(root, wanted.model_copy(update=free), COMMAND)
        readers[teacher.name] = StoreReader(root, "train")
    if readers:
        refuse_other_images(readers, data)
    return readers


def facts_of_stores(readers: Mapping[str, StoreReader], folder: RunDir) -> dict[str, Any]:
    """What run.json says of the stores that a run reads, which are the same from its first start to its last.

    Raises:
        ConfigError: the run began with other weights or another dtype; the first field that differs is named.
    """
    found: dict[str, Any] = {}
    for name, reader in readers.items():
        found[name] = {field: getattr(reader.identity, field) for field in ("teacher_sha256", "dtype", "precision")}
        former = folder.read_facts().get("stores", {}).get(name)
        refuse_other_making(former, found[name], folder, f"'{name}' is read from another store", "the former store")
    return {"stores": found} if found else {}


def refuse_other_making(
    former: Mapping[str, Any] | None, now: Mapping[str, Any], folder: RunDir, what: str, remedy: str
) -> None:
    """A run goes on with targets of the making that it began with, `former`; None: it begins.

    Raises:
        ConfigError: another one; the first field that differs is named.
    """
    then = {name: value for name, value in (former or {}).items() if name in now}
    if former is not None and (found := next(differences(then, now), None)):
        raise ConfigError(
            f"{folder.facts}: {what}: {described(*found)}; put {remedy} back, or choose another output_dir"
        )


def refuse_other_images(readers: Mapping[str, StoreReader], data: SegmentationDataset) -> None:
    """Compare every image of a run with what its features were computed from.

    Raises:
        DataError: names the first image that is not in a store, or that has changed since.
    """
    records = {record.image_id: record for record in data.records}
    indices = {record.image_id: index for index, record in enumerate(data.records)}
    with ThreadPoolExecutor(HASHING_THREADS) as pool, ImageBars() as bar:
        task = bar.add_task("images", total=len(records))
        for record, digest in zip(records.values(), pool.map(_digest, records.values()), strict=True):
            bar.advance(task)
            if digest is None and data.broken == "skip":
                continue
            for reader in readers.values():
                for variant in range(data.augmentation.variants or 1):
                    entry = reader.entries.get((record.image_id, variant))
                    if entry is None:
                        if data.broken == "skip" and not _is_usable(data, SampleKey(variant, indices[record.image_id])):
                            continue  # the extraction left it out, too
                        raise DataError(f"{reader.root}: holds no features of {record.image_path}; run {COMMAND}")
                    if entry.image_sha256 != digest:
                        raise DataError(
                            f"{record.image_path}: has changed since its features were computed in {reader.root}; "
                            f"run {COMMAND}"
                        )


def _is_usable(data: SegmentationDataset, key: SampleKey) -> bool:
    try:
        data.picture(key)
    except DataError:
        return False
    return True


def _digest(record: Record) -> str | None:
    try:
        return sha256_of(record.image_path)
    except OSError:  # training will say so, or take another image
        return None


def stored_features(config: RunConfig, readers: Mapping[str, StoreReader]) -> StoredFeatures:
    """What looks a run's images up in its stores."""
    answers: tuple[str, ...] = ()
    if config.extraction.decoder_outputs:
        masks = (LOGITS,) if config.extraction.dense_mask_logits else ()
        answers = (PROMPTS, IOU, TOKENS, *masks, *map(stored_name, decoder_taps_of(config)))
    return StoredFeatures(readers, (EMBEDDING, *taps_of(config)), answers, COMMAND)


def facts_of(sam: Sam) -> TeacherFacts:
    """What tells one teacher's weights from another's, wherever they lie and however they were saved."""
    return TeacherFacts(sam.kind, digest_of(plain_state(sam), sam.arch))


def identity_of(
    config: RunConfig,
    teacher: TeacherConfig,
    facts: TeacherFacts,
    *,
    taps: tuple[str, ...] | None = None,
    images: int = 1,
) -> Identity:
    """Of what a store's features are, that this configuration needs of a teacher."""
    augmentation = config.augmentation
    return Identity(
        teacher=teacher.name,
        teacher_kind=facts.kind,
        teacher_sha256=facts.sha256,
        teacher_image_size=teacher.image_size or config.model.image_size,
        image_size=config.model.image_size,
        precision=teacher.precision or config.training.precision,
        taps=taps_of(config) if taps is None else taps,
        dtype=config.extraction.dtype,
        preprocessing=PREPROCESSING + (", scaled decode" if config.dataset.scaled_decode else ""),
        augmentation=_variation_of(augmentation, config.seed),
        variants=(augmentation.variants or 1) if augmentation.enable else 1,
        outputs=_outputs_of(config),
        shards=max(1, math.ceil(images / config.extraction.images_per_shard)),
        samlet=samlet.__version__,
    )


def taps_of(config: RunConfig) -> tuple[str, ...]:
    """The teachers' encoder taps that any stage compares."""
    stages = [build_objectives(stage.distillation) for stage in config.resolved()]
    return tuple(sorted({tap for objectives in stages for objective in objectives for tap in objective.teacher_taps}))


def decoder_taps_of(config: RunConfig) -> tuple[str, ...]:
    """The decoder's taps that any stage compares."""
    stages = [build_objectives(stage.distillation) for stage in config.resolved()]
    return tuple(sorted({tap for objectives in stages for objective in objectives for tap in objective.decoder_taps}))


def _outputs_of(config: RunConfig) -> dict[str, object] | None:
    """Everything that stored answers depend on besides the images; None where none are wanted."""
    if not config.extraction.decoder_outputs:
        return None
    drawn = {"correction_rounds", "correction_mask_input", "correction_min_cells", "fixed"}
    return {
        **config.prompts.model_dump(mode="json", exclude=drawn),
        "mode": config.dataset.mode,
        "min_area": config.dataset.min_area,
        "objects_per_image": config.dataset.objects_per_image,
        "seed": config.seed,
        "taps": list(decoder_taps_of(config)),
        LOGITS: config.extraction.dense_mask_logits,
    }


def _variation_of(augmentation: AugmentationConfig, seed: int) -> dict[str, object] | None:
    """Everything that the pixels of countable variants depend on."""
    if not augmentation.enable or augmentation.variants is None:
        return None
    return {**augmentation.model_dump(mode="json", exclude={"enable", "variants"}), "seed": seed}
