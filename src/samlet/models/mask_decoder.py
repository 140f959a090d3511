"""SAM's mask decoder: image embedding and prompt embeddings to masks and their estimated IoU. arXiv:2304.02643.

Everything runs on channels-last tokens; the two upscaling steps, transposed convolutions whose stride is their
kernel, are linear layers that make 2 x 2 sub-pixels of each token, and only the masks themselves, M channels wide, are
put in the order of pixels at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from samlet.models.norms import LayerNorm2d
from samlet.models.transformer import ImageSide, TwoWayTransformer, rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

DIM = 256
NUM_HEADS = 8
NUM_MASKS = 4  # the single mask, then three for ambiguous prompts
CHUNK = 4  # prompts at a time on a CPU: their image streams then fit its cache


class MLP(nn.Module):
    """Three linear layers with ReLU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs, hidden, hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

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
        total = self.image_index.shape[0]
        starts = range(0, max(total, 1), size)
        return [Embedded(*(None if x is None else x[i : i + size] for x in self)) for i in starts]  # type: ignore[arg-type]


class Decoded(NamedTuple):
    """Answers to P prompts: the masks asked for, all IoU estimates, mask tokens and the image streams asked for."""

    masks: Float[Tensor, "P M H W"]
    iou: Float[Tensor, "P 4"]
    mask_tokens: Float[Tensor, "P 4 256"]
    streams: list[Float[Tensor, "P 256 h w"]]


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
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(DIM, DIM, DIM // 8) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(DIM, DIM, NUM_MASKS)

    def forward(
        self,
        embedding: Float[Tensor, "B 256 h w"],
        no_mask: Float[Tensor, "256"],
        image_pe: Float[Tensor, "1 256 h w"],
        prompts: Embedded,
        *,
        masks: slice,
        streams: Sequence[int] = (),
    ) -> Decoded:
        """Decode all prompts of all images; `masks` chooses which of the four, `streams` which image streams.

        On a CPU, where no gradient is wanted, a few prompts at a time: the same answers, out of the cache.
        """
        size = (embedding.shape[2], embedding.shape[3])
        tokens = embedding.flatten(2).transpose(1, 2)
        offsets = self.transformer.offsets(image_pe.flatten(2).transpose(1, 2)[0])
        shared = self.transformer.enter(tokens + no_mask, offsets) if prompts.dense is None else None

        def decode(part: Embedded) -> Decoded:
            if shared is not None:
                image = shared.rows(part.image_index)
            else:
                assert part.dense is not None
                keys = rows(tokens, part.image_index) + part.dense.flatten(2).transpose(1, 2)
                image = self.transformer.enter(keys, offsets)
            return self._decode(image, offsets, part, size, masks, streams)

        chunked = embedding.device.type == "cpu" and not torch.is_grad_enabled()
        if not chunked or torch.compiler.is_compiling() or len(prompts.image_index) <= CHUNK:
            return decode(prompts)
        return _join([decode(part) for part in prompts.chunks(CHUNK)])

    def _decode(
        self,
        image: ImageSide,
        offsets: list[tuple[Tensor, ...]],
        prompts: Embedded,
        size: tuple[int, int],
        masks: slice,
        wanted: Sequence[int],
    ) -> Decoded:
        count = prompts.sparse.shape[0]
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(count, -1, -1)
        tokens = torch.cat([outputs, prompts.sparse.to(outputs.dtype)], dim=1)
        present = prompts.present
        if present is not None:
            present = torch.cat([present.new_ones(count, outputs.shape[1]), present], dim=1)
        tokens, streams = self.transformer(tokens, image, offsets, present)
        iou = self.iou_prediction_head(tokens[:, 0])
        mask_tokens = tokens[:, 1 : 1 + NUM_MASKS]
        maps = [streams[i].transpose(1, 2).unflatten(2, size) for i in wanted]
        return Decoded(self._masks(streams[-1], mask_tokens, size, masks), iou, mask_tokens, maps)

    def _masks(
        self,
        stream: Float[Tensor, "P L 256"],
        mask_tokens: Float[Tensor, "P 4 256"],
        size: tuple[int, int],
        masks: slice,
    ) -> Float[Tensor, "P M 4h 4w"]:
        """Dot product of each sub-pixel's features with each mask's hypernetwork output."""
        chosen = list(enumerate(self.output_hypernetworks_mlps))[masks]
        weights = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in chosen], dim=2)  # P, 32, M
        first, norm, _, second, _ = self.output_upscaling
        fine = F.gelu(F.layer_norm(_subpixels(stream, first), (DIM // 4,), norm.weight, norm.bias, norm.eps))
        finest = F.gelu(_subpixels(fine, second))
        logits = torch.einsum("plc,pcm->plm", finest.flatten(1, -2), weights)
        # Order of l: row, column, then row and column within the token, then within the sub-pixel.
        grid = logits.unflatten(1, (*size, 2, 2, 2, 2)).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return grid.reshape(logits.shape[0], logits.shape[2], 4 * size[0], 4 * size[1])


def _subpixels(tokens: Float[Tensor, "*batch I"], conv: nn.Module) -> Float[Tensor, "*batch 4 O"]:
    """ConvTranspose2d with kernel = stride = 2 on each token: its 2 x 2 outputs, row by row."""
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # type: ignore[operator,union-attr] # (I, O, 2, 2) -> (4 O, I)
    return F.linear(tokens, weight, conv.bias.repeat(4)).unflatten(-1, (4, -1))  # type: ignore[operator,union-attr]


def _join(parts: list[Decoded]) -> Decoded:
    streams = [torch.cat(maps) for maps in zip(*(part.streams for part in parts), strict=True)]
    masks, iou, tokens = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[arg-type]
    return Decoded(masks, iou, tokens, streams)
