"""Validation inside a run: the student measured by all processes together, and drawn beside its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlet.distill.teacher import LiveTeacher
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
    from samlet.models.sam import Sam

MOST_OBJECTS = 12  # drawn in one image, the largest ones


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
