"""The learning rate as a pure function of the optimizer step: nothing to restore, nothing to overwrite."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total_steps: int, peak: float, floor: float = 0.0, warmup_steps: int = 0) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor`.

    lr(t) = peak (t + 1) / warmup                                                       for t < warmup
    lr(t) = floor + (peak - floor) (1 + cos(pi (t - warmup) / (total - warmup))) / 2    after

    Loshchilov and Hutter 2017, arXiv:1608.03983. `step` counts optimizer steps from 0, not micro-batches.
    A warm-up longer than a tenth of the run is cut to that tenth.
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
