"""Teachers: whatever can `encode` a batch and `decode` its prompts without gradients; and a weighted team of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from samlet.distill.frames import features_at, output_at, pixels_at, prompts_at
from samlet.distill.layers import attention_places
from samlet.distill.views import channels_of, encode_tapped
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam


class Teacher(Protocol):
    """What distillation asks of a teacher, whether its features are computed now or were stored before.

    Both verbs speak of the teacher's own input frame, `image_size` pixels wide.
    """

    name: str
    image_size: int

    def encode(self, batch: Batch) -> ImageFeatures:
        """Image embedding and encoder taps of a batch; taps ending in `@neck` are brought to 256 channels."""
        ...

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """All four masks, tokens and decoder taps."""
        ...


class LiveTeacher:
    """A Segment-Anything model that runs beside the student, frozen and in eval mode.

    Args:
        name: what logs and errors call it.
        sam: the model; its own input size may differ from the student's.
        encoder_taps: what `encode` returns besides the embedding.
        decoder_taps: what `decode` returns besides masks, IoU and tokens.
        precision: of the image encoder's weights and arithmetic; None: those of the run.
        offload: keep the image encoder in main memory and bring it to the device for each batch.

    Raises:
        SamletError: a tap that this model does not have.
    """

    def __init__(
        self,
        name: str,
        sam: Sam,
        encoder_taps: Sequence[str] = (),
        decoder_taps: Sequence[str] = (),
        *,
        precision: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        for tap in encoder_taps:
            channels_of(sam, tap)
        sam.check_decoder_taps(decoder_taps)
        self.name = name
        self.image_size = sam.image_size
        self.sam = sam.requires_grad_(False).eval()
        self.encoder_taps = tuple(encoder_taps)
        self.decoder_taps = tuple(decoder_taps)
        self.offload = offload
        self.precision = precision
        if precision is not None:
            self.sam.image_encoder.to(precision)
        if offload:
            self.sam.image_encoder.to("cpu")

    def encode(self, batch: Batch) -> ImageFeatures:
        """Run the image encoder."""
        return self.encode_pixels(batch.pixels, attention_places(batch, self.encoder_taps))

    @torch.no_grad()
    def encode_pixels(
        self, pixels: Float[Tensor, "B 3 S S"], places: Float[Tensor, "B Q 2"] | None = None
    ) -> ImageFeatures:
        """Run the image encoder on images of any input frame; `places` are those where attention is tapped.

        A CPU takes one image at a time, which costs nothing there: the result then depends on no neighbour, and is to
        the bit what a store keeps.
        """
        pixels = pixels_at(pixels, self.image_size)
        with self._present(pixels.device):
            step = 1 if pixels.device.type == "cpu" else len(pixels)
            rows = [slice(first, first + step) for first in range(0, len(pixels), step)]
            return _joined([self._encoded(pixels[row], None if places is None else places[row]) for row in rows])

    def _encoded(self, pixels: Float[Tensor, "B 3 S S"], places: Float[Tensor, "B Q 2"] | None) -> ImageFeatures:
        if self.precision is None:
            return encode_tapped(self.sam, pixels, self.encoder_taps, places)
        with torch.autocast(pixels.device.type, enabled=False):
            features = encode_tapped(self.sam, pixels.to(self.precision), self.encoder_taps, places)
        taps = {name: tap.to(pixels.dtype) for name, tap in features.taps.items()}
        return ImageFeatures(features.embedding.to(pixels.dtype), taps)

    @torch.no_grad()
    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """Run prompt encoder and mask decoder."""
        return self.sam.decode(features, prompts, multimask_output=None, taps=self.decoder_taps)

    @contextmanager
    def _present(self, device: torch.device) -> Iterator[None]:
        """The image encoder on the device, for as long as it is needed."""
        if not self.offload:
            yield
            return
        self.sam.image_encoder.to(device)
        try:
            yield
        finally:
            self.sam.image_encoder.to("cpu")


def _joined(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features side by side in the layout that a store has: the student's backward goes by its target's layout."""
    taps = {name: torch.cat([part.taps[name] for part in parts]).contiguous() for name in parts[0].taps}
    return ImageFeatures(torch.cat([part.embedding for part in parts]).contiguous(), taps)


class Lesson(NamedTuple):
    """What one teacher knows about a batch: its features, and its answer to any prompts, in the student's frame."""

    name: str
    weight: float  # its share in the team, 0..1
    features: ImageFeatures
    answer: Callable[[Prompts], MaskOutput]


class TeacherTeam:
    """Several teachers; their shares sum to 1."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
        assert len(teachers) == len(weights), "one weight a teacher"
        self.teachers = tuple(teachers)
        self.weights = tuple(weights)

    def teach(self, batch: Batch) -> tuple[Lesson, ...]:
        """One lesson a teacher; a teacher of share 0 is not asked."""
        pairs = zip(self.teachers, self.weights, strict=True)
        return tuple(lesson(teacher, weight, batch) for teacher, weight in pairs if weight > 0)


def lesson(teacher: Teacher, weight: float, batch: Batch) -> Lesson:
    """Encode a batch once; the lesson answers prompts from these features."""
    image_size = batch.pixels.shape[-1]
    features = teacher.encode(batch)

    def answer(prompts: Prompts) -> MaskOutput:
        own = prompts_at(prompts, image_size, teacher.image_size)
        return output_at(teacher.decode(features, own), teacher.image_size, image_size)

    return Lesson(teacher.name, weight, features_at(features, teacher.image_size, image_size), answer)
