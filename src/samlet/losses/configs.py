"""What the losses can be told, torch-free; `build()` gives the loss itself with these settings bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from samlet.schema import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Gamma = Annotated[float, Field(ge=1, allow_inf_nan=False)]


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
            gamma=self.gamma,
            temperature=self.temperature,
        )
