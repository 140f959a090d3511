"""Low-rank adaptation: chosen layers learn a small correction of their weights, which are merged into what is saved.

The correction is a parametrization of the weight, so every path that reads `layer.weight` (fused convolutions and
BatchNorm, projections, export) sees the adapted one, and merging changes no bit of any answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from samlet.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
NEVER_USED = "image_encoder.head"  # TinyViT's classifier
MARK = ".parametrizations.weight."  # between a layer's name and what its weight is made of
FACTORS = ("lora_A", "lora_B")


class LowRank(nn.Module):
    """W + (alpha / rank) B A, the weight taken as a matrix of its first dimension by all others.

    Hu et al. 2021 (LoRA), arXiv:2106.09685. A is drawn as they draw it, B begins at 0, so nothing changes at first.
    """

    def __init__(self, weight: Float[Tensor, "O *rest"], rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "O *rest"]) -> Float[Tensor, "O *rest"]:
        """The adapted weight, in float32 under autocast as well: what is merged is what was trained."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.lora_B @ self.lora_A).view(weight.shape)


def add_lora(sam: Sam, *, rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    """Adapt the layers whose names match one of the patterns; their names. A is drawn from torch's global generator.

    Raises:
        ConfigError: a pattern that names no layer, or a layer too small for the rank.
    """
    layers = {name: module for name, module in sam.named_modules() if isinstance(module, LAYERS) and name != NEVER_USED}
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            examples = ", ".join([name for name in layers if name.endswith(("qkv", "q_proj", "lin1", "fc1"))][:4])
            raise ConfigError(
                f"model.lora.targets: '{pattern}' names no layer of this {sam.kind}; it has {examples} ..."
            )
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in targets)]
    for name in chosen:
        weight = layers[name].weight
        sides = (weight.shape[0], weight[0].numel())
        if rank >= min(sides):
            raise ConfigError(
                f"model.lora.rank: {rank} is no less than the rank of {name}, {sides[0]} x {sides[1]}; lower it"
            )
        parametrize.register_parametrization(layers[name], "weight", LowRank(weight.detach(), rank, alpha))
    return chosen


def is_factor(name: str) -> bool:
    """Whether a parameter is one of LoRA's, by its name."""
    return name.endswith(FACTORS)


def adapted_layers(module: nn.Module) -> list[str]:
    """Names of the layers inside that carry LoRA."""
    return [name for name, layer in module.named_modules() if parametrize.is_parametrized(layer, "weight")]


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict as if there were no LoRA: upstream's keys, the corrections within the weights."""
    state = {}
    for key, value in module.state_dict().items():
        layer, mark, rest = key.partition(MARK)
        if not mark:
            state[key] = value
        elif rest == "original":
            state[f"{layer}.weight"] = module.get_submodule(layer).weight
    return state


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """What `merged_state` does not tell: the adapted layers' own weights, and their factors."""
    return {key: value.detach() for key, value in module.state_dict().items() if MARK in key}


def load_merged_state(module: nn.Module, merged: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> None:
    """Fill a model from its merged state and its LoRA state; strictly, as `load_state_dict`.

    Raises:
        RuntimeError: they do not fit this model.
    """
    adapted = {f"{name}.weight" for name in adapted_layers(module)}
    module.load_state_dict({key: value for key, value in merged.items() if key not in adapted} | dict(lora))


def merge_lora(module: nn.Module) -> None:
    """Put the corrections into the weights for good; afterwards it is a plain model with the same answers."""
    for name in adapted_layers(module):
        parametrize.remove_parametrizations(module.get_submodule(name), "weight", leave_parametrized=True)
