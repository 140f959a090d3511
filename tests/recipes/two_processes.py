"""Train one configuration in two processes; the test launches it twice, with the variables that torchrun would set.

The process whose rank is in LATE_RANK comes seconds after the other; the one in POISONED_RANK has no finite loss in
its second step, and gets SIGTERM, alone, in its fourth.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from samlet.config import RunConfig
from samlet.engine.step import TrainStep
from samlet.recipes import train as recipe
from samlet.schema import load_config

SECONDS_LATE = 4
set_up, real_forward, calls = vars(recipe)["set_up"], TrainStep.forward, itertools.count()


def set_up_late(*args: object, **settings: object) -> object:
    if os.environ["RANK"] == os.environ.get("LATE_RANK"):
        time.sleep(SECONDS_LATE)
    return set_up(*args, **settings)


def forward(self: TrainStep, *inputs: Any) -> Any:
    loss, terms = real_forward(self, *inputs)
    if self.student.training and os.environ["RANK"] == os.environ.get("POISONED_RANK"):
        step = next(calls) // int(os.environ["ACCUMULATION"])
        if step == 1:
            terms.raw["task/dice"] = terms.raw["task/dice"] * float("nan")
        elif step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    return loss, terms


if __name__ == "__main__":
    torch.set_num_threads(1)
    with patch.object(recipe, "set_up", set_up_late), patch.object(TrainStep, "forward", forward):
        sys.exit(recipe.train(load_config(RunConfig, Path(sys.argv[1]), sys.argv[2:])))
