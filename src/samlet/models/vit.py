"""SAM's image encoder: a plain ViT with windowed and global attention and decomposed relative positions.

Kirillov et al. 2023, arXiv:2304.02643; Li et al. 2022 (ViTDet), arXiv:2203.16527. Names of parameters as upstream.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.attention import attention_rows, cells_at, positioned_attention, tokens_at, within_windows
from samlet.models.containers import module_list
from samlet.models.norms import neck
from samlet.models.windows import pad_to_multiple, partition, unpartition

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PATCH = 16


class PatchEmbed(nn.Module):
    """Non-overlapping 16 x 16 patches to tokens."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, PATCH, PATCH)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B h w C"]:
        """One token for each patch."""
        maps: Tensor = self.proj(pixels)
        return maps.permute(0, 2, 3, 1).contiguous()


def relative_positions(table: Float[Tensor, "2n-1 d"], size: int) -> Float[Tensor, "n n d"]:
    """The table's row for every pair (query, key) along one axis: row q - k + n - 1."""
    axis = torch.arange(size, device=table.device)
    return table[axis[:, None] - axis[None, :] + size - 1]


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions: softmax(q k / sqrt(d) + q R_h + q R_w) v."""

    def __init__(self, embed_dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, embed_dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, embed_dim // num_heads))

    def attend(self, qkv: Float[Tensor, "n L 3C"], size: tuple[int, int]) -> Float[Tensor, "n L C"]:
        """Attention within each of n windows (or images) of `size` tokens, from projected tokens."""
        n, length, channels = qkv.shape
        heads = qkv.view(n, length, 3, self.num_heads, channels // 3 // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        out = positioned_attention(q, k, v, *self.along_axes(q, size))
        return out.transpose(1, 2).reshape(n, length, channels // 3)

    def rows(
        self, tokens: Float[Tensor, "B h w C"], places: Float[Tensor, "B Q 2"], window: int
    ) -> Float[Tensor, "B H Q h w"]:
        """The rows of the attention matrix at some places, over the whole map; 0 outside a place's window."""
        size = (tokens.shape[1], tokens.shape[2])
        cells = cells_at(places, size)
        of_q, of_k, _ = self.qkv.weight.chunk(3)
        bias_q, bias_k, _ = self.qkv.bias.chunk(3)
        q = torch.unflatten(F.linear(tokens_at(tokens, cells), of_q, bias_q), 2, (self.num_heads, -1)).transpose(1, 2)
        k = torch.unflatten(F.linear(tokens, of_k, bias_k), 3, (self.num_heads, -1))
        down, across, seen = within_windows(cells, size, window)
        along_h = self._along(q, self.rel_pos_h, down + (window or size[0]) - 1)
        along_w = self._along(q, self.rel_pos_w, across + (window or size[1]) - 1)
        return attention_rows(q, k, along_h[..., :, None] + along_w[..., None, :], seen)

    @staticmethod
    def _along(q: Float[Tensor, "B H Q d"], table: Float[Tensor, "2n-1 d"], index: Tensor) -> Float[Tensor, "B H Q n"]:
        return torch.einsum("bmqd,bqnd->bmqn", q, table[index].to(q.dtype))

    def along_axes(
        self, q: Float[Tensor, "n H L d"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "n H L h"], Float[Tensor, "n H L w"]]:
        """What each query adds to the scores of the keys of every row, and of every column."""
        grid = torch.unflatten(q, 2, size)
        along_h = torch.einsum("nmhwd,hkd->nmhwk", grid, relative_positions(self.rel_pos_h, size[0]).to(q.dtype))
        along_w = torch.einsum("nmhwd,wkd->nmhwk", grid, relative_positions(self.rel_pos_w, size[1]).to(q.dtype))
        return along_h.flatten(2, 3), along_w.flatten(2, 3)


class MLPBlock(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embed_dim, hidden)
        self.lin2 = nn.Linear(hidden, embed_dim)

    def forward(self, tokens: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Apply to each token by itself."""
        out: Tensor = self.lin2(F.gelu(self.lin1(tokens)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; attention in windows, or over the whole map where `window` is 0."""

    def __init__(self, embed_dim: int, num_heads: int, hidden: int, window: int, grid: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, window or grid)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLPBlock(embed_dim, hidden)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Attention and MLP, each added to its input."""
        x = x + self.attn.proj(self._attend(self.attn.qkv(self.norm1(x))))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attention_rows(self, x: Float[Tensor, "B h w C"], places: Float[Tensor, "B Q 2"]) -> Float[Tensor, "B H Q h w"]:
        """What some places of the block's input look at; computed beside `forward`, which never sees its weights."""
        return self.attn.rows(self.norm1(x), places, self.window)

    def _attend(self, qkv: Float[Tensor, "B h w 3C"]) -> Float[Tensor, "B h w C"]:
        size = (qkv.shape[1], qkv.shape[2])
        if self.window == 0:
            return torch.unflatten(self.attn.attend(qkv.flatten(1, 2), size), 1, size)
        windows = partition(pad_to_multiple(qkv, self.window, self.attn.qkv.bias), self.window)
        return unpartition(self.attn.attend(windows, (self.window, self.window)), self.window, size)


class ImageEncoderViT(nn.Module):
    """S x S pixels to the image embedding at S/16."""

    def __init__(
        self,
        image_size: int,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: Sequence[int],
        window_size: int = 14,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        grid = image_size // PATCH
        hidden = int(embed_dim * mlp_ratio + 1e-6)
        self.patch_embed = PatchEmbed(embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim))
        self.blocks = module_list(
            Block(embed_dim, num_heads, hidden, 0 if i in global_attn_indexes else window_size, grid)
            for i in range(depth)
        )
        self.neck = neck(embed_dim)
        self.block_channels = [embed_dim] * depth
        self.attending = list(range(depth))

    def forward(
        self,
        pixels: Float[Tensor, "B 3 S S"],
        wanted: Collection[str] = (),
        places: Float[Tensor, "B Q 2"] | None = None,
    ) -> tuple[Float[Tensor, "B C h w"], dict[str, Tensor]]:
        """The last block's map, before the neck, and what is `wanted`.

        `blocks.N` is the output of a block, `attention.N` the rows of its attention at some `places`.
        """
        x = self.patch_embed(pixels) + self.pos_embed
        seen = {}
        for index, block in enumerate(self.blocks):
            if places is not None and f"attention.{index}" in wanted:
                seen[f"attention.{index}"] = block.attention_rows(x, places)
            x = block(x)
            if f"blocks.{index}" in wanted:
                seen[f"blocks.{index}"] = x.permute(0, 3, 1, 2)
        return x.permute(0, 3, 1, 2), seen
