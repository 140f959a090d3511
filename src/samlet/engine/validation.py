"""Validation inside a run: the student measured by all processes together, and drawn beside its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samlet.engine.evaluation import evaluate_sam, headline, join_scores
from samlet.engine.processes import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from samlet.data import ValidationSet
    from samlet.models import Sam


def validate(student: Sam, val_set: ValidationSet, accelerator: Accelerator, max_images: int | None) -> dict[str, float]:
    """mIoU and mDice of centre point and box at the original resolution; each process takes every n-th image.

    `mean_miou` is the mean of point_miou and box_miou.
    """
    count = min(len(val_set), max_images or len(val_set))
    own = range(accelerator.process_index, count, accelerator.num_processes)
    scores = join_scores(gathered([evaluate_sam(student, val_set, indices=own)], accelerator))
    metrics = headline(scores)
    return {**metrics, "mean_miou": (metrics["point_miou"] + metrics["box_miou"]) / 2}


def draw_overlays(*args: object) -> None: ...
