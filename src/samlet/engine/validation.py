"""Validation inside a run: the student measured by all processes together, and drawn beside its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samlet.distill.teacher import LiveTeacher
from samlet.engine.automatic_evaluation import MAX_MASKS, Overlaps, summarize_masks
from samlet.engine.calibration import Guesses, join_guesses, summarize_calibration
from samlet.engine.curves import RETENTION
from samlet.engine.evaluation import (
    Click,
    answer,
    encode_image,
    evaluate_sam,
    headline,
    join_scores,
    unchanged_in_eval_mode,
)
from samlet.engine.everything import measure_image, parts_of
from samlet.engine.overlays import TRUTH, DrawnPrompts, save_overlay
from samlet.engine.processes import gathered
from samlet.models.amg import AmgSettings, AutomaticMaskGenerator
from samlet.types import POSITIVE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from jaxtyping import Bool

    from samlet.data.dataset import EvalImage, ValidationSet
    from samlet.distill.teacher import TeacherTeam
    from samlet.engine.checkpoint import TrainerState
    from samlet.engine.configs import EverythingValidationConfig, Metric, ValidationConfig
    from samlet.models.sam import Sam

EVERYTHING = "everything_"  # metrics of automatic masks
MOST_OBJECTS = 12  # drawn in one image, the largest ones


class ForgettingGuard(NamedTuple):
    """A data set of what the student should not forget, and how much of it a checkpoint may lose to be the best."""

    images: ValidationSet
    max_images: int | None
    metric: Metric
    max_drop: float | None  # 0 to 1; None: watch only

    @classmethod
    def of(cls, config: ValidationConfig) -> ForgettingGuard | None:
        """The guard that a configuration asks for.

        Raises:
            DataError: its data set cannot be used.
        """
        kept = config.retention
        metric: Metric = "mean_miou" if config.metric == "everything_ar" else config.metric
        return None if kept is None else cls(kept.build(), kept.max_images, metric, config.max_retention_drop)

    def measure(self, student: Sam, accelerator: Accelerator) -> dict[str, float]:
        """Metrics on the retention set, as `retention/point_miou` and so on."""
        metrics = validate(student, self.images, accelerator, self.max_images)
        return {f"{RETENTION}{name}": value for name, value in metrics.items()}

    def drop(self, metrics: Mapping[str, float], state: TrainerState) -> float:
        """By how much the metric fell since before the first step, which is noted in the state when it is measured."""
        value = metrics[f"{RETENTION}{self.metric}"]
        if state.retention_reference is None:
            state.retention_reference = value
        return state.retention_reference - value

    def allows(self, drop: float) -> bool:
        """Whether a checkpoint that lost so much may be the best."""
        return self.max_drop is None or drop <= self.max_drop

    def describe(self, metrics: Mapping[str, float], drop: float) -> str:
        """Where retention stands and how far it has moved, for the line of a validation."""
        value = metrics[f"{RETENTION}{self.metric}"]
        told = f", retention {self.metric.removesuffix('_miou')} mIoU {value:.4f} ({0.0 - drop:+.4f})"
        return told if self.allows(drop) else f"{told}, more than validation.max_retention_drop lets it lose"


def validate(
    student: Sam, val_set: ValidationSet, accelerator: Accelerator, max_images: int | None = None
) -> dict[str, float]:
    """MIoU and mDice of centre point and box at the original resolution; each process takes every n-th image.

    `mean_miou` is the mean of point_miou and box_miou.
    """
    count = min(len(val_set), max_images or len(val_set))
    own = range(accelerator.process_index, count, accelerator.num_processes)
    scores = join_scores(gathered([evaluate_sam(student, val_set, indices=own)], accelerator))
    metrics = headline(scores)
    return {**metrics, "mean_miou": (metrics["point_miou"] + metrics["box_miou"]) / 2}


def validate_everything(
    student: Sam, val_set: ValidationSet, accelerator: Accelerator, config: EverythingValidationConfig
) -> dict[str, float]:
    """AR@1000 and AP of automatic masks, and the calibration error of their scores; each process every n-th image.

    No mask is left out for its score, so that thresholds which suit one student more than another play no part.

    Raises:
        DataError: there is no object on these images.
    """
    count = min(len(val_set), config.max_images or len(val_set))
    own = range(accelerator.process_index, count, accelerator.num_processes)
    found = zip(own, search_unfiltered(student, val_set, own, config.points_per_side), strict=True)
    parts = [part for _, part in sorted(gathered(list(found), accelerator), key=itemgetter(0))]
    scores = summarize_masks([common for common, _ in parts])
    calibration = summarize_calibration(join_guesses([guesses for _, guesses in parts]))
    named = {"ar": scores["ar"][str(MAX_MASKS[-1])], "ap": scores["ap"], "ece": calibration["ece"]}
    return {f"{EVERYTHING}{name}": float(value) for name, value in named.items()}


def search_unfiltered(
    student: Sam, val_set: ValidationSet, indices: Iterable[int], points_per_side: int
) -> list[tuple[Overlaps, Guesses]]:
    """What the automatic masks of some images have in common with their objects, and what is said of a few clicks."""
    settings = AmgSettings(points_per_side=points_per_side, pred_iou_thresh=0.0, stability_score_thresh=0.0, fast=False)
    generator = AutomaticMaskGenerator.of(student, settings)
    with unchanged_in_eval_mode(student):
        return [parts_of(measure_image(generator, student, val_set.item(index))) for index in indices]


def describe_everything(metrics: Mapping[str, float]) -> str:
    """How automatic masks do, for the line of a validation; nothing where they are not measured."""
    if f"{EVERYTHING}ar" not in metrics:
        return ""
    return f", everything AR {metrics[f'{EVERYTHING}ar']:.4f}, calibration error {metrics[f'{EVERYTHING}ece']:.4f}"


def draw_overlays(folder: Path, val_set: ValidationSet, student: Sam, team: TeacherTeam | None, count: int) -> None:
    """Draw the first `count` validation images: image, centre points, ground truth, first teacher, student."""
    live = [teacher for teacher in (team.teachers if team else ()) if isinstance(teacher, LiveTeacher)]
    models = {**{teacher.name: teacher.sam for teacher in live[:1]}, "student": student}
    for index in range(min(count, len(val_set))):
        item = val_set.item(index)
        if not len(item.masks):
            continue
        shown = np.sort(np.argsort(-item.masks.sum(axis=(1, 2)), kind="stable")[:MOST_OBJECTS])
        panels = {TRUTH: item.masks[shown], **{name: _clicked(sam, item, shown) for name, sam in models.items()}}
        path = folder / f"{item.image_id.replace('/', '_')}.png"
        save_overlay(path, item.image, DrawnPrompts(points=item.points[shown]), panels)


def _clicked(sam: Sam, item: EvalImage, shown: np.ndarray) -> Bool[np.ndarray, "O H W"]:
    """The model's masks for one click on each shown object."""
    clicks = [[Click(int(x), int(y), POSITIVE)] for x, y in item.points[shown]]
    with unchanged_in_eval_mode(sam):
        return answer(encode_image(sam, item.image), clicks=clicks, multimask=True).masks.cpu().numpy()
