"""The training step: the one module that holds everything that needs gradients.

It alone is wrapped for several processes, and only its `forward` is called: another method of a
wrapped module would skip autocast and the gradients' exchange in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from samlet.distill.answers import is_ambiguous, share_of_image, valid_per_prompt
from samlet.distill.configs import TeamRule, TrustRule
from samlet.distill.corrections import Corrections, corrected, draws
from samlet.distill.layers import attention_places
from samlet.distill.objectives import Objective
from samlet.distill.projections import Projections
from samlet.distill.shares import Shares, agreement, shares_of
from samlet.distill.teacher import Lesson
from samlet.distill.views import View, encode_tapped
from samlet.engine.chunks import chunks_of, computed_again, part_of
from samlet.losses.configs import TaskLossConfig
from samlet.losses.iou import actual_iou, best_fit_iou
from samlet.types import Batch, ImageFeatures, MaskOutput, Terms

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from samlet.models.sam import Sam

NO_CORRECTIONS = Corrections()
MASK_TERMS = ("focal", "dice")  # what trust in a teacher takes from the ground truth; the IoU head learns in full


class Counts(NamedTuple):
    """Images that the terms of one optimizer step are means over: all processes and micro-batches together."""

    images: float  # in the step
    labelled: float  # with ground truth for a prompt or more
    judged: float  # with a prompt or more whose IoU is known: by ground truth, or 0 on the background


def count_images(batches: Sequence[Batch]) -> Counts:
    """Counts of this process's share of a step."""
    labelled = sum(_images_of(batch, batch.labelled) for batch in batches)
    judged = sum(_images_of(batch, judged_prompts(batch)) for batch in batches)
    return Counts(sum(len(batch.image_ids) for batch in batches), labelled, judged)


def judged_prompts(batch: Batch) -> Bool[Tensor, "P"]:
    """The prompts whose masks have a known IoU."""
    return batch.labelled if batch.background is None else batch.labelled | batch.background


class Question(NamedTuple):
    """What all chunks of a micro-batch's prompts have in common; each vector has a number for every prompt."""

    batch: Batch
    features: ImageFeatures
    lessons: tuple[Lesson, ...]
    counts: Counts
    of_image: Float[Tensor, "P"]  # share among the prompts of its image
    of_truth: Float[Tensor, "P"]  # share in the step's mask terms
    of_judged: Float[Tensor, "P"]  # share in the step's IoU term
    draws: tuple[Float[Tensor, "P"], ...]  # where clicks of correction fall, round by round


class Found(NamedTuple):
    """What a chunk adds to the step's sums."""

    raw: dict[str, Tensor]
    seen: dict[str, Tensor]
    per_image: Float[Tensor, "K B"]  # shares of the teachers' image terms, this chunk's and those before it


