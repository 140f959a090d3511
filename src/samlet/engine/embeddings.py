"""Image embeddings of a frozen student, computed once and kept in the run's folder: steps then train the decoder alone.

`embeddings/<fingerprint>/variant-000/` holds one .npy (float32, 256 x S/16 x S/16, no pickle) for each training image,
and the manifest that vouches for them; a variant is written whole or not at all. Reading maps the file into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samlet.artefacts import read_manifest, write_directory
from samlet.data.sampler import SampleKey
from samlet.engine.facts import digest
from samlet.engine.progress import ImageBars
from samlet.errors import CheckpointError
from samlet.models.checkpoints import digest_of, plain_state

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.data.dataset import SegmentationDataset
    from samlet.models.sam import Sam

Encode = Callable[["Float[Tensor, 'B 3 S S']"], "Float[Tensor, 'B 256 h w']"]


def fingerprint(data: SegmentationDataset, student: Sam, precision: str) -> dict[str, Any]:
    """What the embeddings depend on; those of another fingerprint are never read."""
    encoder = {name: value for name, value in plain_state(student).items() if name.startswith("image_encoder.")}
    images = [(record.image_id, record.image_path.stat().st_size) for record in data.records]
    return {
        "encoder_sha256": digest_of(encoder, student.arch),
        "images_sha256": digest(images),
        "image_size": data.image_size,
        "scaled_decode": data.scaled_decode,
        "augmentation": list(data.augmentation),
        "min_area": data.min_area,
        "seed": data.seed,
        "precision": precision,
    }


def keep_embeddings(
    folder: Path, data: SegmentationDataset, facts: dict[str, Any], encode: Encode, *, batch_size: int
) -> None:
    """Compute every variant that is not there, whole and of this fingerprint."""
    for variant in range(data.augmentation.variants or 1):
        place = _home(folder, facts) / f"variant-{variant:03d}"
        if not _is_whole(place, facts):
            fill = partial(_compute, data=data, variant=variant, encode=encode, batch_size=batch_size)
            write_directory(place, fill, **facts)


def embeddings_reader(folder: Path, data: SegmentationDataset, facts: dict[str, Any]) -> Callable[[SampleKey], Tensor]:
    """What looks up the embedding of a sample."""
    return partial(_read, _home(folder, facts), data.augmentation.variants or 1)


def _home(folder: Path, facts: dict[str, Any]) -> Path:
    return folder / digest(facts)[:16]


def _file(place: Path, index: int) -> Path:
    return place / f"{index:08d}.npy"


def _read(home: Path, variants: int, key: SampleKey) -> Float[Tensor, "256 h w"]:
    mapped = np.load(_file(home / f"variant-{key.epoch % variants:03d}", key.index), mmap_mode="r", allow_pickle=False)
    return torch.from_numpy(np.array(mapped))


def _is_whole(place: Path, facts: dict[str, Any]) -> bool:
    try:
        manifest = read_manifest(place)
    except CheckpointError:  # absent, or damaged since: either way it is computed
        return False
    return digest({name: manifest.get(name) for name in facts}) == digest(facts)


@torch.no_grad()
def _compute(folder: Path, *, data: SegmentationDataset, variant: int, encode: Encode, batch_size: int) -> None:
    with ImageBars() as bar:
        task = bar.add_task(f"embeddings, variant {variant}", total=len(data))
        for indices in _groups(len(data), batch_size):
            pixels = torch.stack([data[SampleKey(variant, index)].pixels for index in indices])
            for index, embedding in zip(indices, encode(pixels).float().cpu(), strict=True):
                np.save(_file(folder, index), embedding.numpy(), allow_pickle=False)
            bar.advance(task, len(indices))


def _groups(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))
