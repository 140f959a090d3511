"""Normalisation layers: LayerNorm over channels of maps, and BatchNorm that can be frozen for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map, at each position by itself; no copy if the map is channels-last."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Normalise every position over C."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics stay put under `.train()` once it is frozen."""

    frozen = False

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, unless frozen."""
        return super().train(mode and not self.frozen)


class Conv2dBN(nn.Sequential):
    """Convolution without bias and its BatchNorm, under TinyViT's names `c` and `bn`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bn_weight: float = 1.0
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.add_module("c", conv)
        norm = BatchNorm2d(outputs)
        nn.init.constant_(norm.weight, bn_weight)
        self.add_module("bn", norm)

    def forward(self, maps: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O h2 w2"]:
        """With fixed statistics one convolution: weight w s, bias beta - mean s, where s = gamma / sqrt(var + eps).

        Gradients reach w, gamma and beta; what is saved is a pass over the map, forward and backward.
        """
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.training or norm.running_var is None or norm.running_mean is None:
            out: Tensor = norm(conv(maps))
            return out
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        return convolve(maps, conv, conv.weight * scale[:, None, None, None], shift)


def convolve(
    maps: Float[Tensor, "B I h w"], conv: nn.Conv2d, weight: Float[Tensor, "O i k k"], bias: Float[Tensor, "O"] | None
) -> Float[Tensor, "B O h2 w2"]:
    """`conv` with other weights; of size 1 it is a linear layer on channels-last maps, which needs no copies."""
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return F.linear(maps.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def freeze_batch_norm(module: nn.Module, frozen: bool = True) -> None:
    """Put every BatchNorm inside into eval mode and keep it there through `.train()`; False gives it free.

    Its running statistics then never move; its weight and bias train on unless `requires_grad` is off.
    """
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.frozen = frozen
            norm.train(module.training)


def neck(channels: int, outputs: int = 256) -> nn.Sequential:
    """SAM's neck: 1x1 and 3x3 convolution to the prompt's width, each with its LayerNorm."""
    return nn.Sequential(
        nn.Conv2d(channels, outputs, 1, bias=False),
        LayerNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        LayerNorm2d(outputs),
    )


def frozen_projection(neck: nn.Sequential, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 256 h w"]:
    """Apply the neck's first convolution with weights that no gradient reaches."""
    first = neck[0]
    assert isinstance(first, nn.Conv2d)
    return F.conv2d(maps, first.weight.detach())
