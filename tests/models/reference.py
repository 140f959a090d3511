"""SAM the plain way: functions of a state_dict, step by step as the papers and upstream describe it.

Written for tests, with none of the package's short cuts: padding before projecting, image tokens repeated for every
prompt, positions added before each projection, transposed convolutions as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Mapping[str, Tensor]


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random values in every tensor, so that nothing hides behind the zeros of an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif name.endswith("gaussian_matrix"):
                tensor.copy_(noise)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise * (0.2 if tensor.ndim < 2 else 0.7 / math.sqrt(tensor[0].numel())))


def below(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def layer_norm(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def layer_norm_2d(s: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(s, name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)


def neck(s: State, x: Tensor) -> Tensor:
    x = layer_norm_2d(s, "neck.1", F.conv2d(x, s["neck.0.weight"]))
    return layer_norm_2d(s, "neck.3", F.conv2d(x, s["neck.2.weight"], padding=1))


def windows(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    tiles = [
        x[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
        for i, j in itertools.product(range(rows), range(columns))
    ]
    return torch.stack(tiles, 1).flatten(0, 1).flatten(1, 2), (rows, columns)


def unwindows(x: Tensor, side: int, tiles: tuple[int, int], size: tuple[int, int]) -> Tensor:
    grid = x.view(-1, *tiles, side, side, x.shape[-1])
    rows = [torch.cat([grid[:, i, j] for j in range(tiles[1])], 2) for i in range(tiles[0])]
    return torch.cat(rows, 1)[:, : size[0], : size[1]]


def vit(s: State, arch: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Embedding and the output of each block (B, C, h, w); `s` without the prefix `image_encoder.`."""
    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16)
    x = x.permute(0, 2, 3, 1) + s["pos_embed"]
    outputs = []
    for i in range(arch["depth"]):
        b = below(s, f"blocks.{i}.")
        size = (x.shape[1], x.shape[2])
        y = layer_norm(b, "norm1", x, 1e-6)
        if i in arch["global_attn_indexes"]:
            y = vit_attention(b, y.flatten(1, 2), size, arch["num_heads"]).view(x.shape)
        else:
            side = arch["window_size"]
            cut, tiles = windows(y, side)
            y = unwindows(vit_attention(b, cut, (side, side), arch["num_heads"]), side, tiles, size)
        x = x + y
        x = x + linear(b, "mlp.lin2", F.gelu(linear(b, "mlp.lin1", layer_norm(b, "norm2", x, 1e-6))))
        outputs.append(x.permute(0, 3, 1, 2))
    return neck(s, outputs[-1]), outputs