class TrainStep(nn.Module):
    """Student forward, task loss and distillation loss, over all rounds of correction.

    Every term is the mean over the images of the optimizer step of an image's own mean over its prompts, so no
    term depends on how the images fall into micro-batches and processes. A micro-batch contributes its sum
    divided by the whole step's count. Terms of prompts are the mean over the rounds. Where there are more than
    `prompts_per_chunk` prompts, chunks of them are decoded and compared one after the other, and again in the backward
    pass, so that what belongs to one chunk is all that is held.
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
        prompts_per_chunk: int | None = None,
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
        self.prompts_per_chunk = prompts_per_chunk
        self.projections = Projections() if projections is None else projections
        self.student_taps = tuple({tap for objective in objectives for tap in objective.student_taps})
        self.decoder_taps = tuple({tap for objective in objectives for tap in objective.decoder_taps})

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Everything that is distilled."""
        return self.of_images + self.of_prompts

    def forward(self, batch: Batch, lessons: tuple[Lesson, ...], counts: Counts) -> tuple[Tensor, Terms]:
        """A micro-batch's share of the step's loss, and of each of its terms."""
        question = self._question(batch, lessons, counts)
        chunks = chunks_of(batch, self.prompts_per_chunk)
        per_image = torch.zeros(len(lessons), len(batch.image_ids), device=batch.pixels.device)
        raw: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for rows in chunks:
            compare = partial(self._compare, question, rows, per_image, is_last=rows is chunks[-1])
            found = compare() if len(chunks) == 1 else computed_again(compare, batch.pixels.device)
            _add(raw, found.raw)
            _add(seen, found.seen)
            per_image = found.per_image
        weights = self._weights()
        weighted = {name: value * weights[name] for name, value in raw.items()}
        return torch.stack(list(weighted.values())).sum(), Terms(raw, weighted, seen)

    def _question(self, batch: Batch, lessons: tuple[Lesson, ...], counts: Counts) -> Question:
        return Question(
            batch=batch,
            features=self._features(batch),
            lessons=lessons,
            counts=counts,
            of_image=share_of_image(batch),
            of_truth=share_of_image(batch, batch.labelled) / max(counts.labelled, 1),
            of_judged=share_of_image(batch, judged_prompts(batch)) / max(counts.judged, 1),
            draws=tuple(draws(batch, number) for number in range(self.corrections.rounds)),
        )

    def _compare(self, question: Question, rows: slice, per_image: Float[Tensor, "K B"], *, is_last: bool) -> Found:
        """All rounds of some prompts; the last ones bring the images' terms, for now all prompts had their say."""
        _, features, lessons, counts, *_ = question
        batch, of_image = part_of(question.batch, rows), question.of_image[rows]
        rounds = self.corrections.rounds + 1
        raw: dict[str, Tensor] = {}
        for number in range(rounds):
            output = self.student.decode(features, batch.prompts, multimask_output=None, taps=self.decoder_taps)
            answers = [lesson.answer(batch.prompts) for lesson in lessons] if self._asks_teachers else []
            with torch.autocast(batch.pixels.device.type, enabled=False):
                shares = self._shares(batch, output, lessons, answers, of_image)
                view, per_prompt = View(features, output), of_image / counts.images
                taught = [
                    (lesson.name, View(lesson.features, answer), per_prompt * share)
                    for lesson, answer, share in zip(lessons, answers, shares.per_prompt, strict=False)
                ]
                of_task = question.of_truth[rows] * shares.truth, question.of_judged[rows]
                _add(raw, self._task_terms(output, batch, *of_task), 1 / rounds)
                _add(raw, self._distillation_terms(self.of_prompts, view, taught, batch), 1 / rounds)
                if number == 0:
                    per_image = per_image + shares.per_image
                    seen = {"teachers/agreement": agreement(batch, answers) @ per_prompt} if len(answers) > 1 else {}
                if number == 0 and is_last:
                    shown = [
                        (lesson.name, View(lesson.features, output), share / counts.images)
                        for lesson, share in zip(lessons, per_image, strict=True)
                    ]  # they look at features alone
                    _add(raw, self._distillation_terms(self.of_images, view, shown, batch))
                if number + 1 < rounds:
                    weighed = [(lesson.weight, answer) for lesson, answer in zip(lessons, answers, strict=False)]
                    click = question.draws[number][rows]
                    batch = batch._replace(prompts=corrected(batch, output, weighed, self.corrections, click))
        return Found(raw, seen, per_image)

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
        self,
        batch: Batch,
        student: MaskOutput,
        lessons: Sequence[Lesson],
        answers: Sequence[MaskOutput],
        of_image: Float[Tensor, "P"],
    ) -> Shares:
        weights = [lesson.weight for lesson in lessons]
        return shares_of(weights, batch, student, answers, of_image, team=self.team, trust=self.trust)

    def _task_terms(
        self, output: MaskOutput, batch: Batch, of_truth: Float[Tensor, "P"], of_judged: Float[Tensor, "P"]
    ) -> dict[str, Float[Tensor, ""]]:
        valid = valid_per_prompt(batch, output.low_res_logits.shape[-1])
        values = self.task_loss(
            output.low_res_logits,
            output.iou_predictions,
            batch.masks,
            valid,
            is_ambiguous(batch),
            actual=worth_of_masks(batch, output.low_res_logits, valid),
        )
        return {
            f"task/{name}": value.float() @ (of_truth if name in MASK_TERMS else of_judged)
            for name, value in values.items()
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


def worth_of_masks(
    batch: Batch, low_res_logits: Float[Tensor, "P 4 h w"], valid: Float[Tensor, "P h w"] | None
) -> Float[Tensor, "P 4"] | None:
    """What the IoU head shall say of masks in mode everything: the IoU with the object of the image that fits best.

    A box has one object, and its masks are worth their IoU with it. None: so has every prompt.
    """
    if batch.background is None or batch.objects is None:
        return None
    logits = low_res_logits.float()
    shared = batch.prompts.image_index[:, None] == batch.objects.image
    best = best_fit_iou(logits, batch.objects.masks.float(), shared, valid)
    anything = is_ambiguous(batch) | batch.background
    return torch.where(anything[:, None], best, actual_iou(logits, batch.masks, valid))


def _add(sums: dict[str, Tensor], found: Mapping[str, Tensor], factor: float = 1.0) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + factor * value if name in sums else factor * value


def _images_of(batch: Batch, counted: Bool[Tensor, "P"]) -> int:
    return len(set(batch.prompts.image_index[counted].tolist()))
