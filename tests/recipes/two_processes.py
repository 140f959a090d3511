"""Train one configuration in two processes; the test launches it twice, with the variables that torchrun would set.

The process whose rank is in LATE_RANK comes seconds after the other.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from samlet.config import RunConfig
from samlet.recipes import train as recipe
from samlet.schema import load_config

SECONDS_LATE = 4
set_up = vars(recipe)["set_up"]


def set_up_late(*args: object) -> object:
    if os.environ["RANK"] == os.environ.get("LATE_RANK"):
        time.sleep(SECONDS_LATE)
    return set_up(*args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with patch.object(recipe, "set_up", set_up_late):
        sys.exit(recipe.train(load_config(RunConfig, Path(sys.argv[1]), sys.argv[2:])))
