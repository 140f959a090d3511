"""Teachers whose features were computed ahead of time: their store is read by the loader, their decoder runs live.

Where prompts are fixed, a store may hold the decoder's answers to them as well; then nothing of the teacher runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from samlet.distill.frames import ANSWERS
from samlet.distill.store import StoreReader, decoded
from samlet.errors import DataError
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam

EMBEDDING = "embedding"
LOGITS, IOU, TOKENS, PROMPTS = "dense_mask_logits", "iou_predictions", "mask_tokens", "prompts"
NO_TOKEN = -2.0  # in place of a label, where a row of prompts has fewer tokens than another
ONE_PIXEL = 1.0  # half precision is as coarse as that at 1024


def stored_name(decoder_tap: str) -> str:
    """What a store calls a tap of the decoder."""
    return decoder_tap.replace("prompted.", "prompt_embed.")


def answers_of(output: MaskOutput, prompts: Prompts, objects: Sequence[int], *, logits: bool) -> dict[str, Tensor]:
    """What a store keeps of one image's answers: a row for each object, zero where it has no prompt."""
    given = {IOU: output.iou_predictions, TOKENS: output.mask_tokens, PROMPTS: rows_of(prompts)}
    given |= {LOGITS: output.low_res_logits} if logits else {}
    given |= {stored_name(tap): value for tap, value in output.taps.items()}
    found = {}
    for name, value in given.items():
        found[name] = value.new_zeros(max(objects) + 1, *value.shape[1:])
        found[name][list(objects)] = value
    return found


def rows_of(prompts: Prompts) -> Float[Tensor, "P T 3"]:
    """Each prompt's tokens as numbers: x, y, label."""
    labels = prompts.point_labels.float()
    if prompts.absent is not None:
        labels = labels.masked_fill(prompts.absent, NO_TOKEN)
    return torch.cat([prompts.point_coords.float(), labels[..., None]], dim=2)


def are_same(stored: Float[Tensor, "P T 3"], asked: Float[Tensor, "P U 3"]) -> bool:
    """Whether two lists of prompts say the same, as far as half precision tells."""
    if asked.shape[1] > stored.shape[1]:
        return False
    rest = stored.new_tensor([0.0, 0.0, NO_TOKEN]).expand(len(asked), stored.shape[1] - asked.shape[1], 3)
    asked = torch.cat([asked, rest], dim=1)
    there = asked[..., 2] != NO_TOKEN
    apart = (stored - asked)[..., :2].abs().amax(dim=2)
    return bool((stored[..., 2] == asked[..., 2]).all() and (apart[there] < ONE_PIXEL).all())


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
        features = decoded(self._own(batch.stored))
        taps = {tap: features[tap] for tap in self.encoder_taps}
        answers = decoded(self._own(batch.answers or {}))
        return ImageFeatures(features[EMBEDDING], taps | {f"{ANSWERS}{name}": row for name, row in answers.items()})

    @torch.no_grad()
    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """Run prompt encoder and mask decoder, unless the batch brought their answers."""
        answers = {name.removeprefix(ANSWERS): tap for name, tap in features.taps.items() if name.startswith(ANSWERS)}
        if not answers:
            return self.sam.decode(features, prompts, multimask_output=None, taps=self.decoder_taps)
        side = 4 * features.embedding.shape[-1]
        none = answers[IOU].new_zeros(
            *answers[IOU].shape, side, side
        )  # where they were left out, nothing compares them
        taps = {tap: answers[stored_name(tap)] for tap in self.decoder_taps}
        return MaskOutput(answers.get(LOGITS, none), answers[IOU], answers[TOKENS], taps)

    def _own(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mine = f"{self.name}/"
        return {name.removeprefix(mine): raw for name, raw in stored.items() if name.startswith(mine)}


class StoredFeatures:
    """Looks an image up in the stores of several teachers; travels to loader workers.

    Args:
        readers: the store of each teacher, by the teacher's name.
        features: what is read of each image.
        answers: what is read of each of its prompts; none: the teachers' decoders run.
        command: what computes what is missing or stale.
    """

    def __init__(
        self, readers: Mapping[str, StoreReader], features: Sequence[str], answers: Sequence[str], command: str
    ) -> None:
        self.readers, self.command = dict(readers), command
        self.features, self.answers = tuple(features), tuple(answers)

    def __call__(
        self, image_id: str, variant: int, variation: str, objects: Sequence[int], prompts: Prompts
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Features of one image-variant and the answers to its prompts, as "teacher/feature", as stored.

        Raises:
            DataError: it is missing, damaged, or was computed from other pixels or prompts.
        """
        found: dict[str, Tensor] = {}
        answers: dict[str, Tensor] = {}
        for name, reader in self.readers.items():
            entry = reader.entries.get((image_id, variant))
            if entry is None:
                raise DataError(f"{reader.root}: holds nothing for '{image_id}', variant {variant}; run {self.command}")
            if entry.variation != variation:
                raise DataError(
                    f"{reader.root}: '{image_id}', variant {variant}, was computed from another crop or colour than "
                    f"this run draws (its masks or dataset.min_area have changed); run {self.command}"
                )
            raw = reader.read(image_id, variant, self.features)
            found |= {f"{name}/{feature}": value for feature, value in raw.items()}
            if self.answers:
                stored = reader.read(image_id, variant, self.answers)
                rows = {feature: self._rows(value, objects) for feature, value in stored.items()}
                if not are_same(rows.pop(PROMPTS).float(), rows_of(prompts)):
                    raise DataError(
                        f"{reader.root}: '{image_id}', variant {variant}, was asked about other prompts than this run "
                        f"draws (its masks have changed); run {self.command}"
                    )
                answers |= {f"{name}/{feature}": value for feature, value in rows.items()}
        return found, answers or None

    @staticmethod
    def _rows(value: Tensor, objects: Sequence[int]) -> Tensor:
        there = [min(index, len(value) - 1) for index in objects]  # more objects than there were: the prompts will tell
        return value[there]
