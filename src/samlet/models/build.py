"""Sizes of the four kinds of SAM, and their assembly."""

from __future__ import annotations

from typing import Any

from samlet.errors import SamletError
from samlet.models.mask_decoder import MaskDecoder
from samlet.models.prompt_encoder import PromptEncoder
from samlet.models.sam import STRIDE, Sam
from samlet.models.tiny_vit import TinyViT
from samlet.models.vit import ImageEncoderViT

_VIT = {"window_size": 14, "mlp_ratio": 4.0}
_DECODER = {"decoder_depth": 2, "decoder_mlp_dim": 2048}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit_t": {
        "embed_dims": [64, 128, 160, 320],
        "depths": [2, 2, 6, 2],
        "num_heads": [2, 4, 5, 10],
        "window_sizes": [7, 7, 14, 7],
        "mlp_ratio": 4.0,
        "num_classes": 1000,
    },
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": [2, 5, 8, 11], **_VIT},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": [5, 11, 17, 23], **_VIT},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": [7, 15, 23, 31], **_VIT},
}


def build_sam(kind: str, image_size: int = 1024, **overrides: Any) -> Sam:
    """A SAM with fresh weights, drawn from torch's global generator.

    `overrides` replace the encoder's sizes (vit_t: embed_dims, depths, num_heads, window_sizes, mlp_ratio, num_classes;
    the others: embed_dim, depth, num_heads, global_attn_indexes, window_size, mlp_ratio) and the decoder's
    (decoder_depth, decoder_mlp_dim); None leaves a size as it is.

    Raises:
        SamletError: an unknown kind or size, or sizes that do not fit each other.
    """
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise SamletError(f"kind '{kind}': there are {', '.join(ENCODERS)}")
    sizes = {**ENCODERS[kind], **_DECODER}
    unknown = sorted(set(overrides) - set(sizes))
    if unknown:
        raise SamletError(f"{kind} has no {', '.join(unknown)}; it has {', '.join(sizes)}")
    sizes.update({name: value for name, value in overrides.items() if value is not None})
    arch: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    if overrides.get("global_attn_indexes") is None and type(arch.get("depth")) is int:
        arch["global_attn_indexes"] = [index for index in arch["global_attn_indexes"] if index < arch["depth"]]
    _check(kind, image_size, arch)
    encoder_sizes = {name: value for name, value in arch.items() if name not in _DECODER}
    return Sam(
        TinyViT(**encoder_sizes) if kind == "vit_t" else ImageEncoderViT(image_size, **encoder_sizes),
        PromptEncoder(image_size),
        MaskDecoder(arch["decoder_depth"], arch["decoder_mlp_dim"]),
        {"kind": kind, "image_size": image_size, **arch},
    )


def _check(kind: str, image_size: int, arch: dict[str, Any]) -> None:
    _check_bounds({"image_size": image_size, **arch})
    if image_size < 2 * STRIDE or image_size % STRIDE:
        raise SamletError(f"image_size {image_size}: must be a multiple of {STRIDE}, {2 * STRIDE} or more")
    if kind == "vit_t":
        _check_tiny(arch)
    elif isinstance(arch["num_heads"], list):
        raise SamletError(f"num_heads {arch['num_heads']}: {kind} has one number for all blocks")
    elif arch["embed_dim"] % arch["num_heads"]:
        raise SamletError(f"embed_dim {arch['embed_dim']} cannot be shared by {arch['num_heads']} heads")


# Beyond these no SAM-1 lies, and before them no allocation fails; the sizes may come from a stranger's file.
_BOUNDS: dict[str, tuple[int, int]] = {
    "image_size": (1, 8192),
    "embed_dims": (1, 8192),
    "embed_dim": (1, 8192),
    "depths": (1, 128),
    "depth": (1, 128),
    "num_heads": (1, 256),
    "window_sizes": (1, 512),
    "window_size": (1, 512),
    "global_attn_indexes": (0, 127),
    "num_classes": (0, 100_000),
    "decoder_depth": (1, 128),
    "decoder_mlp_dim": (1, 65_536),
}
_MAX_MLP_RATIO = 64


def _check_bounds(arch: dict[str, Any]) -> None:
    """Every size is of its type and in its bounds, so that whatever follows is finite."""
    for name, (low, high) in _BOUNDS.items():
        is_list = name in ("embed_dims", "depths", "window_sizes", "global_attn_indexes")
        value = arch.get(name, [] if is_list else low)
        if name == "num_heads":
            is_list = isinstance(value, list)
        if isinstance(value, list) != is_list or (is_list and len(value) > 128):
            raise SamletError(f"{name} {_short(value)}: must be {'a list of numbers' if is_list else 'one number'}")
        for number in value if is_list else [value]:
            if type(number) is not int or not low <= number <= high:
                raise SamletError(f"{name} {_short(value)}: must be {low} to {high}, in whole numbers")
    ratio = arch["mlp_ratio"]
    if type(ratio) not in (int, float) or not 0 < ratio <= _MAX_MLP_RATIO:
        raise SamletError(f"mlp_ratio {_short(ratio)}: must be above 0, at most {_MAX_MLP_RATIO}")
    if any(index >= arch["depth"] for index in arch.get("global_attn_indexes", ())):
        raise SamletError(
            f"global_attn_indexes {arch['global_attn_indexes']}: there are {arch['depth']} blocks, from 0"
        )


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."


def _check_tiny(arch: dict[str, Any]) -> None:
    for name in ("embed_dims", "depths", "num_heads", "window_sizes"):
        if not isinstance(arch[name], list) or len(arch[name]) != 4:
            raise SamletError(f"{name} {arch[name]}: vit_t has four stages, one positive number for each")
    for dim, heads in list(zip(arch["embed_dims"], arch["num_heads"], strict=True))[1:]:
        if dim % heads:
            raise SamletError(f"embed_dims {arch['embed_dims']}: {dim} cannot be shared by {heads} heads")
