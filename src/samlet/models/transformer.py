"""The two-way transformer between prompt tokens and image; the image stream is one row until prompts differ in it.

arXiv:2304.02643, appendix A; names as upstream. Before the first layer has written into the image stream, it is
the same for all prompts of an image (unless they carry masks), and nothing is computed from it twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.containers import module_list

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

ATTENTIONS = ("self", "token_to_image", "image_to_token")  # of a layer, in their order


class Attention(nn.Module):
    """Multi-head attention that works in `dim / downsample` channels, h heads of d each.

    Between a few tokens and a whole image the image's projections are not computed: W moves to the tokens' side,
    q_h (K W_h)^T = (q_h W_h^T) K^T and A_h (V W_h) = (A_h V) W_h. The same function for half of the arithmetic and
    without any tensor of the image's size but the scores.
    """

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
        self, q: Float[Tensor, "P N C"], k: Float[Tensor, "P M C"], v: Float[Tensor, "P M C"], mask: Tensor | None
    ) -> Float[Tensor, "P N C"]:
        """Attention of q to the tokens of k where `mask` (P, 1, 1, M) is True."""
        q, k, v = self._heads(self.q_proj(q)), self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
        return self._merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def weights(
        self, q: Float[Tensor, "P N C"], k: Float[Tensor, "P M C"], mask: Tensor | None
    ) -> Float[Tensor, "P h N M"]:
        """What `forward` weighs v with, which a fused kernel never shows; a row sums to 1."""
        scores = self._heads(self.q_proj(q)) * self._scale @ self._heads(self.k_proj(k)).transpose(2, 3)
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def read(
        self,
        tokens: Float[Tensor, "P N C"],
        image_k: Float[Tensor, "#P L C"],
        image_v: Float[Tensor, "#P L C"],
        keep: bool = False,
    ) -> tuple[Float[Tensor, "P N C"], Float[Tensor, "P h N L"] | None]:
        """Attention of tokens to the image, and its weights if they are to `keep`.

        An image side of one row is that of all prompts.
        """
        q = self._heads(self.q_proj(tokens)) * self._scale
        shift = q @ self._of_heads(self.k_proj.bias)[..., None].to(q.dtype)
        weights = compare(through(q, self._of_heads(self.k_proj.weight)), image_k, shift).softmax(dim=-1)
        seen = through(combine(weights, image_v), self._of_heads(self.v_proj.weight).transpose(1, 2))
        return self._merged(seen + self._of_heads(self.v_proj.bias)[:, None]), weights if keep else None

    def write(
        self,
        image_q: Float[Tensor, "#P L C"],
        tokens_k: Float[Tensor, "P N C"],
        tokens_v: Float[Tensor, "P N C"],
        mask: Bool[Tensor, "P 1 1 N"] | None = None,
        keep: bool = False,
    ) -> tuple[Float[Tensor, "P L C"], Float[Tensor, "P h L N"] | None]:
        """Attention of the image to the tokens where `mask` is True, and its weights if they are to `keep`."""
        k, v = self._heads(self.k_proj(tokens_k)) * self._scale, self._heads(self.v_proj(tokens_v))
        shift = k @ self._of_heads(self.q_proj.bias)[..., None].to(k.dtype)
        if mask is not None:
            shift = shift.masked_fill(~mask.transpose(2, 3), -torch.inf)
        weights = compare(through(k, self._of_heads(self.q_proj.weight)), image_q, shift).softmax(dim=2)
        # The weights of a head sum to 1, so the bias, shared among the heads' values, comes out as it went in.
        written = through(v, self._of_heads(self.out_proj.weight.t())) + self.out_proj.bias / self.num_heads
        out: Tensor = weights.flatten(1, 2).transpose(1, 2) @ written.flatten(1, 2)
        return out, weights.transpose(2, 3) if keep else None

    @property
    def _scale(self) -> float:
        return math.sqrt(self.num_heads / self.q_proj.out_features)

    def _heads(self, x: Float[Tensor, "P N c"]) -> Float[Tensor, "P h N d"]:
        return torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)

    def _of_heads(self, weight: Float[Tensor, "c *rest"]) -> Float[Tensor, "h d *rest"]:
        return torch.unflatten(weight, 0, (self.num_heads, -1))

    def _merged(self, heads: Float[Tensor, "P h N d"]) -> Float[Tensor, "P N C"]:
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out


def through(x: Float[Tensor, "P h N a"], weight: Float[Tensor, "h a b"]) -> Float[Tensor, "P h N b"]:
    """Each head's rows times its own matrix."""
    return torch.einsum("phna,hab->phnb", x, weight)


