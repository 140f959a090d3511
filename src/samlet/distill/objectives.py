"""The distillation objectives: which part of two views each one compares, and what it needs tapped.

An objective gives one value per image or one per prompt; how values become a loss is the training step's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from samlet.distill.answers import answering_masks, valid_per_prompt
from samlet.distill.configs import DistillationConfig
from samlet.distill.views import View
from samlet.frames import valid_cells
from samlet.losses.configs import (
    DecoderMaskTokenConfig,
    DenseMaskLogitsConfig,
    EncoderPatchConfig,
    PromptEmbedConfig,
)
from samlet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Compare = Callable[[View, View, Batch], "Tensor"]


class Objective(NamedTuple):
    """One distillation term, ready to compare a student's view with a teacher's."""

    name: str
    weight: float
    per: Literal["image", "prompt"]
    compare: Compare
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    decoder_taps: tuple[str, ...] = ()


def build_objectives(config: DistillationConfig) -> tuple[Objective, ...]:
    """The enabled objectives with a positive weight."""
    builders: dict[type, Callable[..., Objective]] = {
        EncoderPatchConfig: _encoder_patch,
        PromptEmbedConfig: _prompt_embed,
        DecoderMaskTokenConfig: _decoder_mask_token,
        DenseMaskLogitsConfig: _dense_mask_logits,
    }
    return tuple(builders[type(term)](name, term) for name, term in config.terms() if term.weight > 0)


def _encoder_patch(name: str, config: EncoderPatchConfig) -> Objective:
    loss = config.build()

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "B"]:
        of_student, of_teacher = _tapped(student, config.student_tap), _tapped(teacher, config.teacher_tap)
        valid = valid_cells(batch.input_sizes, of_student.shape[-1], batch.pixels.shape[-1])
        return loss(of_student, of_teacher, valid, reduction="none")

    return Objective(name, config.weight, "image", compare, _asked(config.student_tap), _asked(config.teacher_tap))


def _prompt_embed(name: str, config: PromptEmbedConfig) -> Objective:
    loss, tap = config.build(), f"prompted.{config.layer}"

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "P"]:
        stream = student.output.taps[tap]
        valid = valid_per_prompt(batch, stream.shape[-1])
        return loss(stream, teacher.output.taps[tap], valid, reduction="none")

    return Objective(name, config.weight, "prompt", compare, decoder_taps=(tap,))


def _decoder_mask_token(name: str, config: DecoderMaskTokenConfig) -> Objective:
    loss = config.build()

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "P"]:
        return loss(student.output.mask_tokens, teacher.output.mask_tokens, reduction="none")

    return Objective(name, config.weight, "prompt", compare)


def _dense_mask_logits(name: str, config: DenseMaskLogitsConfig) -> Objective:
    loss = config.build()

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "P"]:
        of_student, of_teacher = student.output.low_res_logits, teacher.output.low_res_logits
        masks, grid = of_student.shape[1], of_student.shape[-1]
        valid = valid_per_prompt(batch, grid).repeat_interleave(masks, dim=0)
        per_mask = loss(of_student.flatten(0, 1)[:, None], of_teacher.flatten(0, 1)[:, None], valid, reduction="none")
        return (per_mask.view(-1, masks) * answering_masks(batch)).sum(dim=1)

    return Objective(name, config.weight, "prompt", compare)


def _asked(tap: str) -> tuple[str, ...]:
    return () if tap == "neck" else (tap,)


def _tapped(view: View, tap: str) -> Float[Tensor, "B 256 h w"]:
    return view.features.embedding if tap == "neck" else view.features.taps[tap]
