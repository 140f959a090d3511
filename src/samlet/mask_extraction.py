"""Finding a teacher's automatic masks ahead of time: shards of a few images each, for the executors to share out.

They lie in the teacher's store as `automatic_masks/<split>/<image>.json`, each file vouching for itself; what is there
and of the wanted making is kept, anything else is found anew and replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from samlet.config import RunConfig
from samlet.data.streams import name_index
from samlet.distill.kept_masks import FOLDER
from samlet.engine.automatic_masks import Asked, ImageToMask, compute, look, refuse_other_making
from samlet.errors import DataError
from samlet.extraction import ShardName
from samlet.labelling import (
    StoredLabels,
    facts_of_masks,
    generator_of,
    items_of,
    mask_teacher,
    search_settings,
    training_images,
)

IMAGES_PER_SHARD = 8  # seconds each, so that a few make a piece of work worth a lease


def mask_job_of(config: RunConfig, store: Path, shards: Sequence[ShardName] | None = None) -> str:
    """The work on the masks of one store as text, with absolute paths: it travels to other processes and machines."""
    teacher = config.mask_source
    plain = config.model_dump(mode="json", by_alias=True)
    plain["dataset"]["root"] = str(config.dataset.root.absolute())
    checkpoint = None if teacher.checkpoint is None else str(teacher.checkpoint.absolute())
    plain["teachers"] = [{**teacher.model_dump(mode="json"), "checkpoint": checkpoint}]
    thresholds = search_settings(config)  # so that no worker looks for tuned ones of its own
    plain["mask_teacher"] |= {
        "teacher": None,
        "pred_iou_thresh": thresholds.pred_iou_thresh,
        "stability_score_thresh": thresholds.stability_score_thresh,
    }
    return json.dumps({"config": plain, "store": str(store.absolute()), "shards": shards})


class MaskPlan(NamedTuple):
    """What is about to be done."""

    images: int
    missing: int
    unfinished: tuple[ShardName, ...]


class MaskExtractor:
    """Holds a teacher and the images of a job.

    Raises:
        SamletError: something the job names cannot be used.
    """

    def __init__(self, job: str) -> None:
        given = json.loads(job)
        self.config = RunConfig.model_validate_json(json.dumps(given["config"]))
        self.store = Path(given["store"]) / FOLDER
        cuda = torch.cuda.is_available() and self.config.training.device != "cpu"
        sam = mask_teacher(self.config).to("cuda" if cuda else "cpu")
        settings = search_settings(self.config)
        self.facts = facts_of_masks(sam, settings)
        self._find = generator_of(sam, settings)
        self.broken = self.config.dataset.broken
        self.splits = {split: self._items(split) for split in self.config.extraction.splits}
        self.count = math.ceil(max(map(len, self.splits.values())) / IMAGES_PER_SHARD)
        every = [ShardName(split, number) for split in self.splits for number in range(self.count)]
        asked = given["shards"]
        self.shards = tuple(every if asked is None else [ShardName(*shard) for shard in asked])

    def _items(self, split: str) -> dict[str, ImageToMask]:
        train = split == "train"
        data = training_images(self.config) if train else self.config.dataset.build_val(seed=self.config.seed)
        return items_of(data.records, self.store / split)

    @property
    def labels(self) -> StoredLabels:
        """What is found here, for whoever reads it."""
        return StoredLabels(self.store, self.facts)

    @cached_property
    def _by_shard(self) -> dict[ShardName, list[ImageToMask]]:
        found: dict[ShardName, list[ImageToMask]] = {}
        for split, items in self.splits.items():
            for image_id, item in sorted(items.items()):
                found.setdefault(ShardName(split, name_index(image_id) % self.count), []).append(item)
        return found

    def missing(self, shard: ShardName) -> tuple[list[Asked], list[str]]:
        """What is to be found, and what cannot be read, where the policy is to skip.

        Raises:
            DataError: an image cannot be read and the policy is to refuse, or its masks are of another making.
        """
        missing, skipped = list[Asked](), list[str]()
        for item in self._by_shard.get(shard, ()):
            try:
                asked = look(item, self.facts)
            except DataError as error:
                if self.broken == "refuse":
                    raise
                skipped.append(str(error))
                continue
            refuse_other_making(asked, self.facts, self.store)
            if asked.kept is None:
                missing.append(asked)
        return missing, skipped

    def plan(self) -> MaskPlan:
        """Look at what is there."""
        missing = {shard: len(self.missing(shard)[0]) for shard in self.shards}
        images = sum(map(len, self.splits.values()))
        return MaskPlan(images, sum(missing.values()), tuple(shard for shard in self.shards if missing[shard]))

    def is_finished(self, shard: ShardName) -> bool:
        """Whether nothing of a shard is left to do."""
        return not self.missing(shard)[0]

    def extract(
        self, shard: ShardName, still_mine: Callable[[], None], advance: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """Find what is missing, image by image; what could not be used, where the policy is to skip.

        Raises:
            DataError: an image cannot be used and the policy is to refuse.
        """
        missing, skipped = self.missing(shard)
        for asked in missing:
            advance(0)
            try:
                compute(asked, self.facts, self._find, still_mine)
            except DataError as error:
                if self.broken == "refuse":
                    raise
                skipped.append(str(error))
                continue
            advance(1)
        return skipped
