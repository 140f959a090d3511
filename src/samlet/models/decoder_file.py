"""A SAM without its image encoder, in a file of its own: what answers prompts from stored features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import nn

from samlet.artefacts import write_file
from samlet.errors import CheckpointError, SamletError
from samlet.models.build import build_sam
from samlet.models.checkpoints import METADATA, digest_of, fill_model, plain_state, read_tensors

if TYPE_CHECKING:
    from samlet.models.sam import Sam

ENCODER = "image_encoder."


class AbsentEncoder(nn.Module):
    """Stands where the image encoder was."""

    block_channels: tuple[int, ...] = ()
    attending: tuple[int, ...] = (0,)

    def forward(self, *_: Any) -> Any:
        """Refuse.

        Raises:
            SamletError: always.
        """
        raise SamletError("this model was loaded without its image encoder and answers from stored features alone")


def save_decoder(sam: Sam, path: Path) -> None:
    """Write prompt encoder and mask decoder with the model's sizes and a digest in the metadata, whole or not at all.

    Raises:
        SamletError: the disk is full, or not ours to write.
    """
    state = {name: value for name, value in plain_state(sam).items() if not name.startswith(ENCODER)}
    note = json.dumps({"arch": sam.arch, "sha256": digest_of(state, sam.arch)}, sort_keys=True)
    content = save(state, {METADATA: note})
    write_file(path, lambda place: place.write_bytes(content))


def load_decoder(path: Path) -> Sam:
    """The model that `save_decoder` wrote, in eval mode, on the CPU, in float32; it decodes and cannot encode.

    Raises:
        CheckpointError: the file is missing, damaged, or is not one of these.
    """
    state, arch = read_tensors(path)
    if arch is None:
        raise CheckpointError(f"{path}: is no decoder of a feature store (it tells no sizes); extract the store again")
    try:
        with torch.device("meta"):
            sam = build_sam(**arch)
            sam.image_encoder = AbsentEncoder()  # type: ignore[assignment]
        fill_model(sam, state)
    except SamletError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit a SAM-1 decoder ({error}); extract the store again") from error
    return sam.eval()
