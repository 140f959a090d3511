"""The plain way: SAM's networks as they are usually written, on a state_dict, to compare with and to check against.

Maps lie channels-first, BatchNorm is a pass of its own, attention is a written-out softmax, windows are padded before
their projections and the padding computed, every prompt gets its own copy of the image stream. Differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Mapping[str, Tensor]


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors, channels-first whatever the module's layout; gradients reach the module."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def encode(state: State, arch: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """Image embedding (B, 256, S/16, S/16)."""
    encoder = _below(state, "image_encoder.")
    return (_tiny_vit if arch["kind"] == "vit_t" else _vit)(encoder, arch, pixels.contiguous())


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _linear(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def _layer_norm(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def _layer_norm_2d(s: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return s[f"{name}.weight"][:, None, None] * x + s[f"{name}.bias"][:, None, None]


def _neck(s: State, x: Tensor) -> Tensor:
    x = _layer_norm_2d(s, "neck.1", F.conv2d(x, s["neck.0.weight"]))
    return _layer_norm_2d(s, "neck.3", F.conv2d(x, s["neck.2.weight"], padding=1))


def _windows(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    tiles = (x.shape[1] // side, x.shape[2] // side)
    x = x.view(batch, tiles[0], side, tiles[1], side, channels).transpose(2, 3)
    return x.reshape(-1, side * side, channels), tiles


def _unwindows(x: Tensor, side: int, tiles: tuple[int, int], size: tuple[int, int]) -> Tensor:
    x = x.view(-1, *tiles, side, side, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], tiles[0] * side, tiles[1] * side, -1)[:, : size[0], : size[1]]


def _conv_bn(s: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = s[f"{name}.c.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    mean, variance = s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"]
    return F.batch_norm(x, mean, variance, s[f"{name}.bn.weight"], s[f"{name}.bn.bias"])


def _tiny_vit(s: State, arch: Mapping[str, Any], pixels: Tensor) -> Tensor:
    x = _conv_bn(s, "patch_embed.seq.2", F.gelu(_conv_bn(s, "patch_embed.seq.0", pixels, 2)), 2)
    for i, depth in enumerate(arch["depths"]):
        for j in range(depth):
            block = _below(s, f"layers.{i}.blocks.{j}.")
            if i == 0:
                y = F.gelu(_conv_bn(block, "conv2", F.gelu(_conv_bn(block, "conv1", x))))
                x = F.gelu(x + _conv_bn(block, "conv3", y))
            else:
                x = _tiny_block(block, x, arch["window_sizes"][i], arch["num_heads"][i])
        if i < 3:
            merging = _below(s, f"layers.{i}.downsample.")
            y = F.gelu(_conv_bn(merging, "conv2", F.gelu(_conv_bn(merging, "conv1", x)), 2 if i < 2 else 1))
            x = _conv_bn(merging, "conv3", y)
    return _neck(s, x)


def _tiny_block(s: State, x: Tensor, side: int, heads: int) -> Tensor:
    batch, channels, height, width = x.shape
    tokens = x.flatten(2).transpose(1, 2).view(batch, height, width, channels)
    cut, tiles = _windows(tokens, side)
    q, k, v = torch.unflatten(_linear(s, "attn.qkv", _layer_norm(s, "attn.norm", cut)), 2, (heads, 3, -1)).unbind(3)
    bias = s["attn.attention_biases"][:, _distances(side).to(x.device)]
    y = _attend(q, k, v, bias)
    tokens = tokens + _unwindows(_linear(s, "attn.proj", y), side, tiles, (height, width))
    maps = _conv_bn(s, "local_conv", tokens.permute(0, 3, 1, 2).contiguous())
    tokens = maps.flatten(2).transpose(1, 2)
    y = _linear(s, "mlp.fc2", F.gelu(_linear(s, "mlp.fc1", _layer_norm(s, "mlp.norm", tokens))))
    return (tokens + y).transpose(1, 2).reshape(batch, channels, height, width)


def _distances(side: int) -> Tensor:
    axis = torch.arange(side)
    apart = (axis[:, None] - axis[None, :]).abs()
    return (apart[:, None, :, None] * side + apart[None, :, None, :]).reshape(side**2, side**2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of (n, L, heads, d), written out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _vit(s: State, arch: Mapping[str, Any], pixels: Tensor) -> Tensor:
    maps = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16)
    x = maps.permute(0, 2, 3, 1) + s["pos_embed"]
    for i in range(arch["depth"]):
        block, size = _below(s, f"blocks.{i}."), (x.shape[1], x.shape[2])
        y = _layer_norm(block, "norm1", x, 1e-6)
        if i in arch["global_attn_indexes"]:
            y = _vit_attention(block, y.flatten(1, 2), size, arch["num_heads"]).view(x.shape)
        else:
            side = arch["window_size"]
            cut, tiles = _windows(y, side)
            y = _unwindows(_vit_attention(block, cut, (side, side), arch["num_heads"]), side, tiles, size)
        x = x + y
        y = _linear(block, "mlp.lin1", _layer_norm(block, "norm2", x, 1e-6))
        x = x + _linear(block, "mlp.lin2", F.gelu(y))
    return _neck(s, x.permute(0, 3, 1, 2))


def _vit_attention(s: State, x: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    q, k, v = torch.unflatten(_linear(s, "attn.qkv", x), 2, (3, heads, -1)).unbind(2)
    grid = torch.unflatten(q.transpose(1, 2), 2, size)
    along_h = torch.einsum("nmhwd,hkd->nmhwk", grid, _relative(s["attn.rel_pos_h"], size[0]))
    along_w = torch.einsum("nmhwd,wkd->nmhwk", grid, _relative(s["attn.rel_pos_w"], size[1]))
    bias = (along_h[..., :, None] + along_w[..., None, :]).flatten(4).flatten(2, 3)
    return _linear(s, "attn.proj", _attend(q, k, v, bias))


def _relative(table: Tensor, size: int) -> Tensor:
    axis = torch.arange(size, device=table.device)
    return table[axis[:, None] - axis[None, :] + size - 1]


def decode(
    state: State,
    embedding: Tensor,
    sparse: Tensor,
    image_pe: Tensor,
    no_mask: Tensor,
    *,
    multimask: bool | None = False,
) -> tuple[Tensor, Tensor]:
    """Masks (P, M, 4h, 4w) and their IoU for P prompts on one image (1, 256, h, w); multimask None: all four."""
    s = _below(state, "mask_decoder.")
    count, (height, width) = sparse.shape[0], embedding.shape[2:]
    outputs = torch.cat([s["iou_token.weight"], s["mask_tokens.weight"]])
    tokens = torch.cat([outputs.expand(count, -1, -1), sparse], 1)
    maps = torch.repeat_interleave(embedding, count, dim=0) + no_mask.view(1, -1, 1, 1)
    pe = torch.repeat_interleave(image_pe, count, dim=0).flatten(2).transpose(1, 2)
    queries, keys = _transformer(_below(s, "transformer."), tokens, maps.flatten(2).transpose(1, 2), pe)
    u = _below(s, "output_upscaling.")
    maps = keys.transpose(1, 2).view(count, 256, height, width)
    maps = F.gelu(_layer_norm_2d(u, "1", F.conv_transpose2d(maps, u["0.weight"], u["0.bias"], stride=2)))
    maps = F.gelu(F.conv_transpose2d(maps, u["3.weight"], u["3.bias"], stride=2))
    hyper = torch.stack([_mlp(s, f"output_hypernetworks_mlps.{i}", queries[:, 1 + i]) for i in range(4)], 1)
    masks = (hyper @ maps.flatten(2)).view(count, 4, 4 * height, 4 * width)
    chosen = {True: slice(1, 4), False: slice(0, 1), None: slice(0, 4)}[multimask]
    return masks[:, chosen], _mlp(s, "iou_prediction_head", queries[:, 0])[:, chosen]


def _transformer(s: State, tokens: Tensor, keys: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    queries = tokens
    for i in range(1 + max(int(name.split(".")[1]) for name in s if name.startswith("layers."))):
        b = _below(s, f"layers.{i}.")
        if i == 0:
            queries = _cross(b, "self_attn", queries, queries, queries)
        else:
            queries = queries + _cross(b, "self_attn", queries + tokens, queries + tokens, queries)
        queries = _layer_norm(b, "norm1", queries)
        queries = queries + _cross(b, "cross_attn_token_to_image", queries + tokens, keys + pe, keys)
        queries = _layer_norm(b, "norm2", queries)
        queries = queries + _linear(b, "mlp.lin2", F.relu(_linear(b, "mlp.lin1", queries)))
        queries = _layer_norm(b, "norm3", queries)
        keys = keys + _cross(b, "cross_attn_image_to_token", keys + pe, queries + tokens, queries)
        keys = _layer_norm(b, "norm4", keys)
    queries = queries + _cross(s, "final_attn_token_to_image", queries + tokens, keys + pe, keys)
    return _layer_norm(s, "norm_final_attn", queries), keys


def _cross(s: State, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (
        torch.unflatten(_linear(s, f"{name}.{x}_proj", y), 2, (8, -1)) for x, y in (("q", q), ("k", k), ("v", v))
    )
    return _linear(s, f"{name}.out_proj", _attend(q, k, v))


def _mlp(s: State, name: str, x: Tensor) -> Tensor:
    x = F.relu(_linear(s, f"{name}.layers.1", F.relu(_linear(s, f"{name}.layers.0", x))))
    return _linear(s, f"{name}.layers.2", x)
