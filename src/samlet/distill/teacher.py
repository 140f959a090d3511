"""Teachers: whatever can `encode` a batch and `decode` its prompts without gradients; and a weighted team of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from samlet.distill.views import View, encode_projected
from samlet.errors import ConfigError
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from samlet.models.sam import Sam


class Teacher(Protocol):
    """What distillation asks of a teacher, whether its features are computed now or were stored before."""

    name: str

    def encode(self, batch: Batch) -> ImageFeatures:
        """Image embedding and encoder taps of a batch, brought to 256 channels."""
        ...

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """All four masks, tokens and decoder taps for exactly the student's prompts."""
        ...


class LiveTeacher:
    """A Segment-Anything model that runs beside the student, frozen and in eval mode.

    Raises:
        ConfigError: a tap that this model does not have, or an input frame that is not the student's.
    """

    def __init__(
        self,
        name: str,
        sam: Sam,
        image_size: int,
        encoder_taps: Sequence[str] = (),
        decoder_taps: Sequence[str] = (),
    ) -> None:
        if sam.image_size != image_size:
            raise ConfigError(
                f"teachers: '{name}' sees {sam.image_size} x {sam.image_size} pixels, the student {image_size} x "
                f"{image_size}; set model.image_size to {sam.image_size}, or take a teacher of {image_size}"
            )
        for tap in encoder_taps:
            sam.tap_channels(tap)
        self.name = name
        self.sam = sam.requires_grad_(False).eval()
        self.encoder_taps = tuple(encoder_taps)
        self.decoder_taps = tuple(decoder_taps)

    @torch.no_grad()
    def encode(self, batch: Batch) -> ImageFeatures:
        """Run the image encoder."""
        return encode_projected(self.sam, batch.pixels, self.encoder_taps)

    @torch.no_grad()
    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """Run prompt encoder and mask decoder."""
        return self.sam.decode(features, prompts, multimask_output=None, taps=self.decoder_taps)


class Lesson(NamedTuple):
    """What one teacher says about a batch, and its share in the team's loss."""

    weight: float
    view: View


class TeacherTeam:
    """Several teachers; their shares sum to 1."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        assert len(teachers) == len(weights), "one weight a teacher"
        self.teachers = tuple(teachers)
        self.weights = tuple(weights)

    def teach(self, batch: Batch) -> tuple[Lesson, ...]:
        """Every teacher's answer to the student's own prompts; a teacher of share 0 is not asked."""
        lessons = []
        for teacher, weight in zip(self.teachers, self.weights, strict=True):
            if weight > 0:
                features = teacher.encode(batch)
                lessons.append(Lesson(weight, View(features, teacher.decode(features, batch.prompts))))
        return tuple(lessons)

    def logits_of_first(self, batch: Batch) -> Tensor:
        """Low-res logits of the first teacher, for pictures."""
        features = self.teachers[0].encode(batch)
        return self.teachers[0].decode(features, batch.prompts).low_res_logits
