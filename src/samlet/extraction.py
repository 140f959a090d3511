"""Computing what a teacher sees in the images, ahead of time: a pure function over shards of the image list.

An `Extractor` lives in one process and holds the teacher; which shards it takes, and who else is at work on the same
store, is the executors' business. Reading images, the network, and writing features overlap.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from samlet.artefacts import sha256_of
from samlet.config import RunConfig
from samlet.data.dataset import Picture, Prompted, SegmentationDataset
from samlet.data.sampler import SampleKey
from samlet.distill.frames import prompts_at
from samlet.distill.kept_masks import MaskFacts
from samlet.distill.store import (
    Shard,
    bytes_per_image,
    open_store,
    shard_of,
)
from samlet.distill.stored import EMBEDDING, answers_of
from samlet.distill.teacher import LiveTeacher
from samlet.engine.device import memory_format, place
from samlet.engine.memory import readable
from samlet.errors import ConfigError, DataError, SamletError
from samlet.labelling import StoredLabels, stored_masks, training_images, with_masks
from samlet.models import load_sam
from samlet.models.decoder_file import save_decoder
from samlet.stores import decoder_taps_of, facts_of, identity_of
from samlet.types import ImageFeatures

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.distill.configs import TeacherConfig

T = TypeVar("T")
R = TypeVar("R")
IMAGES_TO_COUNT_ON = 32  # objects of an image, for the plan
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ShardName(NamedTuple):
    """A piece of the work."""

    split: str
    number: int


class Wanted(NamedTuple):
    """One image-variant that a store should hold."""

    image_id: str
    variant: int
    key: SampleKey  # where its pixels come from


class Seen(NamedTuple):
    """An image-variant that was read and is to be looked at."""

    item: Wanted
    image_sha256: str
    picture: Picture
    prompted: Prompted | None  # where the decoder's answers are stored, too


def job_of(
    config: RunConfig,
    teacher: TeacherConfig,
    store: Path,
    shards: Sequence[ShardName] | None = None,
    labels: StoredLabels | None = None,
) -> str:
    """The work on one teacher's store as text, with absolute paths: it travels to other processes and machines.

    `shards` are those that a `Plan` found unfinished; None: all are looked at. `labels` are the automatic masks that
    training learns, on whose objects crops and prompts depend.
    """
    plain = config.model_dump(mode="json", by_alias=True)
    plain["dataset"]["root"] = str(config.dataset.root.absolute())
    plain["teachers"] = [{**teacher.model_dump(mode="json"), "checkpoint": str(_weights(teacher).absolute())}]
    masks = None if labels is None else {"root": str(labels.root.absolute()), "facts": labels.facts}
    return json.dumps({"config": plain, "store": str(store.absolute()), "shards": shards, "labels": masks})


def _weights(teacher: TeacherConfig) -> Path:
    if teacher.checkpoint is None:
        raise ConfigError(f"teachers: '{teacher.name}' has no checkpoint, so there is nothing to extract from")
    return teacher.checkpoint


class Extractor:
    """Holds a teacher and the images of a job.

    Raises:
        SamletError: the store is of something else, or something the job names cannot be used.
    """

    def __init__(self, job: str) -> None:
        given = json.loads(job)
        self.config = RunConfig.model_validate_json(json.dumps(given["config"]))
        self.store = Path(given["store"])
        self.settings = self.config.extraction
        (teacher,) = self.config.teachers
        training = self.config.training
        cuda = torch.cuda.is_available() and training.device != "cpu"
        self.device = torch.device("cuda" if cuda else "cpu")
        masks = given["labels"]
        labels = None if masks is None else StoredLabels(Path(masks["root"]), MaskFacts(*masks["facts"]))
        self.splits: dict[str, SegmentationDataset] = {
            split: pictures_of(self.config, split, labels) for split in self.settings.splits
        }
        sam = load_sam(_weights(teacher), image_size=teacher.image_size or self.config.model.image_size)
        count = max(len(self.wanted(split)) for split in self.splits)
        identity = identity_of(self.config, teacher, facts_of(sam), images=count)
        self.identity = open_store(self.store, identity, lambda path: save_decoder(sam, path))
        place(sam, self.device, training)
        if training.compile:
            sam.image_encoder.compile()
        precision = None if teacher.precision is None else PRECISIONS[teacher.precision]
        answers = decoder_taps_of(self.config) if self.identity.outputs else ()
        self.teacher = LiveTeacher(teacher.name, sam, self.identity.taps, answers, precision=precision)
        self.batch_size = self.settings.batch_size if cuda else 1  # one by one, a CPU's result depends on no neighbour
        every = [ShardName(split, number) for split in self.splits for number in range(self.identity.shards)]
        asked = given["shards"]
        self.shards = tuple(every if asked is None else [ShardName(*shard) for shard in asked])

    def wanted(self, split: str) -> tuple[Wanted, ...]:
        """Every image-variant of a split, sorted."""
        data = self.splits[split]
        first = {record.image_id: index for index, record in reversed(list(enumerate(data.records)))}
        variants = range(data.augmentation.variants or 1)
        return tuple(Wanted(name, v, SampleKey(v, index)) for name, index in sorted(first.items()) for v in variants)

    @cached_property
    def _by_shard(self) -> dict[ShardName, list[Wanted]]:
        found: dict[ShardName, list[Wanted]] = {}
        for split in self.splits:
            for item in self.wanted(split):
                found.setdefault(ShardName(split, shard_of(item.image_id, self.identity)), []).append(item)
        return found

    def missing(self, shard: ShardName) -> list[Wanted]:
        """What is not in the store, or was computed from an image, mask or crop that has changed since."""
        entries = Shard(self.store, shard.split, shard.number, self.identity).entries
        data = self.splits[shard.split]

        def is_there(item: Wanted) -> bool:
            entry = entries.get((item.image_id, item.variant))
            if entry is None or entry.image_sha256 != sha256_of(data.records[item.key.index].image_path):
                return False
            return entry.variation == data.variation(item.key)

        return [item for item in self._by_shard.get(shard, ()) if not is_there(item)]

    def is_written(self, shard: ShardName) -> bool:
        """Whether a shard's manifest is there, in the form that is asked for."""
        return Shard(self.store, shard.split, shard.number, self.identity).is_finished(pack=self.settings.pack)

    def is_finished(self, shard: ShardName) -> bool:
        """Whether nothing of a shard is left to do."""
        return self.is_written(shard) and not self.missing(shard)

    def extract(
        self, shard: ShardName, still_mine: Callable[[], None], advance: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """Compute what is missing and commit it, image by image; what could not be used, where the policy is to skip.

        `still_mine` is called before every commit and raises where the shard has gone to somebody else.

        Raises:
            DataError: a file cannot be used and the policy is to refuse.
        """
        place, data = Shard(self.store, shard.split, shard.number, self.identity), self.splits[shard.split]
        missing, skipped = self.missing(shard), list[str]()

        def read(item: Wanted) -> Seen | None:
            try:
                image_sha256 = sha256_of(data.records[item.key.index].image_path)
                if self.identity.outputs is None:
                    return Seen(item, image_sha256, data.picture(item.key), None)
                prompted = data.prompted(item.key)
                return Seen(item, image_sha256, prompted.picture, prompted)
            except DataError as error:
                if data.broken == "refuse":
                    raise
                skipped.append(str(error))
                return None

        def write(group: Sequence[Seen], features: Sequence[dict[str, Tensor]]) -> None:
            for seen, values in zip(group, features, strict=True):
                arrays = {name: value.float().cpu().numpy() for name, value in values.items()}
                still_mine()
                place.add(seen.item.image_id, seen.item.variant, seen.picture.variation, seen.image_sha256, arrays)
                advance(1)

        with ThreadPoolExecutor(self.settings.workers) as readers, ThreadPoolExecutor(1) as writer:
            writing: deque[Future[None]] = deque()
            ready = _ahead(readers, read, missing, self.settings.workers + self.batch_size)
            for group in _groups(ready, self.batch_size):
                advance(0)  # hear of a stop before the network runs, not images later from the writer
                writing.append(writer.submit(write, group, self.look(group)))
                if len(writing) > 2:  # let no more than that wait in memory
                    writing.popleft().result()
            for last in writing:
                last.result()
        still_mine()
        place.finish(pack=self.settings.pack)
        return skipped

    def shapes_of_answers(self) -> dict[str, tuple[int, ...]]:
        """Of the decoder's answers to the first images, in the mean; empty where none are stored."""
        if self.identity.outputs is None:
            return {}
        (split, data), *_ = self.splits.items()
        prompted = [data.prompted(item.key) for item in self.wanted(split)[:IMAGES_TO_COUNT_ON]]
        count = math.ceil(sum(max(one.objects) + 1 for one in prompted) / len(prompted))
        grid = self.teacher.image_size // 16
        embedding = torch.zeros(256, grid, grid, device=self.device)
        rows = self._answers(embedding, prompted[0])
        return {name: (count, *value.shape[1:]) for name, value in rows.items()}

    def any_pixels(self) -> Float[Tensor, "3 S S"]:
        """An image of the job.

        Raises:
            DataError: none can be read.
        """
        reasons = []
        for split, data in self.splits.items():
            for item in self.wanted(split):
                try:
                    return data.picture(item.key).pixels
                except DataError as error:
                    if data.broken == "refuse":
                        raise
                    reasons.append(str(error))
        raise DataError(f"no image can be read; the first: {reasons[0]}")

    def look(self, group: Sequence[Seen]) -> list[dict[str, Tensor]]:
        """Everything that the store keeps of some images, as a run's teacher would see and answer."""
        features = self.encode(torch.stack([seen.picture.pixels for seen in group]))
        found = []
        for row, seen in enumerate(group):
            own = {name: value[row] for name, value in features.items()}
            found.append(own if seen.prompted is None else own | self._answers(own[EMBEDDING], seen.prompted))
        return found

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> dict[str, Tensor]:
        """Embedding and taps of some images."""
        placed = pixels.to(self.device, memory_format=memory_format(self.config.training), non_blocking=True)
        with self._autocast():
            features = self.teacher.encode_pixels(placed)
        return {EMBEDDING: features.embedding, **features.taps}

    def _answers(self, embedding: Float[Tensor, "256 h w"], prompted: Prompted) -> dict[str, Tensor]:
        moved = {name: value.to(self.device) for name, value in prompted.prompts._asdict().items() if value is not None}
        prompts = prompted.prompts._replace(**moved)
        own = prompts_at(prompts, self.identity.image_size, self.teacher.image_size)
        with torch.no_grad(), self._autocast():
            output = self.teacher.decode(ImageFeatures(embedding[None], {}), own)
        return answers_of(output, prompts, prompted.objects, logits=self.settings.dense_mask_logits)

    def _autocast(self) -> torch.autocast:
        kind = PRECISIONS[self.config.training.precision]
        return torch.autocast(self.device.type, dtype=kind, enabled=kind != torch.float32)


def pictures_of(config: RunConfig, split: str, labels: StoredLabels | None = None) -> SegmentationDataset:
    """The images of a split as the teacher sees them: in all variants, or without the colours of a run without them.

    With `labels`, the training images have the objects that the configuration's method makes of these masks.

    Raises:
        DataError: there are none, or some are refused.
    """
    plain = config.augmentation.model_copy(update={"enable": False})
    kept = config.augmentation if config.augmentation.variants is not None else plain
    data = training_images(config.model_copy(update={"augmentation": kept}))
    if split == "train":
        return data if labels is None else with_masks(config, data, stored_masks(labels, data))
    return data.of_records(config.dataset.build_val(seed=config.seed).records).varied(data.prompts, plain.build())


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R | None], items: Sequence[T], count: int) -> Iterator[R]:
    """`work` of each item in order, begun for up to `count` items before they are asked for; None is left out."""
    waiting, rest = deque[Future[R | None]](), iter(items)
    waiting.extend(pool.submit(work, item) for item in islice(rest, count))
    while waiting:
        found = waiting.popleft().result()
        waiting.extend(pool.submit(work, item) for item in islice(rest, 1))
        if found is not None:
            yield found


