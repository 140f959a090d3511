"""MobileSAM's image encoder: TinyViT, convolutions first and windowed attention after.

Wu et al. 2022 (TinyViT), arXiv:2207.10666; Zhang et al. 2023 (MobileSAM), arXiv:2306.14289. Names as upstream.
Maps stay channels-last all the way, so tokens (B, h, w, C) and maps (B, C, h, w) are views of each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.attention import attention_rows, biased_attention, cells_at, tokens_at, within_windows
from samlet.models.containers import module_list
from samlet.models.norms import Conv2dBN, neck
from samlet.models.windows import pad_to_multiple, partition, unpartition

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EXPANSION = 4  # of MBConv


class PatchEmbed(nn.Module):
    """Two strided convolutions: S x S pixels to a map at S/4."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.seq = nn.Sequential(Conv2dBN(3, half, 3, stride=2), nn.GELU(), Conv2dBN(half, embed_dim, 3, stride=2))

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C h w"]:
        """Embed overlapping patches."""
        maps: Tensor = self.seq(pixels)
        return maps


class MBConv(nn.Module):
    """Inverted bottleneck with a depthwise convolution and a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * EXPANSION
        self.conv1 = Conv2dBN(dim, hidden, 1)
        self.conv2 = Conv2dBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = Conv2dBN(hidden, dim, 1, bn_weight=0.0)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Widen, mix neighbours, narrow, add."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class PatchMerging(nn.Module):
    """Change the width, and halve the resolution unless `stride` is 1."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2dBN(dim, out_dim, 1)
        self.conv2 = Conv2dBN(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.conv3 = Conv2dBN(out_dim, out_dim, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h2 w2"]:
        """Widen, merge neighbours, mix."""
        out: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return out


class Attention(nn.Module):
    """Multi-head attention in a window with a learnt bias for each distance (|dy|, |dx|) and head.

    The bias is looked up whenever it is needed: a copy kept in eval mode, as upstream has it, goes stale.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))

    def project(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w 3C"]:
        """Queries, keys and values, side by side within each head."""
        out: Tensor = self.qkv(self.norm(x))
        return out

    def padded_token(self) -> Float[Tensor, "3C"]:
        """What a token of zeros projects to: LayerNorm makes its own bias of it."""
        out: Tensor = self.qkv(self.norm.bias)
        return out

    def attend(self, qkv: Float[Tensor, "n L 3C"]) -> Float[Tensor, "n L C"]:
        """Attention within each of n windows, from projected tokens."""
        n, length, channels = qkv.shape
        q, k, v = qkv.view(n, length, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        out = biased_attention(q, k, v, self.bias().to(q.dtype)[None])
        return out.transpose(1, 2).reshape(n, length, channels // 3)

    def rows(self, x: Float[Tensor, "B h w C"], places: Float[Tensor, "B Q 2"]) -> Float[Tensor, "B H Q h w"]:
        """The rows of the attention matrix at some places, over the whole map; 0 outside a place's window."""
        size = (x.shape[1], x.shape[2])
        cells, normed = cells_at(places, size), self.norm(x)
        weight = torch.unflatten(self.qkv.weight, 0, (self.num_heads, 3, -1))
        shift = torch.unflatten(self.qkv.bias, 0, (self.num_heads, 3, -1))
        q = F.linear(tokens_at(normed, cells), weight[:, 0].flatten(0, 1), shift[:, 0].flatten())
        k = F.linear(normed, weight[:, 1].flatten(0, 1), shift[:, 1].flatten())
        down, across, seen = within_windows(cells, size, self.window)
        index = down.abs()[..., :, None] * self.window + across.abs()[..., None, :]
        bias = self.attention_biases[:, index].transpose(0, 1).to(q.dtype)
        heads = (self.num_heads, -1)
        return attention_rows(torch.unflatten(q, 2, heads).transpose(1, 2), torch.unflatten(k, 3, heads), bias, seen)

    def bias(self) -> Float[Tensor, "H L L"]:
        """attention_biases[head, |dy| * window + |dx|] for every pair of tokens."""
        axis = torch.arange(self.window, device=self.attention_biases.device)
        distance = (axis[:, None] - axis[None, :]).abs()
        index = distance[:, None, :, None] * self.window + distance[None, :, None, :]
        return self.attention_biases[:, index.reshape(self.window**2, self.window**2)]


class Mlp(nn.Module):
    """LayerNorm, then two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Apply to each token by itself."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class TinyViTBlock(nn.Module):
    """Window attention, depthwise convolution, MLP."""

    def __init__(self, dim: int, num_heads: int, window: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, window)
        self.mlp = Mlp(dim, hidden)
        self.local_conv = Conv2dBN(dim, dim, 3, groups=dim)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Attention and MLP added to their inputs, the convolution between them."""
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.attn.proj(self._attend(tokens))
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = tokens + self.mlp(tokens)
        return out.permute(0, 3, 1, 2)

    def attention_rows(self, x: Float[Tensor, "B C h w"], places: Float[Tensor, "B Q 2"]) -> Float[Tensor, "B H Q h w"]:
        """What some places of the block's input look at; computed beside `forward`, which never sees its weights."""
        return self.attn.rows(x.permute(0, 2, 3, 1), places)

    def _attend(self, tokens: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        window = self.attn.window
        size = (tokens.shape[1], tokens.shape[2])
        qkv = self.attn.project(tokens)
        if size[0] % window or size[1] % window:
            qkv = pad_to_multiple(qkv, window, self.attn.padded_token())
        return unpartition(self.attn.attend(partition(qkv, window)), window, size)


class Layer(nn.Module):
    """Blocks of one width, then the merging to the next."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = module_list(blocks)
        self.downsample = downsample


class TinyViT(nn.Module):
    """S x S pixels to a map at S/16; any S that is a multiple of 16, with the same weights."""

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_sizes: Sequence[int],
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dims[0])
        layers = []
        for i, dim in enumerate(embed_dims):
            hidden = int(dim * mlp_ratio + 1e-6)
            blocks: list[nn.Module] = [
                MBConv(dim) if i == 0 else TinyViTBlock(dim, num_heads[i], window_sizes[i], hidden)
                for _ in range(depths[i])
            ]
            merging = PatchMerging(dim, embed_dims[i + 1], 2 if i < 2 else 1) if i < 3 else None
            layers.append(Layer(blocks, merging))
        self.layers = module_list(layers)
        # The classifier of TinyViT's pretraining: never used, but strict loaders of mobile_sam.pt ask for it.
        self.norm_head = nn.LayerNorm(embed_dims[-1]).requires_grad_(False)
        self.head = nn.Linear(embed_dims[-1], num_classes).requires_grad_(False) if num_classes else nn.Identity()
        self.apply(_init_linear)
        self.neck = neck(embed_dims[-1])
        self.block_channels = [dim for dim, depth in zip(embed_dims, depths, strict=True) for _ in range(depth)]
        self.attending = list(range(depths[0], sum(depths)))

    def forward(
        self,
        pixels: Float[Tensor, "B 3 S S"],
        wanted: Collection[str] = (),
        places: Float[Tensor, "B Q 2"] | None = None,
    ) -> tuple[Float[Tensor, "B C h w"], dict[str, Tensor]]:
        """The last block's map, before the neck, and what is `wanted`.

        `blocks.N` is the output of a block, counted through all layers, `attention.N` the rows of its attention at
        some `places`.
        """
        x = self.patch_embed(pixels.contiguous(memory_format=torch.channels_last))
        seen: dict[str, Tensor] = {}
        index = 0
        for layer in self.layers:
            for block in layer.blocks:
                if isinstance(block, TinyViTBlock) and places is not None and f"attention.{index}" in wanted:
                    seen[f"attention.{index}"] = block.attention_rows(x, places)
                x = block(x)
                if f"blocks.{index}" in wanted:
                    seen[f"blocks.{index}"] = x
                index += 1
            if layer.downsample is not None:
                x = layer.downsample(x)
        return x, seen


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
