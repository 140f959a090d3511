"""A model's sizes, read off the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samlet.errors import CheckpointError
from samlet.models.build import ENCODERS
from samlet.models.vit import PATCH

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]


def infer_arch(state: State) -> dict[str, Any]:
    """What `build_sam` needs to rebuild a model from its upstream state_dict.

    TinyViT does not know its input size, so 1024 is taken; upstream's MobileSAM has no other.

    Raises:
        CheckpointError: this is not the state_dict of a SAM-1 model.
    """
    try:
        if "image_encoder.pos_embed" in state:
            encoder = _infer_vit(state)
        elif "image_encoder.patch_embed.seq.0.c.weight" in state:
            encoder = _infer_tiny_vit(state)
        else:
            raise CheckpointError(_what_else(state))
        return {**encoder, **_infer_decoder(state)}
    except KeyError as error:
        raise CheckpointError(f"no whole SAM-1 model: misses key {error.args[0]}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"no SAM-1 model: a tensor has an impossible shape ({error})") from error


def count(state: State, pattern: str) -> int:
    """Members of a numbered list: how many numbers `pattern`'s group finds, which must be 0, 1, 2 and so on.

    Raises:
        CheckpointError: one of them is left out.
    """
    matches = (re.match(pattern, name) for name in state)
    numbers = {int(found[1]) for found in matches if found}
    if gaps := set(range(len(numbers))) - numbers:
        stem = pattern.replace("\\", "").partition("(")[0]
        raise CheckpointError(f"no whole SAM-1 model: misses {stem}{min(gaps)}, but has {stem}{max(numbers)}")
    return len(numbers)


def _infer_decoder(state: State) -> dict[str, Any]:
    layers = r"mask_decoder\.transformer\.layers\.(\d+)\."
    return {
        "decoder_depth": count(state, layers),
        "decoder_mlp_dim": state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
    }


def _infer_vit(state: State) -> dict[str, Any]:
    prefix = "image_encoder.blocks."
    embed_dim = state["image_encoder.patch_embed.proj.weight"].shape[0]
    grid = state["image_encoder.pos_embed"].shape[1]
    depth = count(state, r"image_encoder\.blocks\.(\d+)\.")
    tables = [state[f"{prefix}{i}.attn.rel_pos_h"] for i in range(depth)]
    sides = [(table.shape[0] + 1) // 2 for table in tables]
    windows = {side for side in sides if side != grid}
    if len(windows) > 1:
        raise CheckpointError(f"blocks attend in windows of several sizes ({sorted(windows)}), which SAM-1 does not")
    sizes = {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // tables[0].shape[1],
        "global_attn_indexes": [i for i, side in enumerate(sides) if side == grid],
        "window_size": windows.pop() if windows else 14,
        "mlp_ratio": _ratio([(state[f"{prefix}0.mlp.lin1.weight"].shape[0], embed_dim)]),
    }
    named = [kind for kind, published in ENCODERS.items() if published.get("embed_dim") == embed_dim]
    return {"kind": named[0] if named else "vit_b", "image_size": grid * PATCH, **sizes}


def _infer_tiny_vit(state: State) -> dict[str, Any]:
    stages = "image_encoder.layers."
    dims = [state["image_encoder.patch_embed.seq.2.c.weight"].shape[0]]
    dims += [state[f"{stages}{i}.downsample.conv1.c.weight"].shape[0] for i in range(3)]
    biases = [state[f"{stages}{i}.blocks.0.attn.attention_biases"] for i in range(1, 4)]
    widths = [(state[f"{stages}{i}.blocks.0.mlp.fc1.weight"].shape[0], dims[i]) for i in range(1, 4)]
    head = state.get("image_encoder.head.weight")
    first = ENCODERS["vit_t"]  # the first stage is convolutional: its heads and window are numbers without effect
    return {
        "kind": "vit_t",
        "image_size": 1024,
        "embed_dims": dims,
        "depths": [count(state, rf"image_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(4)],
        "num_heads": [first["num_heads"][0], *(bias.shape[0] for bias in biases)],
        "window_sizes": [first["window_sizes"][0], *(math.isqrt(bias.shape[1]) for bias in biases)],
        "mlp_ratio": _ratio(widths),
        "num_classes": 0 if head is None else head.shape[0],
    }


def _ratio(widths: list[tuple[int, int]]) -> float:
    """The ratio r with int(r * dim) = hidden for every pair (hidden, dim): the largest of the quotients."""
    return max(hidden / dim for hidden, dim in widths)


def _what_else(state: State) -> str:
    """One sentence on what the keys look like instead."""
    heads = sorted({name.split(".")[0] for name in state})
    shown = ", ".join(heads[:6]) + (" ..." if len(heads) > 6 else "")
    if any(name.startswith("module.") for name in state):
        return "keys start with 'module.' (saved from a DistributedDataParallel model): save model.module.state_dict()"
    if any(name.startswith(("sam_mask_decoder.", "image_encoder.trunk.", "memory_attention.")) for name in state):
        return f"not SAM-1 but a SAM 2 checkpoint, by its keys: {shown}"
    if any(name.startswith(("vision_encoder.", "shared_image_embedding.")) for name in state):
        return "weights of a Hugging Face SamModel: name its folder (config.json beside model.safetensors) instead"
    if any(name.startswith(("blocks.", "patch_embed.", "layers.")) for name in state):
        return f"an image encoder alone, not a whole SAM-1 model, by its keys: {shown}"
    return f"not the state_dict of a SAM-1 model: image_encoder is not among its parts: {shown or 'it is empty'}"
