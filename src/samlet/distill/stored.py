"""Teachers whose features were computed ahead of time: their store is read by the loader, their decoder runs live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from samlet.distill.store import StoreReader, decoded
from samlet.errors import DataError
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from samlet.models.sam import Sam

EMBEDDING = "embedding"


class StoredTeacher:
    """A teacher that answers from stored features, exactly as a `LiveTeacher` would from computed ones.

    Args:
        name: what logs, errors and `Batch.stored` call it.
        sam: its prompt encoder and mask decoder (`load_decoder`); the image encoder is never asked.
        encoder_taps: what `encode` returns besides the embedding.
        decoder_taps: what `decode` returns besides masks, IoU and tokens.

    Raises:
        SamletError: a tap that its decoder does not have.
    """

    def __init__(self, name: str, sam: Sam, encoder_taps: Sequence[str] = (), decoder_taps: Sequence[str] = ()) -> None:
        sam.check_decoder_taps(decoder_taps)
        self.name = name
        self.image_size = sam.image_size
        self.sam = sam.requires_grad_(False).eval()
        self.encoder_taps = tuple(encoder_taps)
        self.decoder_taps = tuple(decoder_taps)

    @torch.no_grad()
    def encode(self, batch: Batch) -> ImageFeatures:
        """What the loader brought, in float32 on the batch's device."""
        assert batch.stored is not None, "the dataset was not given the stores to read"
        own = {name.removeprefix(f"{self.name}/"): raw for name, raw in batch.stored.items() if self._owns(name)}
        features = decoded(own)
        return ImageFeatures(features[EMBEDDING], {tap: features[tap] for tap in self.encoder_taps})

    @torch.no_grad()
    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """Run prompt encoder and mask decoder."""
        return self.sam.decode(features, prompts, multimask_output=None, taps=self.decoder_taps)

    def _owns(self, name: str) -> bool:
        return name.startswith(f"{self.name}/")


class StoredFeatures:
    """Looks an image up in the stores of several teachers; travels to loader workers.

    Args:
        readers: the store of each teacher, by the teacher's name.
        features: what is read of each.
        command: what computes what is missing or stale.
    """

    def __init__(self, readers: Mapping[str, StoreReader], features: Mapping[str, Sequence[str]], command: str) -> None:
        self.readers, self.features, self.command = dict(readers), dict(features), command

    def __call__(self, image_id: str, variant: int, variation: str) -> dict[str, Tensor]:
        """All features of one image-variant as "teacher/feature", as stored.

        Raises:
            DataError: it is missing, damaged, or was computed from other pixels.
        """
        found: dict[str, Tensor] = {}
        for name, reader in self.readers.items():
            entry = reader.entries.get((image_id, variant))
            if entry is None:
                raise DataError(f"{reader.root}: holds nothing for '{image_id}', variant {variant}; run {self.command}")
            if entry.variation != variation:
                raise DataError(
                    f"{reader.root}: '{image_id}', variant {variant}, was computed from another crop or colour than "
                    f"this run draws (its masks or dataset.min_area have changed); run {self.command}"
                )
            raw = reader.read(image_id, variant, self.features[name])
            found.update({f"{name}/{feature}": value for feature, value in raw.items()})
        return found
