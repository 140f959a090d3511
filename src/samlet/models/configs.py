"""What a configuration file may say about a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from samlet.schema import ExistingPath, StrictModel

if TYPE_CHECKING:
    from samlet.models.sam import Sam

Kind = Literal["vit_t", "vit_b", "vit_l", "vit_h"]
VIT_T_ONLY = ("embed_dims", "depths", "window_sizes", "num_classes")
DEPTHS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}
Positive = Annotated[int, Field(ge=1)]
Four = Annotated[list[Positive], Field(min_length=4, max_length=4)]
VIT_ONLY = ("embed_dim", "depth", "global_attn_indexes", "window_size")


class EncoderConfig(StrictModel):
    """Sizes that differ from those of the kind; what is left out stays as published."""

    embed_dims: Four | None = None
    """vit_t: channels of the four stages."""
    depths: Four | None = None
    """vit_t: blocks in each of the four stages."""
    window_sizes: Four | None = None
    """vit_t: side of the attention windows of each stage, in tokens."""
    num_classes: int | None = Field(None, ge=0)
    """vit_t: width of the unused classifier, which loaders of mobile_sam.pt expect to be 1000."""
    embed_dim: int | None = Field(None, ge=1)
    """vit_b, vit_l, vit_h: channels of all blocks."""
    depth: int | None = Field(None, ge=1)
    """vit_b, vit_l, vit_h: number of blocks."""
    global_attn_indexes: list[Annotated[int, Field(ge=0)]] | None = None
    """vit_b, vit_l, vit_h: blocks that attend to the whole image."""
    window_size: int | None = Field(None, ge=1)
    """vit_b, vit_l, vit_h: side of the attention windows of the other blocks, in tokens."""
    num_heads: int | list[int] | None = None
    """Attention heads; a list of four for vit_t."""
    mlp_ratio: float | None = Field(None, gt=0)
    """Width of the MLPs in units of the block's channels."""


class LoraConfig(StrictModel):
    """Low-rank adaptation (LoRA): chosen layers learn a small correction, and nothing else of their part trains."""

    rank: int = Field(8, ge=1)
    """Rank of the corrections."""
    alpha: float = Field(8.0, gt=0)
    """The correction is alpha / rank times the product of its factors."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("image_encoder.*.attn.qkv", "image_encoder.*.attn.proj")
    """Names of the layers, where * stands for anything."""


class ModelConfig(StrictModel):
    """A SAM: its kind, where its weights come from, and how it is trained."""

    kind: Kind = "vit_t"
    """Image encoder: MobileSAM's TinyViT (vit_t) or SAM's ViT of three sizes."""
    checkpoint: ExistingPath | None = None
    """Weights to start from: a .pt or .pth file, .safetensors, a run of samlet, or a Hugging Face SamModel folder."""
    decoder_checkpoint: ExistingPath | None = None
    """Where prompt encoder and mask decoder start from, in place of `checkpoint`'s: a teacher's, as MobileSAM's did."""
    image_size: int = Field(1024, ge=32, multiple_of=16)
    """Side of the square the encoder sees, in pixels; a multiple of 16."""
    encoder: EncoderConfig = EncoderConfig()
    """Sizes of the encoder, where they differ from the published ones."""
    batch_norm: Literal["frozen", "calibrated", "train"] = "frozen"
    """BatchNorm statistics: kept (pretrained weights), measured once at the start (from scratch), or trained."""
    lora: LoraConfig | None = None
    """Train low-rank corrections of some layers (rank, alpha, targets) in place of all weights of their part."""

    def mistakes(self) -> Iterable[tuple[tuple[str | int, ...], str]]:
        """Sizes that belong to another kind of encoder."""
        foreign = VIT_ONLY if self.kind == "vit_t" else VIT_T_ONLY
        for name in foreign:
            if getattr(self.encoder, name) is not None:
                yield ("encoder", name), f"{self.kind} has no such size"
        yield from self._misfit_heads()
        depth = self.encoder.depth or DEPTHS.get(self.kind, 0)
        indexes = self.encoder.global_attn_indexes
        if self.kind != "vit_t" and indexes and max(indexes) >= depth:
            yield ("encoder", "global_attn_indexes"), f"there are {depth} blocks, numbered from 0"

    def _misfit_heads(self) -> Iterable[tuple[tuple[str | int, ...], str]]:
        heads, place = self.encoder.num_heads, ("encoder", "num_heads")
        if heads is None:
            return
        each = heads if isinstance(heads, list) else [heads]
        if isinstance(heads, list) != (self.kind == "vit_t") or len(each) != (4 if self.kind == "vit_t" else 1):
            yield place, "must be a list of four for vit_t, one number for the others"
        elif min(each) < 1:
            yield place, "must be 1 or more"
        else:
            widths = (self.encoder.embed_dims or each) if self.kind == "vit_t" else [self.encoder.embed_dim or each[0]]
            for number, (width, count) in enumerate(zip(widths, each, strict=True)):
                # vit_t's first stage is convolutional: its heads are a number without effect.
                if width % count and not (self.kind == "vit_t" and number == 0):
                    yield place, f"{width} channels cannot be shared by {count} heads"

    def build(self) -> Sam:
        """The model with the checkpoint's weights, or fresh ones from torch's global generator; on the CPU.

        Raises:
            SamletError: sizes that do not fit; a checkpoint that is damaged, foreign or of another kind.
        """
        from samlet.errors import CheckpointError
        from samlet.models.build import build_sam
        from samlet.models.checkpoints import copy_decoder, load_sam
        from samlet.models.lora import add_lora
        from samlet.models.norms import freeze_batch_norm

        sizes = self.encoder.model_dump(exclude_none=True)
        if self.checkpoint is None:
            sam = build_sam(self.kind, self.image_size, **sizes)
        else:
            sam = load_sam(self.checkpoint, self.image_size, **sizes)
        if sam.kind != self.kind:
            raise CheckpointError(f"{self.checkpoint}: holds a {sam.kind}, the configuration says kind: {self.kind}")
        if self.decoder_checkpoint is not None:
            donor = load_sam(self.decoder_checkpoint, self.image_size)
            try:
                copy_decoder(donor, sam)
            except CheckpointError as error:
                raise CheckpointError(f"{self.decoder_checkpoint}: {error}") from error
        freeze_batch_norm(sam, self.batch_norm != "train")
        if self.lora is not None:
            add_lora(sam, **self.lora.model_dump())
        return sam
