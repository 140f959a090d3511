"""What the processes of one run tell each other; alone, each of these is the identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import gather_object

from samlet.errors import SamletError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

Item = TypeVar("Item")
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")  # a process is gone


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Element-wise sum over all processes."""
    if accelerator.num_processes == 1:
        return values
    summed: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return summed


def agreed(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process raised the flag."""
    return bool(total(accelerator, torch.tensor(float(flag))) > 0)


def gathered(items: Sequence[Item], accelerator: Accelerator) -> list[Item]:
    """The items of all processes, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return list(items)
    return list(gather_object(list(items)))


def gather_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """Torch's generators of every process, by name and rank."""
    rank = accelerator.process_index
    own = {f"cpu.{rank}": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own[f"cuda.{rank}"] = torch.cuda.get_rng_state(accelerator.device)
    return dict(gathered(list(own.items()), accelerator))


def restore_random_state(states: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Set this process's generators; those of a rank that did not exist keep their seed."""
    rank = accelerator.process_index
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    if f"cuda.{rank}" in states and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], accelerator.device)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """One sentence where another process of the run is gone.

    Raises:
        SamletError: the connection to it broke.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not any(word in str(error) for word in LOST):
            raise
        raise SamletError(
            "another process of this run has ended; what it said says why. The last checkpoint is whole: start the "
            "same command again"
        ) from error
