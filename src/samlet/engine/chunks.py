"""Prompts in chunks, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from samlet.engine.memory import give_back_freed_memory
from samlet.types import Batch, Objects

R = TypeVar("R")


def chunks_of(batch: Batch, size: int | None) -> list[slice]:
    """The rows of a batch's prompts in chunks of at most `size`; None: in one, as stored answers always are."""
    count = len(batch.labelled)
    if size is None or batch.answers is not None or count <= size:
        return [slice(0, count)]
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some of the prompts, each with a mask of its own; the images stay, and beside them all their objects."""
    given = {name: value[rows] for name, value in batch.prompts._asdict().items() if value is not None}
    return batch._replace(
        prompts=batch.prompts._replace(**given),
        masks=batch.masks[rows if batch.target_of is None else batch.target_of[rows]],
        labelled=batch.labelled[rows],
        target_of=None,
        background=None if batch.background is None else batch.background[rows],
        mask_image=None,
        objects=None if batch.mask_image is None else Objects(batch.masks, batch.mask_image),
    )


def computed_again(work: Callable[[], R], device: torch.device) -> R:
    """`work()`, which keeps nothing for the backward pass but is done once more there. It must draw nothing."""
    if not torch.is_grad_enabled():
        return work()

    def alone_in_memory() -> R:
        if device.type == "cpu":
            give_back_freed_memory()
        return work()

    found: R = checkpoint(alone_in_memory, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return found