def vit_attention(b: State, x: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    q, k, v = linear(b, "attn.qkv", x).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    for row, column in itertools.product(range(size[0]), range(size[1])):
        token = q[:, :, row * size[1] + column]
        along_h = token @ b["attn.rel_pos_h"][[row - y + size[0] - 1 for y in range(size[0])]].T
        along_w = token @ b["attn.rel_pos_w"][[column - z + size[1] - 1 for z in range(size[1])]].T
        added = (along_h[..., :, None] + along_w[..., None, :]).flatten(2)
        scores[:, :, row * size[1] + column] = scores[:, :, row * size[1] + column] + added
    return linear(b, "attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def conv_bn(s: State, name: str, x: Tensor, stride: int = 1, training: bool = False) -> Tensor:
    weight = s[f"{name}.c.weight"]
    groups = weight.shape[0] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    statistics = (s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"])
    return F.batch_norm(x, *statistics, s[f"{name}.bn.weight"], s[f"{name}.bn.bias"], training=training)


def tiny_vit(s: State, arch: Mapping[str, Any], pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Embedding and the output of each block (B, C, h, w), merging not counted; in eval mode."""
    x = conv_bn(s, "patch_embed.seq.2", F.gelu(conv_bn(s, "patch_embed.seq.0", pixels, 2)), 2)
    outputs = []
    for i, depth in enumerate(arch["depths"]):
        for j in range(depth):
            b = below(s, f"layers.{i}.blocks.{j}.")
            if i == 0:
                y = F.gelu(conv_bn(b, "conv2", F.gelu(conv_bn(b, "conv1", x))))
                x = F.gelu(x + conv_bn(b, "conv3", y))
            else:
                x = tiny_vit_block(b, x, arch["window_sizes"][i], arch["num_heads"][i])
            outputs.append(x)
        if i < 3:
            d = below(s, f"layers.{i}.downsample.")
            y = F.gelu(conv_bn(d, "conv2", F.gelu(conv_bn(d, "conv1", x)), 2 if i < 2 else 1))
            x = conv_bn(d, "conv3", y)
    return neck(s, x), outputs


def tiny_vit_block(b: State, x: Tensor, side: int, heads: int) -> Tensor:
    tokens = x.permute(0, 2, 3, 1)
    cut, tiles = windows(tokens, side)
    cut = layer_norm(b, "attn.norm", cut)
    q, k, v = linear(b, "attn.qkv", cut).view(*cut.shape[:2], heads, -1).transpose(1, 2).chunk(3, -1)
    cells = list(itertools.product(range(side), range(side)))
    index = [[abs(a[0] - c[0]) * side + abs(a[1] - c[1]) for c in cells] for a in cells]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + b["attn.attention_biases"][:, index]
    y = linear(b, "attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    tokens = tokens + unwindows(y, side, tiles, (x.shape[2], x.shape[3]))
    tokens = conv_bn(b, "local_conv", tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = linear(b, "mlp.fc2", F.gelu(linear(b, "mlp.fc1", layer_norm(b, "mlp.norm", tokens))))
    return (tokens + y).permute(0, 3, 1, 2)


def positions(s: State, xy: Tensor) -> Tensor:
    matrix = s["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    angles = 2 * math.pi * ((2 * xy.to(matrix.dtype) - 1) @ matrix)
    return torch.cat([angles.sin(), angles.cos()], -1)


def sparse_embeddings(s: State, coords: Tensor, labels: Tensor, image_size: int) -> Tensor:
    rows = []
    for point, label in zip(coords.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label == -1:
            rows.append(s["prompt_encoder.not_a_point_embed.weight"][0])
        else:
            learnt = s[f"prompt_encoder.point_embeddings.{label}.weight"][0]
            rows.append(positions(s, (point + 0.5) / image_size) + learnt)
    return torch.stack(rows).view(*labels.shape, 256) if rows else torch.zeros(*labels.shape, 256)


def dense_embedding(s: State, mask: Tensor | None) -> Tensor:
    """(1, 256, h, w) of a mask, or (1, 256, 1, 1) of no mask."""
    if mask is None:
        return s["prompt_encoder.no_mask_embed.weight"].view(1, 256, 1, 1)
    d = below(s, "prompt_encoder.mask_downscaling.")
    for conv in ("0", "3"):
        mask = F.conv2d(mask, d[f"{conv}.weight"], d[f"{conv}.bias"], stride=2)
        mask = F.gelu(layer_norm_2d(d, str(int(conv) + 1), mask))
    return F.conv2d(mask, d["6.weight"], d["6.bias"])


def attention(b: State, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (
        linear(b, f"{name}.{x}_proj", y).unflatten(2, (8, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        for x, y in (("q", q), ("k", k), ("v", v))
    )
    out = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return linear(b, f"{name}.out_proj", out.transpose(1, 2).flatten(2))


def mlp3(s: State, name: str, x: Tensor) -> Tensor:
    x = F.relu(linear(s, f"{name}.layers.1", F.relu(linear(s, f"{name}.layers.0", x))))
    return linear(s, f"{name}.layers.2", x)


def decode_one(
    s: State, embedding: Tensor, coords: Tensor, labels: Tensor, *, mask: Tensor | None, image_size: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """One prompt on one image (1, 256, h, w): all four masks, IoUs, mask tokens, and the image streams."""
    h, w = embedding.shape[2:]
    cells = torch.tensor([[(x + 0.5) / w, (y + 0.5) / h] for y in range(h) for x in range(w)])
    pe = positions(s, cells)[None]
    sparse = sparse_embeddings(s, coords, labels, image_size)
    outputs = torch.cat([s["mask_decoder.iou_token.weight"], s["mask_decoder.mask_tokens.weight"]])[None]
    tokens = torch.cat([outputs, sparse], 1)
    keys = (embedding + dense_embedding(s, mask)).flatten(2).transpose(1, 2)
    queries, streams = tokens, [keys]
    t = below(s, "mask_decoder.transformer.")
    depth = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("layers."))
    for i in range(depth):
        b = below(t, f"layers.{i}.")
        if i == 0:
            queries = attention(b, "self_attn", queries, queries, queries)
        else:
            queries = queries + attention(b, "self_attn", queries + tokens, queries + tokens, queries)
        queries = layer_norm(b, "norm1", queries)
        queries = queries + attention(b, "cross_attn_token_to_image", queries + tokens, keys + pe, keys)
        queries = layer_norm(b, "norm2", queries)
        queries = queries + linear(b, "mlp.lin2", F.relu(linear(b, "mlp.lin1", queries)))
        queries = layer_norm(b, "norm3", queries)
        keys = keys + attention(b, "cross_attn_image_to_token", keys + pe, queries + tokens, queries)
        keys = layer_norm(b, "norm4", keys)
        streams.append(keys)
    queries = queries + attention(t, "final_attn_token_to_image", queries + tokens, keys + pe, keys)
    queries = layer_norm(t, "norm_final_attn", queries)
    u = below(s, "mask_decoder.output_upscaling.")
    image = keys.transpose(1, 2).reshape(1, 256, h, w)
    fine = F.gelu(layer_norm_2d(u, "1", F.conv_transpose2d(image, u["0.weight"], u["0.bias"], stride=2)))
    fine = F.gelu(F.conv_transpose2d(fine, u["3.weight"], u["3.bias"], stride=2))
    hyper = [mlp3(s, f"mask_decoder.output_hypernetworks_mlps.{i}", queries[:, 1 + i]) for i in range(4)]
    masks = torch.einsum("pmc,pchw->pmhw", torch.stack(hyper, 1), fine)
    iou = mlp3(s, "mask_decoder.iou_prediction_head", queries[:, 0])
    maps = [stream.transpose(1, 2).reshape(1, 256, h, w) for stream in streams]
    return masks, iou, queries[:, 1:5], maps


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest difference in units of the reference's largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the scale"
