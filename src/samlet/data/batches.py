"""Tensors of prompts and batches: rows of one image stacked, samples of many images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from samlet.data.prompts import PromptRow
from samlet.types import PADDING, Batch, Prompts, Sample

if TYPE_CHECKING:
    from jaxtyping import Int


def stack_rows(rows: Sequence[PromptRow]) -> Prompts:
    """Prompts of one image; rows of fewer tokens are filled with `absent` ones."""
    length = max(len(row.labels) for row in rows)
    coords = np.zeros((len(rows), length, 2), np.float32)
    labels = np.full((len(rows), length), PADDING, np.int64)
    absent = np.ones((len(rows), length), np.bool_)
    for place, row in enumerate(rows):
        count = len(row.labels)
        coords[place, :count], labels[place, :count], absent[place, :count] = row.coords, row.labels, False
    return Prompts(
        image_index=torch.zeros(len(rows), dtype=torch.int64),
        point_coords=torch.from_numpy(coords),
        point_labels=torch.from_numpy(labels),
        absent=torch.from_numpy(absent) if absent.any() else None,
    )


def _widen(tensor: torch.Tensor, length: int, value: float) -> torch.Tensor:
    shape = (tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=1)


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Prompts of image 0, 1, ... one after the other; tokens that a row lacks are `absent`.

    Raises:
        ValueError: some have mask inputs and some have not.
    """
    length = max(part.point_labels.shape[1] for part in parts)
    holes = [
        torch.zeros_like(part.point_labels, dtype=torch.bool) if part.absent is None else part.absent for part in parts
    ]
    absent = torch.cat([_widen(hole, length, True) for hole in holes])
    inputs = [part.mask_input for part in parts if part.mask_input is not None]
    if inputs and len(inputs) < len(parts):
        raise ValueError("either all prompts or none have a mask input")
    return Prompts(
        image_index=torch.cat([torch.full_like(part.image_index, place) for place, part in enumerate(parts)]),
        point_coords=torch.cat([_widen(part.point_coords, length, 0) for part in parts]),
        point_labels=torch.cat([_widen(part.point_labels, length, PADDING) for part in parts]),
        mask_input=torch.cat(inputs) if inputs else None,
        absent=absent if bool(absent.any()) else None,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples side by side; `image_index` tells whose each prompt is."""
    embeddings = [sample.embedding for sample in samples if sample.embedding is not None]
    stored = [sample.stored for sample in samples if sample.stored is not None]
    answers = [sample.answers for sample in samples if sample.answers is not None]
    beside = [sample.background for sample in samples if sample.background is not None]
    return Batch(
        pixels=torch.stack([sample.pixels for sample in samples]),
        input_sizes=torch.tensor([sample.input_size for sample in samples], dtype=torch.int64),
        prompts=join_prompts([sample.prompts for sample in samples]),
        masks=torch.cat([sample.masks for sample in samples]),
        labelled=torch.cat([sample.labelled for sample in samples]),
        image_ids=tuple(sample.image_id for sample in samples),
        skipped=tuple(reason for sample in samples for reason in sample.skipped),
        embedding=torch.stack(embeddings) if embeddings else None,
        stored={name: torch.stack([found[name] for found in stored]) for name in stored[0]} if stored else None,
        answers={name: torch.cat([found[name] for found in answers]) for name in answers[0]} if answers else None,
        target_of=_join_targets(samples),
        background=torch.cat(beside) if beside else None,
        mask_image=_image_of_each_mask(samples) if beside else None,
    )


def _image_of_each_mask(samples: Sequence[Sample]) -> Int[torch.Tensor, "O"]:
    counts = torch.tensor([len(sample.masks) for sample in samples])
    return torch.arange(len(samples)).repeat_interleave(counts)


def _join_targets(samples: Sequence[Sample]) -> Int[torch.Tensor, "P"] | None:
    """Which of all samples' masks is whose."""
    starts = accumulate((len(sample.masks) for sample in samples), initial=0)
    pairs = zip(starts, (sample.target_of for sample in samples), strict=False)
    found = [start + target_of for start, target_of in pairs if target_of is not None]
    return torch.cat(found) if found else None
