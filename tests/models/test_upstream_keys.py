"""Full-size models have exactly upstream's names and shapes, listed here by rule from the papers' numbers."""

from __future__ import annotations

import math

import pytest
import torch

from samlet.models import build_sam

Shapes = dict[str, tuple[int, ...]]


def weight_and_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def attention_keys(name: str, dim: int, inner: int) -> Shapes:
    keys: Shapes = {}
    for projection in ("q_proj", "k_proj", "v_proj"):
        keys |= weight_and_bias(f"{name}.{projection}", inner, dim)
    return keys | weight_and_bias(f"{name}.out_proj", dim, inner)


def prompt_and_mask_keys() -> Shapes:
    keys: Shapes = {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    for name in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"):
        keys[f"prompt_encoder.{name}.weight"] = (1, 256)
    down = "prompt_encoder.mask_downscaling"
    keys |= weight_and_bias(f"{down}.0", 4, 1, 2, 2) | weight_and_bias(f"{down}.1", 4)
    keys |= weight_and_bias(f"{down}.3", 16, 4, 2, 2) | weight_and_bias(f"{down}.4", 16)
    keys |= weight_and_bias(f"{down}.6", 256, 16, 1, 1)
    d = "mask_decoder"
    for i in range(2):
        layer = f"{d}.transformer.layers.{i}"
        keys |= attention_keys(f"{layer}.self_attn", 256, 256)
        keys |= attention_keys(f"{layer}.cross_attn_token_to_image", 256, 128)
        keys |= attention_keys(f"{layer}.cross_attn_image_to_token", 256, 128)
        keys |= weight_and_bias(f"{layer}.mlp.lin1", 2048, 256) | weight_and_bias(f"{layer}.mlp.lin2", 256, 2048)
        for j in range(1, 5):
            keys |= weight_and_bias(f"{layer}.norm{j}", 256)
    keys |= attention_keys(f"{d}.transformer.final_attn_token_to_image", 256, 128)
    keys |= weight_and_bias(f"{d}.transformer.norm_final_attn", 256)
    keys |= {f"{d}.iou_token.weight": (1, 256), f"{d}.mask_tokens.weight": (4, 256)}
    up = f"{d}.output_upscaling"
    keys |= {f"{up}.0.weight": (256, 64, 2, 2), f"{up}.0.bias": (64,)} | weight_and_bias(f"{up}.1", 64)
    keys |= {f"{up}.3.weight": (64, 32, 2, 2), f"{up}.3.bias": (32,)}
    heads = [(f"output_hypernetworks_mlps.{i}", 32) for i in range(4)] + [("iou_prediction_head", 4)]
    for name, out in heads:
        for i, rows in enumerate((256, 256, out)):
            keys |= weight_and_bias(f"{d}.{name}.layers.{i}", rows, 256)
    return keys


def neck_keys(dim: int) -> Shapes:
    n = "image_encoder.neck"
    convolutions = {f"{n}.0.weight": (256, dim, 1, 1), f"{n}.2.weight": (256, 256, 3, 3)}
    return convolutions | weight_and_bias(f"{n}.1", 256) | weight_and_bias(f"{n}.3", 256)


def vit_keys(dim: int, depth: int, heads: int, global_blocks: tuple[int, ...]) -> Shapes:
    keys: Shapes = {"image_encoder.pos_embed": (1, 64, 64, dim)}
    keys |= weight_and_bias("image_encoder.patch_embed.proj", dim, 3, 16, 16)
    for i in range(depth):
        b = f"image_encoder.blocks.{i}"
        rows = 2 * (64 if i in global_blocks else 14) - 1
        keys |= {f"{b}.attn.rel_pos_{axis}": (rows, dim // heads) for axis in "hw"}
        keys |= weight_and_bias(f"{b}.norm1", dim) | weight_and_bias(f"{b}.norm2", dim)
        keys |= weight_and_bias(f"{b}.attn.qkv", 3 * dim, dim) | weight_and_bias(f"{b}.attn.proj", dim, dim)
        keys |= weight_and_bias(f"{b}.mlp.lin1", 4 * dim, dim) | weight_and_bias(f"{b}.mlp.lin2", dim, 4 * dim)
    return keys | neck_keys(dim)


def conv_bn_keys(name: str, out: int, into: int, kernel: int) -> Shapes:
    keys = {f"{name}.c.weight": (out, into, kernel, kernel), f"{name}.bn.num_batches_tracked": ()}
    return keys | {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}


def tiny_vit_keys() -> Shapes:
    dims, depths, heads, windows = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
    keys: Shapes = {}
    e = "image_encoder"
    keys |= conv_bn_keys(f"{e}.patch_embed.seq.0", 32, 3, 3) | conv_bn_keys(f"{e}.patch_embed.seq.2", 64, 32, 3)
    for i, dim in enumerate(dims):
        for j in range(depths[i]):
            b = f"{e}.layers.{i}.blocks.{j}"
            if i == 0:
                keys |= conv_bn_keys(f"{b}.conv1", 256, 64, 1) | conv_bn_keys(f"{b}.conv2", 256, 1, 3)
                keys |= conv_bn_keys(f"{b}.conv3", 64, 256, 1)
                continue
            keys[f"{b}.attn.attention_biases"] = (heads[i], windows[i] ** 2)
            keys |= weight_and_bias(f"{b}.attn.norm", dim) | weight_and_bias(f"{b}.mlp.norm", dim)
            keys |= weight_and_bias(f"{b}.attn.qkv", 3 * dim, dim) | weight_and_bias(f"{b}.attn.proj", dim, dim)
            keys |= weight_and_bias(f"{b}.mlp.fc1", 4 * dim, dim) | weight_and_bias(f"{b}.mlp.fc2", dim, 4 * dim)
            keys |= conv_bn_keys(f"{b}.local_conv", dim, 1, 3)
        if i < 3:
            m, out = f"{e}.layers.{i}.downsample", dims[i + 1]
            keys |= conv_bn_keys(f"{m}.conv1", out, dim, 1) | conv_bn_keys(f"{m}.conv2", out, 1, 3)
            keys |= conv_bn_keys(f"{m}.conv3", out, out, 1)
    keys |= weight_and_bias(f"{e}.norm_head", 320) | weight_and_bias(f"{e}.head", 1000, 320)
    return keys | neck_keys(320)


ENCODERS = {
    "vit_t": tiny_vit_keys(),
    "vit_b": vit_keys(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": vit_keys(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": vit_keys(1280, 32, 16, (7, 15, 23, 31)),
}
# In millions, all tensors but buffers: 9.66 of the MobileSAM paper is without the classifier of TinyViT.
PARAMETERS = {"vit_t": 10.13, "vit_b": 93.74, "vit_l": 312.34, "vit_h": 641.09}


@pytest.mark.parametrize("kind", ENCODERS)
def test_names_and_shapes_are_upstreams(kind: str) -> None:
    with torch.device("meta"):
        sam = build_sam(kind)
    found = {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    assert found == ENCODERS[kind] | prompt_and_mask_keys()


@pytest.mark.parametrize("kind", PARAMETERS)
def test_number_of_parameters(kind: str) -> None:
    with torch.device("meta"):
        sam = build_sam(kind)
    total = sum(parameter.numel() for parameter in sam.parameters())
    assert total / 1e6 == pytest.approx(PARAMETERS[kind], abs=0.005)
    buffers = ("running_mean", "running_var", "num_batches_tracked", "gaussian_matrix")
    by_rule = ENCODERS[kind] | prompt_and_mask_keys()
    assert total == sum(math.prod(shape) for name, shape in by_rule.items() if not name.endswith(buffers))
    assert sum(p.numel() for p in sam.mask_decoder.parameters()) == pytest.approx(4.06e6, rel=0.005)


def test_the_unused_classifier_is_kept_and_never_trains() -> None:
    with torch.device("meta"):
        sam = build_sam("vit_t")
    frozen = {name for name, parameter in sam.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        f"image_encoder.{part}" for part in ("norm_head.weight", "norm_head.bias", "head.weight", "head.bias")
    }
