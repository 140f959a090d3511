"""What the losses can be told, torch-free; `build()` gives the loss itself with these settings bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from samlet.schema import Loc, StrictModel

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Gamma = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Projection = Literal["neck", "pca", "learnt"]
LayerPair = tuple[str, str]
"""A student's and a teacher's tap, as `[blocks.-2, blocks.30]`."""


ATTENTION_NAME = r"^([0-9]+\.(self|token_to_image|image_to_token)|final)$"


def evenly_spaced(layers: int | tuple[LayerPair, ...], head: str = "blocks") -> tuple[LayerPair, ...]:
    """The pairs themselves, or that many shares of the depth on both sides: 2 stands for 1/2 and 2/2."""
    if isinstance(layers, int):
        return tuple((f"{head}.{i}/{layers}",) * 2 for i in range(1, layers + 1))
    return layers


class TaskLossConfig(StrictModel):
    """The supervised loss on ground-truth masks: focal : dice : iou, 20 : 1 : 1 as SAM was trained."""

    focal: Weight = 20.0
    """Weight of the focal loss on the mask logits."""
    dice: Weight = 1.0
    """Weight of the dice loss on the mask logits."""
    iou: Weight = 1.0
    """Weight of the IoU head's regression to the masks' actual IoU."""
    iou_kind: Literal["l1", "mse"] = "l1"
    """How the IoU head is regressed: absolute (SAM 2) or squared (SAM) error of the raw output."""
    focal_alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Focal loss: weight of the foreground; the background gets 1 - alpha."""
    focal_gamma: Gamma = 2.0
    """Focal loss: exponent that fades cells which are right already; at least 1."""

    def build(self) -> Callable[..., dict[str, Tensor]]:
        """`task_loss` with these settings: the three unweighted terms, one value per prompt."""
        from samlet.losses.task import task_loss

        return partial(
            task_loss,
            w_focal=self.focal,
            w_dice=self.dice,
            iou_kind=self.iou_kind,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )


class EncoderPatchConfig(StrictModel):
    """Distil patch tokens of the image encoder."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss (w_enc)."""
    w_l2: Weight = 1.0
    """Weight of the mean squared error."""
    w_cos: Weight = 1.0
    """Weight of one minus the cosine over channels."""
    teacher_tap: str = "neck"
    """Where the teacher is read: `neck` (the image embedding), `neck_conv`, or `blocks.N` (N may be negative)."""
    student_tap: str = "neck"
    """Where the student is read; the same names."""
    projection: Projection = "neck"
    """How blocks become comparable. neck: each by its own model's frozen neck convolution, to 256 channels; pca: the
    teacher's by principal components fitted at the start, to at most 256, the student's by a learnt convolution to as
    many; learnt: the student's by a learnt convolution to the teacher's own channels. Finer grids are pooled."""

    def build(self) -> Callable[..., Tensor]:
        """`encoder_patch_loss` with these settings."""
        from samlet.losses.encoder_patch import encoder_patch_loss

        return partial(encoder_patch_loss, w_l2=self.w_l2, w_cos=self.w_cos)


class PromptEmbedConfig(StrictModel):
    """Distil the prompt-conditioned image stream inside the mask decoder's two-way transformer."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss (w_pe)."""
    w_mse: Weight = 0.7
    """Weight of the mean squared error between the streams normalised over channels (alpha)."""
    w_cos: Weight = 0.3
    """Weight of one minus the cosine over channels (1 - alpha)."""
    layer: Annotated[int, Field(ge=0)] = 0
    """0: the stream before the first cross-attention; k: after the transformer's k-th layer."""

    def build(self) -> Callable[..., Tensor]:
        """`prompt_embed_loss` with these settings."""
        from samlet.losses.prompt_embed import prompt_embed_loss

        return partial(prompt_embed_loss, w_mse=self.w_mse, w_cos=self.w_cos)


class DecoderMaskTokenConfig(StrictModel):
    """Distil the mask decoder's four mask tokens."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss (w_tok)."""
    w_kl: Weight = 1.0
    """Weight of the Kullback-Leibler divergence."""
    temperature: Temperature = 0.5
    """Softmax temperature over a token's channels; below 1 sharpens."""

    def build(self) -> Callable[..., Tensor]:
        """`decoder_mask_token_loss` with these settings."""
        from samlet.losses.decoder_mask_token import decoder_mask_token_loss

        return partial(decoder_mask_token_loss, w_kl=self.w_kl, temperature=self.temperature)


class DenseMaskLogitsConfig(StrictModel):
    """Distil the low-res mask logits, same prompt and same mask index."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss (w_dense)."""
    w_kl: Weight = 0.6
    """Weight of the Bernoulli Kullback-Leibler divergence (beta)."""
    w_focal: Weight = 0.4
    """Weight of the soft focal loss (1 - beta)."""
    w_dice: Weight = 0.2
    """Weight of the soft Dice distance, which does not fade with the object's area; 0: the two terms above alone."""
    gamma: Gamma = 2.0
    """Soft focal loss: exponent of the disagreement |p_t - p_s|; at least 1."""
    temperature: Temperature = 1.0
    """Divides both logits in the divergence; its square scales the term, so the gradient keeps its size."""

    def build(self) -> Callable[..., Tensor]:
        """`dense_mask_logits_loss` with these settings."""
        from samlet.losses.dense_mask_logits import dense_mask_logits_loss

        return partial(
            dense_mask_logits_loss,
            w_kl=self.w_kl,
            w_focal=self.w_focal,
            w_dice=self.w_dice,
            gamma=self.gamma,
            temperature=self.temperature,
        )


