"""SAM's prompt encoder: points, box corners and masks to embeddings. arXiv:2304.02643; names as upstream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.containers import module_list
from samlet.models.norms import LayerNorm2d
from samlet.types import PADDING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

EMBED_DIM = 256


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of positions (Tancik et al. 2020, arXiv:2006.10739)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_features))

    def forward(self, positions: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch C"]:
        """(sin, cos)(2 pi (2 p - 1) G) of positions p = (x, y) in 0..1; in float32 at least, also under autocast.

        A frequency times a rounded position is another position: half precision would move clicks by pixels.
        """
        with torch.autocast(positions.device.type, enabled=False):
            matrix = _at_least_float32(self.positional_encoding_gaussian_matrix)
            angles = 2 * math.pi * ((2 * positions.to(matrix.dtype) - 1) @ matrix)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, size: tuple[int, int]) -> Float[Tensor, "h w C"]:
        """The encoding of the centres of an h x w grid's cells."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(size[0], device=device) + 0.5) / size[0]
        x = (torch.arange(size[1], device=device) + 0.5) / size[1]
        positions = torch.stack([x[None, :].expand(size), y[:, None].expand(size)], dim=-1)
        encoding: Tensor = self(positions)
        return encoding


class PromptEncoder(nn.Module):
    """Sparse embeddings of points and box corners, dense embeddings of masks."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.pe_layer = PositionEmbeddingRandom(EMBED_DIM // 2)
        self.point_embeddings = module_list(nn.Embedding(1, EMBED_DIM) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, EMBED_DIM)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            LayerNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, EMBED_DIM, 1),
        )
        self.no_mask_embed = nn.Embedding(1, EMBED_DIM)

    def sparse_embeddings(self, coords: Float[Tensor, "P T 2"], labels: Int[Tensor, "P T"]) -> Float[Tensor, "P T 256"]:
        """Position (of the pixel's centre) plus the learnt embedding of the label; padding has no position."""
        position = self.pe_layer((_at_least_float32(coords) + 0.5) / self.image_size)
        position = torch.where((labels == PADDING)[..., None], 0.0, position)
        table = torch.cat([self.not_a_point_embed.weight, *(kind.weight for kind in self.point_embeddings)])
        return position + F.embedding(labels.long() + 1, table)

    def dense_embeddings(self, mask_input: Float[Tensor, "P 1 hm wm"]) -> Float[Tensor, "P 256 h w"]:
        """Embeddings of low-res masks (logits), at a quarter of their resolution."""
        out: Tensor = self.mask_downscaling(mask_input)
        return out

    def get_dense_pe(self, size: tuple[int, int]) -> Float[Tensor, "1 256 h w"]:
        """Positional encoding of the image embedding's grid."""
        return self.pe_layer.grid(size).permute(2, 0, 1)[None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
