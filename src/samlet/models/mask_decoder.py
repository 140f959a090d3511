"""SAM's mask decoder: image embedding and prompt embeddings to masks and their estimated IoU. arXiv:2304.02643.

Everything runs on channels-last tokens; the two upscaling steps, transposed convolutions whose stride is their
kernel, are linear layers that make 2 x 2 sub-pixels of each token, and only the masks themselves, M channels wide, are
put in the order of pixels at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.containers import module_list
from samlet.models.norms import LayerNorm2d
from samlet.models.transformer import Transformed, TwoWayTransformer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

DIM = 256
NUM_HEADS = 8
NUM_MASKS = 4  # the single mask, then three for ambiguous prompts
PROMPTED, ATTENTION = "prompted.", "attention."  # how taps of image streams and attention maps are called
UPSCALED, HYPERNETWORKS = "upscaled", "hypernetworks"
CHUNK_TOKENS = 8192  # of image streams that a CPU decodes at a time: they then fit its cache


class MLP(nn.Module):
    """Three linear layers with ReLU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs, hidden, hidden, outputs]
        self.layers = module_list(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Raw outputs: no activation after the last layer."""
        first, second, last = self.layers
        out: Tensor = last(F.relu(second(F.relu(first(x)))))
        return out


class Embedded(NamedTuple):
    """Prompts as embeddings. `dense` None: no mask prompt, the same `no_mask` everywhere."""

    image_index: Int[Tensor, "P"]
    sparse: Float[Tensor, "P T 256"]
    present: Bool[Tensor, "P T"] | None
    dense: Float[Tensor, "P 256 h w"] | None

    def chunks(self, size: int) -> list[Embedded]:
        """Rows in groups of at most `size`."""
        starts = range(0, self.image_index.shape[0], size)
        return [self._replace(**self._rows(slice(start, start + size))) for start in starts]

    def _rows(self, rows: slice) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in self._asdict().items() if value is not None}


class Decoded(NamedTuple):
    """Answers to P prompts: the masks asked for, all IoU estimates, mask tokens and the taps asked for.

    `kept`: of all prompts, those that the rows answer, where some were to be left out.
    """

    masks: Float[Tensor, "P M H W"]
    iou: Float[Tensor, "P 4"]
    mask_tokens: Float[Tensor, "P 4 256"]
    taps: list[Float[Tensor, "P *shape"]]
    kept: Bool[Tensor, "P"] | None


class MaskDecoder(nn.Module):
    """Two-way transformer, upscaling, and a hypernetwork for each mask."""

    def __init__(self, depth: int = 2, mlp_dim: int = 2048) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(depth, DIM, NUM_HEADS, mlp_dim)
        self.iou_token = nn.Embedding(1, DIM)
        self.mask_tokens = nn.Embedding(NUM_MASKS, DIM)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(DIM, DIM // 4, 2, 2),
            LayerNorm2d(DIM // 4),
            nn.GELU(),
            nn.ConvTranspose2d(DIM // 4, DIM // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = module_list(MLP(DIM, DIM, DIM // 8) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(DIM, DIM, NUM_MASKS)

    def forward(
        self,
        embedding: Float[Tensor, "B 256 h w"],
        no_mask: Float[Tensor, "256"],
        image_pe: Float[Tensor, "1 256 h w"],
        prompts: Embedded,
        *,
        masks: slice,
        taps: Sequence[str] = (),
        min_iou: float | None = None,
    ) -> Decoded:
        """Decode all prompts of all images; `masks` chooses which of the four, `taps` (`tap_names`) what else.

        Prompts with no mask of an estimate above `min_iou` are left out before anything is upscaled.
        On a CPU, where no gradient is wanted, a few prompts at a time: the same answers, out of the cache.
        """
        grid = (embedding.shape[2], embedding.shape[3])
        tokens = embedding.flatten(2).transpose(1, 2).contiguous()
        pe = image_pe.flatten(2).transpose(1, 2)[0]
        shared = tokens + no_mask
        shown = [name.removeprefix(ATTENTION) for name in taps if name.startswith(ATTENTION)]

        def decode(part: Embedded) -> Decoded:
            if part.dense is None:
                image = rows(shared, part.image_index)
            else:
                image = rows(tokens, part.image_index) + part.dense.flatten(2).transpose(1, 2)
            seen = self.transformer(self._tokens(part), image, pe, self._present(part), shown)
            iou, kept = self.iou_prediction_head(seen.tokens[:, 0]), None
            if min_iou is not None:
                kept = (iou[:, masks] > min_iou).any(dim=1)
                seen, iou = seen.take(kept), iou[kept]
            mask_tokens = seen.tokens[:, 1 : 1 + NUM_MASKS]
            vectors, finest = self._hypernetworks(mask_tokens, masks), self._upscaled(seen.streams[-1])
            return Decoded(
                in_pixels(finest.flatten(1, -2) @ vectors, grid),
                iou,
                mask_tokens,
                [tapped(name, seen, vectors, finest, grid) for name in taps],
                kept,
            )

        chunked = embedding.device.type == "cpu" and not torch.is_grad_enabled()
        count = max(CHUNK_TOKENS // (grid[0] * grid[1]), 1)
        if not chunked or torch.compiler.is_compiling() or len(prompts.image_index) <= count:
            return decode(prompts)
        return _join([decode(part) for part in prompts.chunks(count)])

    def tap_names(self) -> tuple[str, ...]:
        """What `forward` can return besides its answers."""
        streams = (f"{PROMPTED}{layer}" for layer in range(len(self.transformer.layers) + 1))
        maps = (f"{ATTENTION}{name}" for name in self.transformer.attention_names())
        return (*streams, *maps, UPSCALED, HYPERNETWORKS)

    def _tokens(self, prompts: Embedded) -> Float[Tensor, "P N 256"]:
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        sparse = prompts.sparse.to(outputs.dtype)
        return torch.cat([outputs.expand(sparse.shape[0], -1, -1), sparse], dim=1)

    @staticmethod
    def _present(prompts: Embedded) -> Bool[Tensor, "P N"] | None:
        return None if prompts.present is None else F.pad(prompts.present, (1 + NUM_MASKS, 0), value=True)

    def _hypernetworks(self, mask_tokens: Float[Tensor, "P 4 256"], masks: slice) -> Float[Tensor, "P 32 M"]:
        """The vector that each mask's sub-pixels are multiplied with."""
        chosen = list(enumerate(self.output_hypernetworks_mlps))[masks]
        return torch.stack([mlp(mask_tokens[:, i]) for i, mlp in chosen], dim=2)

    def _upscaled(self, stream: Float[Tensor, "P L 256"]) -> Float[Tensor, "P L 4 4 32"]:
        """The features of each token's 4 x 4 sub-pixels, quarter by quarter."""
        first, norm, gelu, second, _ = self.output_upscaling
        assert isinstance(norm, nn.LayerNorm)
        fine = gelu(nn.LayerNorm.forward(norm, subpixels(stream, first)))
        finest: Tensor = gelu(subpixels(fine, second))
        return finest


def in_pixels(values: Float[Tensor, "P K M"], grid: tuple[int, int]) -> Float[Tensor, "P M 4h 4w"]:
    """Sub-pixels in the order of pixels; they come by row and column of the token, within it, within its quarter."""
    tiles = torch.unflatten(values, 1, (*grid, 2, 2, 2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return tiles.reshape(values.shape[0], values.shape[2], 4 * grid[0], 4 * grid[1])


def tapped(
    name: str,
    seen: Transformed,
    vectors: Float[Tensor, "P 32 M"],
    finest: Float[Tensor, "P L 4 4 32"],
    grid: tuple[int, int],
) -> Float[Tensor, "P *shape"]:
    """What a tap's name means, a row for each prompt."""
    if name == HYPERNETWORKS:
        return vectors.transpose(1, 2)
    if name == UPSCALED:
        return in_pixels(finest.flatten(1, -2), grid)
    if name.startswith(PROMPTED):
        stream = seen.streams[int(name.removeprefix(PROMPTED))].transpose(1, 2)
        return torch.unflatten(stream, 2, grid).expand(len(seen.tokens), -1, -1, -1)
    return seen.attention[name.removeprefix(ATTENTION)]


def rows(images: Float[Tensor, "B L C"], index: Int[Tensor, "P"]) -> Float[Tensor, "#P L C"]:
    """The image of each prompt; a single image stays one row, for all of them."""
    return images if images.shape[0] == 1 else images.index_select(0, index)


def subpixels(tokens: Float[Tensor, "*batch I"], conv: nn.Module) -> Float[Tensor, "*batch 4 O"]:
    """ConvTranspose2d with kernel = stride = 2 on each token by itself: its 2 x 2 outputs, row by row."""
    assert isinstance(conv, nn.ConvTranspose2d)
    assert conv.bias is not None
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (I, O, 2, 2) to (4 O, I)
    return torch.unflatten(F.linear(tokens, weight, conv.bias.repeat(4)), -1, (4, -1))


def _join(parts: list[Decoded]) -> Decoded:
    kept = [part.kept for part in parts if part.kept is not None]
    return Decoded(
        torch.cat([part.masks for part in parts]),
        torch.cat([part.iou for part in parts]),
        torch.cat([part.mask_tokens for part in parts]),
        [torch.cat(taps) for taps in zip(*(part.taps for part in parts), strict=True)],
        torch.cat(kept) if kept else None,
    )
