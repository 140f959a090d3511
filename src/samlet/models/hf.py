"""A Hugging Face SamModel's names in upstream's terms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlet.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Applied in order; each is the pattern of a whole name or a part of one.
_RENAMES = [
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image_encoder.blocks.\1.norm\2."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
]
_TIED = "prompt_encoder.shared_embedding.positional_embedding"  # the same matrix under a second name

# What the tensors do not tell: SAM-1 has these values and no others.
_FIXED = {
    "vision_config": {"patch_size": 16, "hidden_act": "gelu", "use_rel_pos": True, "layer_norm_eps": 1e-6},
    "prompt_encoder_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "mask_decoder_config": {
        "num_attention_heads": 8,
        "attention_downsample_rate": 2,
        "num_multimask_outputs": 3,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-6,
    },
}


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model's description."""
    return (folder / CONFIG).is_file()


def check_config(folder: Path) -> None:
    """Refuse a folder whose model is not a SAM-1 as published, by its config.json.

    Raises:
        CheckpointError: another family of models, or a setting that SAM-1 does not have.
    """
    place = folder / CONFIG
    try:
        config: Any = json.loads(place.read_text(encoding="utf-8"))
        family = config.get("model_type")
        blocks = {block: dict(config.get(block) or {}) for block in _FIXED}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{place}: cannot be read as a model's config: {error}") from error
    if family != "sam":
        raise CheckpointError(f"{place}: model_type is {family!r}; samlet reads 'sam' (SamModel) folders only")
    for block, fixed in _FIXED.items():
        for name, value in fixed.items():
            found = blocks[block].get(name, value)
            if found != value:
                raise CheckpointError(f"{place}: {block}.{name} is {found!r}; samlet's SAM has {value!r} there")


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a SamModel under upstream's names; names that are not a SamModel's stay as they are."""
    renamed = {}
    for name, tensor in state.items():
        if name == _TIED and "shared_image_embedding.positional_embedding" in state:
            continue
        key = "shared_image_embedding.positional_embedding" if name == _TIED else name
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed
