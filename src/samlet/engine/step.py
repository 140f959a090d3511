"""The training step: the one module that holds everything that needs gradients.

It alone is wrapped for several processes, and only its `forward` is called: another method of a
wrapped module would skip autocast and the gradients' exchange in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from samlet.distill.answers import is_ambiguous, valid_per_prompt
from samlet.distill.configs import TeamRule, TrustRule
from samlet.distill.corrections import Corrections, corrected
from samlet.distill.layers import attention_places
from samlet.distill.objectives import Objective
from samlet.distill.projections import Projections
from samlet.distill.shares import Shares, agreement, shares_of
from samlet.distill.teacher import Lesson
from samlet.distill.views import View, encode_tapped
from samlet.losses.configs import TaskLossConfig
from samlet.types import Batch, ImageFeatures, MaskOutput, Terms

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam

NO_CORRECTIONS = Corrections()
MASK_TERMS = ("focal", "dice")  # what trust in a teacher takes from the ground truth; the IoU head learns in full


class Counts(NamedTuple):
    """Images that the terms of one optimizer step are means over: all processes and micro-batches together."""

    images: float  # in the step
    labelled: float  # with ground truth for a prompt or more


def count_images(batches: Sequence[Batch]) -> Counts:
    """Counts of this process's share of a step."""
    labelled = sum(len(set(batch.prompts.image_index[batch.labelled].tolist())) for batch in batches)
    return Counts(sum(len(batch.image_ids) for batch in batches), labelled)


