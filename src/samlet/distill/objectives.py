"""The distillation objectives: which part of two views each one compares, and what it needs tapped.

An objective gives one value per image or one per prompt; how values become a loss is the training step's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from samlet.distill.answers import answering_masks, valid_per_prompt
from samlet.distill.configs import DistillationConfig
from samlet.distill.layers import Layer, asked, first_of_each, matched, refuse_unlike, sampled_places, tapped
from samlet.distill.views import View
from samlet.frames import valid_cells
from samlet.losses.attention_matching import on_common_grid
from samlet.losses.configs import (
    AttentionMatchingConfig,
    DecoderMaskTokenConfig,
    DecoderMatchingConfig,
    DenseMaskLogitsConfig,
    EncoderMatchingConfig,
    EncoderPatchConfig,
    PromptEmbedConfig,
    RkdConfig,
    evenly_spaced,
)
from samlet.models.attention import cells_at, tokens_at
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
    layers: tuple[Layer, ...] = ()  # of the image encoders, which projections bring to one shape


def build_objectives(config: DistillationConfig) -> tuple[Objective, ...]:
    """The enabled objectives with a positive weight."""
    builders: dict[type, Callable[..., Objective]] = {
        EncoderPatchConfig: _encoder_patch,
        PromptEmbedConfig: _prompt_embed,
        DecoderMaskTokenConfig: _decoder_mask_token,
        DenseMaskLogitsConfig: _dense_mask_logits,
        EncoderMatchingConfig: _encoder_matching,
        DecoderMatchingConfig: _decoder_matching,
        AttentionMatchingConfig: _attention_matching,
        RkdConfig: _rkd,
    }
    return tuple(builders[type(term)](name, term) for name, term in config.terms() if term.weight > 0)


def _encoder_patch(name: str, config: EncoderPatchConfig) -> Objective:
    loss, layer = config.build(), Layer(config.student_tap, config.teacher_tap, config.projection)

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "B"]:
        of_student, of_teacher = matched(name, layer, student, teacher, batch)
        return loss(of_student, of_teacher, _valid_per_image(batch, of_student.shape[-1]), reduction="none")

    return _of_layers(name, config.weight, compare, (layer,))


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


def _of_layers(name: str, weight: float, compare: Compare, layers: tuple[Layer, ...]) -> Objective:
    of_student = asked(*(layer.tapped(layer.student) for layer in layers))
    of_teacher = asked(*(layer.tapped(layer.teacher) for layer in layers))
    return Objective(name, weight, "image", compare, of_student, of_teacher, layers=layers)


def _valid_per_image(batch: Batch, grid: int) -> Float[Tensor, "B grid grid"]:
    return valid_cells(batch.input_sizes, grid, batch.pixels.shape[-1])


def _encoder_matching(name: str, config: EncoderMatchingConfig) -> Objective:
    loss = config.build()
    layers = tuple(Layer(student, teacher, config.projection) for student, teacher in evenly_spaced(config.layers))

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "B"]:
        pairs = [matched(name, layer, student, teacher, batch) for layer in layers]
        valid = [_valid_per_image(batch, of_student.shape[-1]) for of_student, _ in pairs]
        return loss([one for one, _ in pairs], [other for _, other in pairs], valid, reduction="none")

    return _of_layers(name, config.weight, compare, layers)


def _decoder_matching(name: str, config: DecoderMatchingConfig) -> Objective:
    loss = config.build()

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "P"]:
        found = []
        for feature in config.features:
            of_student, of_teacher = student.output.taps[feature], teacher.output.taps[feature]
            if feature == "upscaled":
                valid = valid_per_prompt(batch, of_student.shape[-1])
                found.append(loss(of_student, of_teacher, valid, reduction="none"))
            else:  # P x M x C as a map of one row
                pair = (vectors.transpose(1, 2)[:, :, None] for vectors in (of_student, of_teacher))
                found.append(loss(*pair, reduction="none"))
        return torch.stack(found).mean(dim=0)

    return Objective(name, config.weight, "prompt", compare, decoder_taps=tuple(dict.fromkeys(config.features)))


def _attention_matching(name: str, config: AttentionMatchingConfig) -> Objective:
    loss = config.build()
    pairs = evenly_spaced(config.encoder, "attention")
    decoder_taps = tuple(f"attention.{kind}" for kind in dict.fromkeys(config.decoder))

    def of_images(student: View, teacher: View, batch: Batch) -> list[Float[Tensor, "B"]]:
        found = []
        for one, other in pairs:
            rows = (student.features.taps[one], teacher.features.taps[other])
            if config.resample:
                rows = on_common_grid(*rows)
            refuse_unlike(name, (one, rows[0]), (other, rows[1]), f"set {name}.resample to true")
            keys = _valid_per_image(batch, rows[0].shape[-1]).flatten(1)
            found.append(loss(rows[0].flatten(3), rows[1].flatten(3), keys=keys, reduction="none"))
        return found

    def of_prompts(student: View, teacher: View, batch: Batch) -> list[Float[Tensor, "P"]]:
        found = []
        for tap in decoder_taps:
            maps = (student.output.taps[tap], teacher.output.taps[tap])
            refuse_unlike(name, (tap, maps[0]), (tap, maps[1]), "take teachers of the student's input size")
            queries, keys = _counted(batch, tap, maps[0])
            found.append(loss(*maps, queries, keys, reduction="none"))
        return found

    def compare(student: View, teacher: View, batch: Batch) -> Tensor:
        per_image = of_images(student, teacher, batch)
        if not decoder_taps:
            return torch.stack(per_image).mean(dim=0)
        of_prompt = [values[batch.prompts.image_index] for values in per_image]
        return torch.stack([*of_prompt, *of_prompts(student, teacher, batch)]).mean(dim=0)

    of_student, of_teacher = tuple(one for one, _ in pairs), tuple(other for _, other in pairs)
    per: Literal["image", "prompt"] = "prompt" if decoder_taps else "image"
    return Objective(name, config.weight, per, compare, of_student, of_teacher, decoder_taps)


def _counted(
    batch: Batch, tap: str, weights: Float[Tensor, "P 8 Q K"]
) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P K"]]:
    """How much each query and key of a decoder's map counts: cells by their covered share, holes not at all."""
    of_image = {"self": (), "image_to_token": (2,)}.get(tap.rpartition(".")[2], (3,))
    counts = []
    for axis in (2, 3):
        number = weights.shape[axis]
        if axis in of_image:
            counts.append(valid_per_prompt(batch, math.isqrt(number)).flatten(1))
        else:
            labels, absent = batch.prompts.point_labels, batch.prompts.absent
            present = torch.ones_like(labels, dtype=torch.bool) if absent is None else ~absent
            counts.append(F.pad(present, (number - labels.shape[1], 0), value=True).float())
    return counts[0], counts[1]


def _rkd(name: str, config: RkdConfig) -> Objective:
    loss = config.build()

    def compare(student: View, teacher: View, batch: Batch) -> Float[Tensor, "B"]:
        maps = (tapped(student, config.student_tap), tapped(teacher, config.teacher_tap))
        places = sampled_places(batch, config.patches)
        cells = [cells_at(places, (side.shape[2], side.shape[3])) for side in maps]
        patches = [tokens_at(side.permute(0, 2, 3, 1), own) for side, own in zip(maps, cells, strict=True)]
        return loss(*patches, first_of_each(cells[0]) * first_of_each(cells[1]), reduction="none")

    taps = (asked(config.student_tap), asked(config.teacher_tap))
    return Objective(name, config.weight, "image", compare, *taps)
