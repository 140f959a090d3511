"""Most main memory of one training step, in MiB; run as a script: IMAGE_SIZE PROMPTS OBJECTS PROMPTS_PER_CHUNK TINY."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from samlet.engine.memory import keep_freed_memory
from samlet.engine.step import Counts, TrainStep
from samlet.losses.configs import TaskLossConfig
from samlet.models import build_sam
from samlet.types import Batch, Prompts
from tests.tiny import STUDENT


def main() -> None:
    """One image, forward and backward."""
    side, prompts, objects, size, tiny = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run on a CPU does
    torch.manual_seed(0)
    student = build_sam("vit_t", side, **(STUDENT if tiny else {})).eval()
    batch = Batch(
        pixels=torch.randn(1, 3, side, side),
        input_sizes=torch.tensor([[side, side]]),
        prompts=Prompts(
            torch.zeros(prompts, dtype=torch.int64),
            torch.rand(prompts, 2, 2) * side,
            torch.tensor([[1, -1]]).repeat(prompts, 1),
        ),
        masks=(torch.rand(objects, side // 4, side // 4) > 0.5).float(),
        labelled=torch.ones(prompts, dtype=torch.bool),
        image_ids=("image",),
        target_of=torch.arange(prompts) % objects,
        background=torch.zeros(prompts, dtype=torch.bool),
        mask_image=torch.zeros(objects, dtype=torch.int64),
    )
    step = TrainStep(student, TaskLossConfig(), prompts_per_chunk=size or None)
    began = time.monotonic()
    loss, _ = step(batch, (), Counts(1, 1, 1))
    loss.backward()
    seconds = time.monotonic() - began
    sys.stdout.write(f"{seconds:.0f} s, MiB: {peak_resident():.0f}\n")


def peak_resident() -> float:
    """Of this program alone: getrusage still knows what the process held before it became this program."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
