"""The training step: the one module that holds everything that needs gradients.

It alone is wrapped for several processes, and only its `forward` is called: another method of a
wrapped module would skip autocast and the gradients' exchange in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from samlet.distill.objectives import Objective, is_ambiguous
from samlet.distill.teacher import Lesson
from samlet.distill.views import View, encode_projected
from samlet.frames import valid_cells
from samlet.losses.configs import TaskLossConfig
from samlet.types import Batch, Terms

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam


class Counts(NamedTuple):
    """Images that the terms of one optimizer step are means over: all processes and micro-batches together."""

    images: float  # in the step
    labelled: float  # with ground truth for a prompt or more


def count_images(batches: Sequence[Batch]) -> Counts:
    """Counts of this process's share of a step."""
    labelled = sum(len(set(batch.prompts.image_index[batch.labelled].tolist())) for batch in batches)
    return Counts(sum(len(batch.image_ids) for batch in batches), labelled)


class TrainStep(nn.Module):
    """Student forward, task loss and distillation loss.

    Every term is the mean over the images of the optimizer step of an image's own mean over its prompts, so no
    term depends on how the images fall into micro-batches and processes. A micro-batch contributes its sum
    divided by the whole step's count.
    """

    def __init__(
        self, student: Sam, task: TaskLossConfig, objectives: Sequence[Objective] = (), lambda_coef: float = 1.0
    ) -> None:
        super().__init__()
        self.student = student
        self.task_loss = task.build()
        self.task_weights = {"focal": task.focal, "dice": task.dice, "iou": task.iou}
        self.objectives = tuple(objectives)
        self.lambda_coef = lambda_coef
        self.student_taps = tuple({tap for objective in objectives for tap in objective.student_taps})
        self.decoder_taps = tuple({tap for objective in objectives for tap in objective.decoder_taps})

    def forward(self, batch: Batch, lessons: tuple[Lesson, ...], counts: Counts) -> tuple[Tensor, Terms]:
        """A micro-batch's share of the step's loss, and of each of its terms."""
        features = encode_projected(self.student, batch.pixels, self.student_taps)
        output = self.student.decode(features, batch.prompts, multimask_output=None, taps=self.decoder_taps)
        view = View(features, output)
        with torch.autocast(batch.pixels.device.type, enabled=False):
            terms = self._task_terms(view, batch, counts)
            terms.update(self._distillation_terms(view, lessons, batch, counts))
            raw = {name: value for name, (value, _) in terms.items()}
            weighted = {name: value * weight for name, (value, weight) in terms.items()}
            loss = torch.stack(list(weighted.values())).sum()
        return loss, Terms(raw, weighted)

    def _task_terms(self, view: View, batch: Batch, counts: Counts) -> dict[str, tuple[Tensor, float]]:
        logits, index = view.output.low_res_logits, batch.prompts.image_index
        valid = valid_cells(batch.input_sizes, logits.shape[-1], batch.pixels.shape[-1])[index]
        values = self.task_loss(logits, view.output.iou_predictions, batch.masks, valid, is_ambiguous(batch))
        share = _share_of_image(batch, batch.labelled) / max(counts.labelled, 1)
        return {f"task/{name}": (value.float() @ share, self.task_weights[name]) for name, value in values.items()}

    def _distillation_terms(
        self, student: View, lessons: tuple[Lesson, ...], batch: Batch, counts: Counts
    ) -> dict[str, tuple[Tensor, float]]:
        terms = {}
        per_prompt = _share_of_image(batch, torch.ones_like(batch.labelled)) / counts.images
        for objective in self.objectives:
            value = torch.zeros((), device=batch.pixels.device)
            for lesson in lessons:
                items = objective.compare(student, lesson.view, batch).float()
                total = items @ per_prompt if objective.per == "prompt" else items.sum() / counts.images
                value = value + lesson.weight * total
            terms[f"distill/{objective.name}"] = (value, self.lambda_coef * objective.weight)
        return terms


def _share_of_image(batch: Batch, counted: Tensor) -> Float[Tensor, "P"]:
    """1 / (number of counted prompts of the same image) for each counted prompt, 0 for the others."""
    same = batch.prompts.image_index[:, None] == batch.prompts.image_index[None, :]
    number = (same & counted[None, :]).sum(dim=1).clamp_min(1)
    return counted.float() / number