class EncoderMatchingConfig(StrictModel):
    """Distil several layers of the image encoder at once."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss."""
    lambda_mse: Weight = 1.0
    """Weight of the mean squared error."""
    lambda_kl: Weight = 1.0
    """Weight of the divergence KL(student || teacher) of the softmax over channels."""
    temperature: Temperature = 1.0
    """Softmax temperature; its square scales the divergence, so the gradient keeps its size."""
    layers: Annotated[int, Field(ge=1, le=32)] | Annotated[tuple[LayerPair, ...], Field(min_length=1)] = 4
    """Which layers: a number of evenly spaced relative depths, or pairs [student's tap, teacher's tap] such as
    [blocks.-2, blocks.30], [blocks.1/2, blocks.1/2] (half way down) or [neck, neck]."""
    projection: Literal["none", "neck", "pca", "learnt"] = "learnt"
    """How layers become comparable, as for encoder_patch; none: they must have the same channels and grids."""

    def build(self) -> Callable[..., Tensor]:
        """`encoder_matching_loss` with these settings."""
        from samlet.losses.encoder_matching import encoder_matching_loss

        return partial(
            encoder_matching_loss,
            lambda_mse=self.lambda_mse,
            lambda_kl=self.lambda_kl,
            temperature=self.temperature,
        )


class DecoderMatchingConfig(StrictModel):
    """Distil what the mask decoder multiplies into logits: its upscaled features and its hypernetworks' vectors."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss."""
    w_mse: Weight = 1.0
    """Weight of the mean squared error."""
    w_cos: Weight = 1.0
    """Weight of one minus the cosine over channels."""
    w_kl: Weight = 1.0
    """Weight of the divergence KL(teacher || student) of the softmax over channels."""
    temperature: Temperature = 1.0
    """Softmax temperature; its square scales the divergence, so the gradient keeps its size."""
    features: Annotated[tuple[Literal["upscaled", "hypernetworks"], ...], Field(min_length=1)] = (
        "upscaled",
        "hypernetworks",
    )
    """Which features: those of the masks' pixels, the masks' vectors, or both, averaged."""

    def build(self) -> Callable[..., Tensor]:
        """`decoder_matching_loss` with these settings."""
        from samlet.losses.decoder_matching import decoder_matching_loss

        return partial(
            decoder_matching_loss, w_mse=self.w_mse, w_cos=self.w_cos, w_kl=self.w_kl, temperature=self.temperature
        )


class AttentionMatchingConfig(StrictModel):
    """Distil attention maps of the mask decoder and of the image encoder."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss."""
    decoder: tuple[Annotated[str, Field(pattern=ATTENTION_NAME)], ...] = (
        "0.token_to_image",
        "1.token_to_image",
        "final",
    )
    """The decoder's maps: k.self, k.token_to_image and k.image_to_token of layer k, and final."""
    encoder: Annotated[int, Field(ge=0, le=32)] | tuple[LayerPair, ...] = 0
    """The encoder's: a number of evenly spaced relative depths, or pairs [student's, teacher's] such as
    [attention.-1, attention.-1]; each is read at 64 places an image, drawn anew in every step."""
    resample: bool = False
    """Average the encoder's heads and pool the finer grid, so that unlike encoders compare; false: refuse them."""

    def build(self) -> Callable[..., Tensor]:
        """`attention_matching_loss`, which has no settings."""
        from samlet.losses.attention_matching import attention_matching_loss

        return attention_matching_loss

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see."""
        if self.enable and not self.decoder and not self.encoder:
            yield ("decoder",), "no map is left to match; name one, or ask for some of the encoder's"


class RkdConfig(StrictModel):
    """Distil how the patches of an image lie to each other (relational knowledge distillation)."""

    enable: bool = True
    """Whether this term takes part; a block that is written down does, unless it says otherwise."""
    weight: Weight = 1.0
    """Weight of the whole term in the distillation loss."""
    w_distance: Weight = 1.0
    """Weight of the distances between two patches."""
    w_angle: Weight = 2.0
    """Weight of the angles among three patches."""
    patches: Annotated[int, Field(ge=3, le=256)] = 64
    """Patches drawn from each image in every step; time and memory grow with the third power."""
    student_tap: str = "neck"
    """Where the student is read, as in encoder_patch; blocks as they are, for channels need not agree."""
    teacher_tap: str = "neck"
    """Where the teacher is read; the same names."""

    def build(self) -> Callable[..., Tensor]:
        """`rkd_loss` with these settings."""
        from samlet.losses.rkd import rkd_loss

        return partial(rkd_loss, w_distance=self.w_distance, w_angle=self.w_angle)