def compare(
    rows: Float[Tensor, "P h N C"], image: Float[Tensor, "#P L C"], shift: Float[Tensor, "P h N 1"]
) -> Float[Tensor, "P h N L"]:
    """Dot products with the image's tokens, plus `shift`; one product of matrices where all prompts see one image."""
    shift = shift.to(rows.dtype)
    if image.shape[0] == 1:
        flat = torch.addmm(shift.flatten(0, 2), rows.flatten(0, 2), image[0].to(rows.dtype).t())
        return torch.unflatten(flat, 0, rows.shape[:3])
    flat = torch.baddbmm(shift.flatten(1, 2), rows.flatten(1, 2), image.to(rows.dtype).transpose(1, 2))
    return torch.unflatten(flat, 1, rows.shape[1:3])


def combine(weights: Float[Tensor, "P h N L"], image: Float[Tensor, "#P L C"]) -> Float[Tensor, "P h N C"]:
    """Sums of the image's tokens."""
    if image.shape[0] == 1:
        return torch.unflatten(weights.flatten(0, 2) @ image[0], 0, weights.shape[:3])
    return torch.unflatten(weights.flatten(1, 2) @ image, 1, weights.shape[1:3])


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

    def forward(
        self,
        queries: Float[Tensor, "P N C"],
        image: Float[Tensor, "#P L C"],
        image_pe: Float[Tensor, "L C"],
        query_pe: Float[Tensor, "P N C"],
        mask: Tensor | None,
        *,
        kept: Collection[str] = (),
    ) -> tuple[Float[Tensor, "P N C"], Float[Tensor, "P L C"], dict[str, Tensor | None]]:
        """Updated tokens and image stream, and of its attention maps (`ATTENTIONS`) those to be `kept`.

        `mask` (P, 1, 1, N) is False where a token is a hole.
        """
        q = queries if self.is_first else queries + query_pe
        of_self = self.self_attn.weights(q, q, mask) if "self" in kept else None
        mixed = self.self_attn(q, q, queries, mask)
        queries = self.norm1(mixed if self.is_first else queries + mixed)
        placed = image + image_pe
        read, looked = self.cross_attn_token_to_image.read(
            queries + query_pe, placed, image, keep="token_to_image" in kept
        )
        queries = self.norm2(queries + read)
        queries = self.norm3(queries + self.mlp(queries))
        written, heard = self.cross_attn_image_to_token.write(
            placed, queries + query_pe, queries, mask, keep="image_to_token" in kept
        )
        maps = {"self": of_self, "token_to_image": looked, "image_to_token": heard}
        return queries, self.norm4(image + written), maps


class Transformed(NamedTuple):
    """What comes out of the two-way transformer."""

    tokens: Float[Tensor, "P N C"]  # after the last attention
    streams: list[Float[Tensor, "#P L C"]]  # the image stream before the first layer and after each
    attention: dict[str, Tensor]  # the maps asked for

    def take(self, rows: Bool[Tensor, "P"]) -> Transformed:
        """Some of the prompts; a stream of one row for several prompts stays that of all."""
        shared = len(rows) > 1
        streams = [stream if shared and stream.shape[0] == 1 else stream[rows] for stream in self.streams]
        return Transformed(self.tokens[rows], streams, {name: value[rows] for name, value in self.attention.items()})


class TwoWayTransformer(nn.Module):
    """Layers of TwoWayAttentionBlock, then a last look of the tokens at the image."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = module_list(TwoWayAttentionBlock(dim, num_heads, mlp_dim, is_first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Float[Tensor, "P N C"],
        image: Float[Tensor, "#P L C"],
        image_pe: Float[Tensor, "L C"],
        present: Bool[Tensor, "P N"] | None = None,
        kept: Collection[str] = (),
    ) -> Transformed:
        """Tokens and image streams, and of the attention maps (`attention_names`) those to be `kept`."""
        mask = None if present is None else present[:, None, None, :]
        queries, streams = tokens, [image]
        found: dict[str, Tensor | None] = {}
        for number, layer in enumerate(self.layers):
            own = [kind for kind in ATTENTIONS if f"{number}.{kind}" in kept]
            queries, keys, maps = layer(queries, streams[-1], image_pe, tokens, mask, kept=own)
            streams.append(keys)
            found |= {f"{number}.{kind}": value for kind, value in maps.items()}
        seen, found["final"] = self.final_attn_token_to_image.read(
            queries + tokens, streams[-1] + image_pe, streams[-1], keep="final" in kept
        )
        attention = {name: value for name, value in found.items() if value is not None}
        return Transformed(self.norm_final_attn(queries + seen), streams, attention)

    def attention_names(self) -> tuple[str, ...]:
        """Its attention maps: three a layer, and the last look at the image."""
        return (*(f"{number}.{kind}" for number in range(len(self.layers)) for kind in ATTENTIONS), "final")
