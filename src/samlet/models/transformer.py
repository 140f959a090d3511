"""The two-way transformer between prompt tokens and image, with the image's share computed once for its prompts.

arXiv:2304.02643, appendix A; names as upstream. Two identities save work without changing the function:
W(keys + pe) = W keys + W pe, whose second term is the same for all prompts; and before the first layer has
written into the image stream, the stream itself is the same for all prompts of an image (unless they carry masks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.containers import module_list

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Attention(nn.Module):
    """Multi-head attention that works in `dim / downsample` channels."""

    def __init__(self, dim: int, num_heads: int, downsample: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = dim // downsample
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)
        # Tied at the start, queries and keys agree where positions do: a fresh decoder looks where its prompt points.
        nn.init.normal_(self.k_proj.weight, std=dim**-0.5)
        with torch.no_grad():
            self.q_proj.weight.copy_(self.k_proj.weight)

    def forward(
        self, q: Float[Tensor, "P N C"], k: Float[Tensor, "P L C"], v: Float[Tensor, "P L C"], mask: Tensor | None
    ) -> Float[Tensor, "P N C"]:
        """Attention of q to the tokens of k where `mask` is True."""
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), mask)

    def attend(
        self,
        q: Float[Tensor, "P N c"],
        k: Float[Tensor, "P L c"],
        v: Float[Tensor, "P L c"],
        mask: Bool[Tensor, "P 1 1 L"] | None = None,
    ) -> Float[Tensor, "P N C"]:
        """Attention from projected queries, keys and values."""
        q, k, v = (torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out


def offset(projection: nn.Linear, image_pe: Float[Tensor, "L C"]) -> Float[Tensor, "L c"]:
    """W pe: what the positional encoding adds to the projection of the image stream."""
    out: Tensor = projection(image_pe) - projection.bias
    return out


class ImageSide(NamedTuple):
    """The image stream before a layer and what the layer's two cross-attentions need of it; n images or prompts."""

    keys: Float[Tensor, "n L C"]
    k: Float[Tensor, "n L c"]
    v: Float[Tensor, "n L c"]
    q: Float[Tensor, "n L c"]

    def rows(self, index: Int[Tensor, "P"]) -> ImageSide:
        """One row for each prompt; views, where all are of one image."""
        return ImageSide(*(rows(x, index) for x in self))


def rows(x: Tensor, index: Int[Tensor, "P"]) -> Tensor:
    """x[index], as a view where x has a single row."""
    return x.expand(index.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x.index_select(0, index)


class MLPBlock(nn.Module):
    """Two linear layers with ReLU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "P N C"]) -> Float[Tensor, "P N C"]:
        """Apply to each token by itself."""
        out: Tensor = self.lin2(F.relu(self.lin1(tokens)))
        return out


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample=2)

    def offsets(self, image_pe: Float[Tensor, "L C"]) -> tuple[Float[Tensor, "L c"], Float[Tensor, "L c"]]:
        """The positional terms of the image's keys and queries."""
        return (
            offset(self.cross_attn_token_to_image.k_proj, image_pe),
            offset(self.cross_attn_image_to_token.q_proj, image_pe),
        )

    def image_side(self, keys: Float[Tensor, "n L C"], offsets: tuple[Tensor, ...]) -> ImageSide:
        """Project the image stream for both cross-attentions."""
        reader, writer = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        k, q = reader.k_proj(keys) + offsets[0], writer.q_proj(keys) + offsets[1]
        return ImageSide(keys, k, reader.v_proj(keys), q)

    def forward(
        self, queries: Float[Tensor, "P N C"], image: ImageSide, query_pe: Float[Tensor, "P N C"], mask: Tensor | None
    ) -> tuple[Float[Tensor, "P N C"], Float[Tensor, "P L C"]]:
        """Updated tokens and image stream; `mask` (P, 1, 1, N) is False where a token is a hole."""
        if self.is_first:
            queries = self.self_attn(queries, queries, queries, mask)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, mask)
        queries = self.norm1(queries)
        reader, writer = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        queries = self.norm2(queries + reader.attend(reader.q_proj(queries + query_pe), image.k, image.v))
        queries = self.norm3(queries + self.mlp(queries))
        k, v = writer.k_proj(queries + query_pe), writer.v_proj(queries)
        return queries, self.norm4(image.keys + writer.attend(image.q, k, v, mask))


class TwoWayTransformer(nn.Module):
    """Layers of TwoWayAttentionBlock, then a last look of the tokens at the image."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = module_list(TwoWayAttentionBlock(dim, num_heads, mlp_dim, is_first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def offsets(self, image_pe: Float[Tensor, "L C"]) -> list[tuple[Tensor, ...]]:
        """All positional terms of the image side: one entry a layer, and one for the last attention."""
        layers = [layer.offsets(image_pe) for layer in self.layers]
        return [*layers, (offset(self.final_attn_token_to_image.k_proj, image_pe),)]

    def enter(self, keys: Float[Tensor, "n L C"], offsets: list[tuple[Tensor, ...]]) -> ImageSide:
        """The image side of the first layer: for each image, or for each prompt that brings a mask."""
        return self.layers[0].image_side(keys, offsets[0])

    def forward(
        self,
        tokens: Float[Tensor, "P N C"],
        image: ImageSide,
        offsets: list[tuple[Tensor, ...]],
        present: Bool[Tensor, "P N"] | None = None,
    ) -> tuple[Float[Tensor, "P N C"], list[Float[Tensor, "P L C"]]]:
        """The tokens after the last attention, and the image stream before the first and after each layer."""
        mask = None if present is None else present[:, None, None, :]
        queries, streams = tokens, [image.keys]
        for index, layer in enumerate(self.layers):
            if index:
                image = layer.image_side(streams[-1], offsets[index])
            queries, keys = layer(queries, image, tokens, mask)
            streams.append(keys)
        last = self.final_attn_token_to_image
        k, v = last.k_proj(streams[-1]) + offsets[-1][0], last.v_proj(streams[-1])
        queries = self.norm_final_attn(queries + last.attend(last.q_proj(queries + tokens), k, v))
        return queries, streams
