"""SAM on one screen: a heavy `encode` that knows no prompt, and a light `decode` that takes many."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samlet.errors import SamletError
from samlet.frames import PIXEL_MEAN, PIXEL_STD
from samlet.models.mask_decoder import ATTENTION, Embedded, MaskDecoder
from samlet.models.norms import frozen_projection
from samlet.models.prompt_encoder import PromptEncoder
from samlet.models.tiny_vit import TinyViT
from samlet.models.vit import ImageEncoderViT
from samlet.types import ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EMBED_DIM = 256
STRIDE = 16  # of the image embedding in the input frame
MASKS = {None: slice(0, 4), True: slice(1, 4), False: slice(0, 1)}


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder; `build_sam(**sam.arch)` makes another one of its shape."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_encoder: TinyViT | ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        arch: dict[str, Any],
    ) -> None:
        super().__init__()
        self.arch = arch
        self.kind: str = arch["kind"]
        self.image_size: int = arch["image_size"]
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def encode(
        self,
        pixels: Float[Tensor, "B 3 S S"],
        taps: Sequence[str] = (),
        places: Float[Tensor, "B Q 2"] | None = None,
    ) -> ImageFeatures:
        """Image embedding of preprocessed images (see samlet.frames), and the encoder's inner maps by name.

        Taps: `neck`, `neck_conv`; `blocks.N`, a block's output, B x C x h x w; `attention.N`, what a block's attention
        gives each of Q `places` to see, B x heads x Q x h x w, 0 outside the place's window. Places are (y, x) as
        shares of the input frame's side, 0 to 1. N may be negative, or a share of the depth: `blocks.1/4`.

        Raises:
            SamletError: pixels of another shape; a tap this encoder does not have; attention without places.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            wanted = f"(B, 3, {self.image_size}, {self.image_size})"
            raise SamletError(f"pixels: this model encodes {wanted}, not {tuple(pixels.shape)}; see samlet.frames")
        inner = {name: self._inner(name) for name in taps if name not in ("neck", "neck_conv")}
        if places is None and any(name.startswith(ATTENTION) for name in inner):
            raise SamletError("places: attention is tapped at some places of each image; say at which")
        last, seen = self.image_encoder(pixels, tuple(inner.values()), places)
        narrow, *rest = self.image_encoder.neck
        neck_conv = embedding = narrow(last)
        for layer in rest:
            embedding = layer(embedding)
        maps = {"neck": embedding, "neck_conv": neck_conv}
        return ImageFeatures(embedding, {name: maps[name] if name in maps else seen[inner[name]] for name in taps})

    def decode(
        self,
        features: ImageFeatures,
        prompts: Prompts,
        multimask_output: bool | None = None,
        taps: Sequence[str] = (),
        min_iou: float | None = None,
    ) -> MaskOutput:
        """Masks for P prompts on B images, in any order. None: all four masks; True: the three; False: the single one.

        `min_iou`: prompts that have no mask of a higher estimate are not upscaled and have no row; `kept` marks the
        others, whose answers are what they are without it.

        Taps: `prompted.0`, the image stream (embedding + dense prompt) as it enters the two-way transformer, and
        `prompted.k`, the stream after its k-th layer; `upscaled`, the features of the masks' pixels, P x 32 x 4h x 4w,
        and `hypernetworks`, the vector of each mask, P x M x 32, whose dot products are the logits; attention weights
        P x 8 x queries x keys, `attention.k.self`, `attention.k.token_to_image` and `attention.k.image_to_token` of
        layer k and `attention.final`. Tokens: IoU, four masks, then the prompt's points; cells go row by row.

        Raises:
            SamletError: a tap that does not exist; prompts that do not fit the images.
        """
        embedding = features.embedding
        self.check_decoder_taps(taps)
        embedded = self._embed(prompts, embedding)
        no_mask = self.prompt_encoder.no_mask_embed.weight[0]
        image_pe = self.prompt_encoder.get_dense_pe((embedding.shape[2], embedding.shape[3])).to(no_mask.dtype)
        masks = MASKS[multimask_output]
        out = self.mask_decoder(embedding, no_mask, image_pe, embedded, masks=masks, taps=taps, min_iou=min_iou)
        found = dict(zip(taps, out.taps, strict=True))
        return MaskOutput(out.masks, out.iou[:, masks], out.mask_tokens, found, out.kept)

    def tap_names(self) -> tuple[str, ...]:
        """The maps that `encode` can be asked for; `blocks.-1` counts from the end."""
        blocks = (f"blocks.{i}" for i in range(len(self.image_encoder.block_channels)))
        return (*blocks, "neck_conv", "neck")

    def tap_channels(self, name: str) -> int:
        """Channels of a tap of `encode`; of attention, those of the block.

        Raises:
            SamletError: a tap this encoder does not have.
        """
        if name in ("neck", "neck_conv"):
            return EMBED_DIM
        return self.image_encoder.block_channels[int(self._inner(name).partition(".")[2])]

    def check_decoder_taps(self, taps: Sequence[str]) -> None:
        """Refuse what `decode` cannot return.

        Raises:
            SamletError: names the tap and lists those that exist.
        """
        names = self.mask_decoder.tap_names()
        for name in taps:
            if name not in names:
                raise SamletError(f"tap '{name}': the mask decoder has {', '.join(names)}")

    def project_to_neck(self, tap_feature: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 256 h w"]:
        """A block's map through the neck's first convolution; no gradient reaches the convolution's weights.

        Raises:
            SamletError: the map has not as many channels as the last block.
        """
        channels = self.image_encoder.block_channels[-1]
        if tap_feature.shape[1] != channels:
            raise SamletError(
                f"this {self.kind}'s neck takes {channels} channels, the tap has {tap_feature.shape[1]}: "
                "choose a block of the last stage, or another projection"
            )
        return frozen_projection(self.image_encoder.neck, tap_feature)

    def _inner(self, name: str) -> str:
        """A tap's name with the block's own number, `blocks.-1` as `blocks.11`."""
        depth, attending = len(self.image_encoder.block_channels), self.image_encoder.attending
        head, _, number = name.partition(".")
        index = block_index(number, depth)
        if index is not None and (head == "blocks" or (head == "attention" and index in attending)):
            return f"{head}.{index}"
        raise SamletError(
            f"tap '{name}': this {self.kind} has neck, neck_conv and blocks.0 to blocks.{depth - 1} "
            f"(or blocks.-1 to blocks.-{depth}, from the end, or blocks.1/2, half way down), "
            f"and attention.{attending[0]} to attention.{attending[-1]}"
        )

    def _embed(self, prompts: Prompts, embedding: Tensor) -> Embedded:
        if not torch.compiler.is_compiling():
            _check_prompts(prompts, embedding, self.image_size)
        encoder = self.prompt_encoder
        sparse = encoder.sparse_embeddings(prompts.point_coords, prompts.point_labels)
        dense = None if prompts.mask_input is None else encoder.dense_embeddings(prompts.mask_input)
        present = None if prompts.absent is None else ~prompts.absent
        return Embedded(prompts.image_index, sparse, present, dense)


def block_index(number: str, depth: int) -> int | None:
    """The block that "3", "-1" or, as a share of the depth, "1/4" means: of 12 blocks the third, 2; None: none."""
    if matched := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", number):
        part, whole = int(matched[1]), int(matched[2])
        return -(-depth * part // whole) - 1 if 0 < part <= whole else None
    if re.fullmatch(r"-?[0-9]{1,6}", number) and -depth <= int(number) < depth:
        return int(number) % depth
    return None


def _check_prompts(prompts: Prompts, embedding: Tensor, image_size: int) -> None:
    count, images = prompts.image_index.shape[0], embedding.shape[0]
    if prompts.point_coords.shape[:2] != prompts.point_labels.shape or prompts.point_labels.shape[0] != count:
        shapes = [tuple(x.shape) for x in prompts[:3]]
        raise SamletError(f"prompts: image_index, point_coords and point_labels do not fit: {shapes}")
    low = image_size // 4
    if prompts.mask_input is not None and tuple(prompts.mask_input.shape) != (count, 1, low, low):
        raise SamletError(
            f"mask_input: must be low-res logits of shape ({count}, 1, {low}, {low}), "
            f"not {tuple(prompts.mask_input.shape)}"
        )
    if embedding.device.type != "cpu" or count == 0:  # looking at values would make a GPU wait
        return
    if not 0 <= int(prompts.image_index.min()) <= int(prompts.image_index.max()) < images:
        raise SamletError(f"prompts: image_index must lie in 0..{images - 1}, the images that were encoded")
    labels = prompts.point_labels
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) <= 3:
        raise SamletError("point_labels: must be 1 (inside), 0 (outside), 2 and 3 (box corners) or -1 (padding)")
