"""Where a run computes and how its tensors lie there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device

from samlet.errors import SamletError
from samlet.types import Batch

if TYPE_CHECKING:
    from torch import nn

    from samlet.engine.configs import TrainingConfig


def build_accelerator(training: TrainingConfig) -> Accelerator:
    """Device, precision and processes, as the configuration and the launcher say.

    Raises:
        SamletError: the configuration asks for what this machine does not have.
    """
    cuda = torch.cuda.is_available()
    if training.device == "cuda" and not cuda:
        raise SamletError("training.device: 'cuda' was asked for, and there is no CUDA GPU here; set it to auto")
    if training.precision == "fp16" and not (cuda and training.device != "cpu"):
        raise SamletError("training.precision: fp16 needs a CUDA GPU; take fp32 or bf16 here")
    AcceleratorState._reset_state()  # a process may train twice, with another precision the second time
    return Accelerator(
        cpu=training.device == "cpu" or not cuda,
        mixed_precision={"fp32": "no"}.get(training.precision, training.precision),
        # Which weights a step uses depends on its prompts, and TinyViT's classifier is never used.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def place(module: nn.Module, device: torch.device, training: TrainingConfig) -> None:
    """Move a module to the device, its convolutions in the run's memory layout."""
    module.to(device)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format(training))


def to_device(batch: Batch, device: torch.device, training: TrainingConfig) -> Batch:
    """A batch on the run's device, images in the run's memory layout."""
    moved: Batch = send_to_device(batch, device, non_blocking=True)
    return moved._replace(pixels=moved.pixels.contiguous(memory_format=memory_format(training)))


def memory_format(training: TrainingConfig) -> torch.memory_format:
    """How images and convolutions lie in memory."""
    return torch.channels_last if training.channels_last else torch.contiguous_format
