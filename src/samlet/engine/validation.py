"""Validation inside a run: the student measured by all processes together, and drawn beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samlet.distill.teacher import LiveTeacher
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
from samlet.engine.overlays import TRUTH, DrawnPrompts, save_overlay
from samlet.engine.processes import gathered
from samlet.types import POSITIVE

if TYPE_CHECKING:
    from accelerate import Accelerator
    from jaxtyping import Bool

    from samlet.data.dataset import EvalImage, ValidationSet
    from samlet.distill.teacher import TeacherTeam
    from samlet.engine.checkpoint import TrainerState
    from samlet.engine.configs import Metric, ValidationConfig
    from samlet.models.sam import Sam

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
        return None if kept is None else cls(kept.build(), kept.max_images, config.metric, config.max_retention_drop)

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