def _groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


class Plan(NamedTuple):
    """What an extraction is about to do."""

    images: int  # image-variants that the store should hold
    missing: int  # of them
    unfinished: tuple[ShardName, ...]
    bytes_per_image: int
    bytes_free: int  # where the store lies
    seconds_per_image: float  # of the network, measured on one

    @property
    def bytes_missing(self) -> int:
        """What will be written."""
        return self.missing * self.bytes_per_image

    def refuse_full_disk(self, store: Path) -> None:
        """Stop before a disk is filled.

        Raises:
            SamletError: what is missing does not fit.
        """
        if self.bytes_missing > self.bytes_free:
            raise SamletError(
                f"{store}: needs {readable(self.bytes_missing)} more and {readable(self.bytes_free)} are free; make "
                "room, name another distillation.precomputed_root, or take extraction.dtype int8"
            )


def plan_of(extractor: Extractor) -> Plan:
    """Look at the store and the disk; where something is missing, time the network on the first image that can be read.

    Raises:
        DataError: no image can be read.
    """
    missing = {shard: len(extractor.missing(shard)) for shard in extractor.shards}
    unfinished = tuple(shard for shard in extractor.shards if missing[shard] or not extractor.is_written(shard))
    size, seconds = _cost_of_an_image(extractor) if any(missing.values()) else (0, 0.0)
    images = sum(len(extractor.wanted(split)) for split in extractor.splits)
    return Plan(images, sum(missing.values()), unfinished, size, shutil.disk_usage(extractor.store).free, seconds)


def _cost_of_an_image(extractor: Extractor) -> tuple[int, float]:
    """Bytes on disk, and seconds of the network."""
    pixels = extractor.any_pixels()[None]
    extractor.encode(pixels)  # the first time is not like the others
    start = time.perf_counter()
    features = {name: value.float().cpu() for name, value in extractor.encode(pixels).items()}
    seconds = time.perf_counter() - start
    shapes = {name: tuple(value.shape[1:]) for name, value in features.items()} | extractor.shapes_of_answers()
    return bytes_per_image(extractor.identity, shapes), seconds