class TrainStep(nn.Module):
    """Student forward, task loss and distillation loss, over all rounds of correction.

    Every term is the mean over the images of the optimizer step of an image's own mean over its prompts, so no
    term depends on how the images fall into micro-batches and processes. A micro-batch contributes its sum
    divided by the whole step's count. Terms of prompts are the mean over the rounds.
    """

    def __init__(
        self,
        student: Sam,
        task: TaskLossConfig,
        objectives: Sequence[Objective] = (),
        lambda_coef: float = 1.0,
        *,
        team: TeamRule = "static",
        trust: TrustRule = "constant",
        corrections: Corrections = NO_CORRECTIONS,
        projections: Projections | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.task_loss = task.build()
        self.task_weights = {"focal": task.focal, "dice": task.dice, "iou": task.iou}
        self.of_images = tuple(objective for objective in objectives if objective.per == "image")
        self.of_prompts = tuple(objective for objective in objectives if objective.per == "prompt")
        self.lambda_coef = lambda_coef
        self.team, self.trust = team, trust
        self.corrections = corrections
        self.projections = Projections() if projections is None else projections
        self.student_taps = tuple({tap for objective in objectives for tap in objective.student_taps})
        self.decoder_taps = tuple({tap for objective in objectives for tap in objective.decoder_taps})

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Everything that is distilled."""
        return self.of_images + self.of_prompts

    def forward(self, batch: Batch, lessons: tuple[Lesson, ...], counts: Counts) -> tuple[Tensor, Terms]:
        """A micro-batch's share of the step's loss, and of each of its terms."""
        features = self._features(batch)
        rounds = self.corrections.rounds + 1
        raw: dict[str, Tensor] = {}
        for number in range(rounds):
            output = self.student.decode(features, batch.prompts, multimask_output=None, taps=self.decoder_taps)
            answers = [lesson.answer(batch.prompts) for lesson in lessons] if self._asks_teachers else []
            with torch.autocast(batch.pixels.device.type, enabled=False):
                shares = self._shares(batch, output, lessons, answers)
                view, per_prompt = View(features, output), _share_of_image(batch) / counts.images
                taught = [
                    (lesson.name, View(lesson.features, answer), per_prompt * share)
                    for lesson, answer, share in zip(lessons, answers, shares.per_prompt, strict=False)
                ]
                _add(raw, self._task_terms(output, batch, counts, shares), 1 / rounds)
                _add(raw, self._distillation_terms(self.of_prompts, view, taught, batch), 1 / rounds)
                if number == 0:
                    shown = [
                        (
                            lesson.name,
                            View(lesson.features, output),
                            share / counts.images,
                        )  # they look at features alone
                        for lesson, share in zip(lessons, shares.per_image, strict=True)
                    ]
                    _add(raw, self._distillation_terms(self.of_images, view, shown, batch))
                    seen = {"teachers/agreement": agreement(batch, answers) @ per_prompt} if len(answers) > 1 else {}
                if number + 1 < rounds:
                    weighed = [(lesson.weight, answer) for lesson, answer in zip(lessons, answers, strict=False)]
                    batch = batch._replace(prompts=corrected(batch, output, weighed, self.corrections, number))
        weights = self._weights()
        weighted = {name: value * weights[name] for name, value in raw.items()}
        return torch.stack(list(weighted.values())).sum(), Terms(raw, weighted, seen)

    def _features(self, batch: Batch) -> ImageFeatures:
        """What the image encoder makes of a batch, or made of it before the run."""
        if batch.embedding is not None:
            return ImageFeatures(batch.embedding, {})
        return encode_tapped(self.student, batch.pixels, self.student_taps, attention_places(batch, self.student_taps))

    @property
    def _asks_teachers(self) -> bool:
        """Whether prompts need a teacher's answer, or its features alone will do."""
        judged = self.team != "static" or self.trust != "constant"
        return bool(self.of_prompts) or (bool(self.of_images) and (judged or self.corrections.rounds > 0))

    def _weights(self) -> dict[str, float]:
        distilled = {f"distill/{objective.name}": self.lambda_coef * objective.weight for objective in self.objectives}
        return {f"task/{name}": weight for name, weight in self.task_weights.items()} | distilled

    def _shares(
        self, batch: Batch, student: MaskOutput, lessons: Sequence[Lesson], answers: Sequence[MaskOutput]
    ) -> Shares:
        weights = [lesson.weight for lesson in lessons]
        return shares_of(weights, batch, student, answers, team=self.team, trust=self.trust)

    def _task_terms(
        self, output: MaskOutput, batch: Batch, counts: Counts, shares: Shares
    ) -> dict[str, Float[Tensor, ""]]:
        valid = valid_per_prompt(batch, output.low_res_logits.shape[-1])
        values = self.task_loss(output.low_res_logits, output.iou_predictions, batch.masks, valid, is_ambiguous(batch))
        share = _share_of_image(batch, batch.labelled) / max(counts.labelled, 1)
        trusted = share * shares.truth
        return {
            f"task/{name}": value.float() @ (trusted if name in MASK_TERMS else share) for name, value in values.items()
        }

    def _distillation_terms(
        self, objectives: Sequence[Objective], student: View, lessons: Sequence[tuple[str, View, Tensor]], batch: Batch
    ) -> dict[str, Float[Tensor, ""]]:
        """Each objective's sum over lessons: a teacher's name, its view, and the factor of each of its items."""
        terms = {}
        for objective in objectives:
            value = torch.zeros((), device=batch.pixels.device)
            for name, teacher, factors in lessons:
                seen, target = self.projections(objective, name, student, teacher, batch)
                value = value + objective.compare(seen, target, batch).float() @ factors
            terms[f"distill/{objective.name}"] = value
        return terms


def _add(sums: dict[str, Tensor], found: Mapping[str, Tensor], factor: float = 1.0) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + factor * value if name in sums else factor * value


def _share_of_image(batch: Batch, counted: Tensor | None = None) -> Float[Tensor, "P"]:
    """1 / (number of counted prompts of the same image) for each counted prompt, 0 for the others; None: all count."""
    counted = torch.ones_like(batch.labelled) if counted is None else counted
    same = batch.prompts.image_index[:, None] == batch.prompts.image_index[None, :]
    number = (same & counted[None, :]).sum(dim=1).clamp_min(1)
    return counted.float() / number
