"""Losses: tensors in, scalar out; one file per objective. They know no model and no data set."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.losses.attention_matching import attention_matching_loss as attention_matching_loss
    from samlet.losses.configs import AttentionMatchingConfig as AttentionMatchingConfig
    from samlet.losses.configs import DecoderMaskTokenConfig as DecoderMaskTokenConfig
    from samlet.losses.configs import DecoderMatchingConfig as DecoderMatchingConfig
    from samlet.losses.configs import DenseMaskLogitsConfig as DenseMaskLogitsConfig
    from samlet.losses.configs import EncoderMatchingConfig as EncoderMatchingConfig
    from samlet.losses.configs import EncoderPatchConfig as EncoderPatchConfig
    from samlet.losses.configs import PromptEmbedConfig as PromptEmbedConfig
    from samlet.losses.configs import RkdConfig as RkdConfig
    from samlet.losses.configs import TaskLossConfig as TaskLossConfig
    from samlet.losses.decoder_mask_token import decoder_mask_token_loss as decoder_mask_token_loss
    from samlet.losses.decoder_matching import decoder_matching_loss as decoder_matching_loss
    from samlet.losses.dense_mask_logits import dense_mask_logits_loss as dense_mask_logits_loss
    from samlet.losses.dice import dice_loss as dice_loss
    from samlet.losses.encoder_matching import encoder_matching_loss as encoder_matching_loss
    from samlet.losses.encoder_patch import encoder_patch_loss as encoder_patch_loss
    from samlet.losses.focal import focal_loss as focal_loss
    from samlet.losses.iou import iou_loss as iou_loss
    from samlet.losses.prompt_embed import prompt_embed_loss as prompt_embed_loss
    from samlet.losses.rkd import rkd_loss as rkd_loss
    from samlet.losses.task import task_loss as task_loss

_HOME = {
    "AttentionMatchingConfig": "samlet.losses.configs",
    "DecoderMaskTokenConfig": "samlet.losses.configs",
    "DecoderMatchingConfig": "samlet.losses.configs",
    "DenseMaskLogitsConfig": "samlet.losses.configs",
    "EncoderMatchingConfig": "samlet.losses.configs",
    "EncoderPatchConfig": "samlet.losses.configs",
    "PromptEmbedConfig": "samlet.losses.configs",
    "RkdConfig": "samlet.losses.configs",
    "TaskLossConfig": "samlet.losses.configs",
    "attention_matching_loss": "samlet.losses.attention_matching",
    "decoder_mask_token_loss": "samlet.losses.decoder_mask_token",
    "decoder_matching_loss": "samlet.losses.decoder_matching",
    "dense_mask_logits_loss": "samlet.losses.dense_mask_logits",
    "dice_loss": "samlet.losses.dice",
    "encoder_matching_loss": "samlet.losses.encoder_matching",
    "encoder_patch_loss": "samlet.losses.encoder_patch",
    "focal_loss": "samlet.losses.focal",
    "iou_loss": "samlet.losses.iou",
    "prompt_embed_loss": "samlet.losses.prompt_embed",
    "rkd_loss": "samlet.losses.rkd",
    "task_loss": "samlet.losses.task",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 (a list of strings, only not a literal one)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
