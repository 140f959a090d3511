"""Train one configuration in two processes; the test launches it twice, with the variables that torchrun would set."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from samlet.config import RunConfig
from samlet.recipes.train import train
from samlet.schema import load_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(train(load_config(RunConfig, Path(sys.argv[1]), sys.argv[2:])))
