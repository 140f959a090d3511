"""Windowed attention's geometry: a map in square windows and back, padded with what a padded token projects to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def pad_to_multiple(
    tokens: Float[Tensor, "B h w C"], window: int, filler: Float[Tensor, "C"]
) -> Float[Tensor, "B H W C"]:
    """Fill up with `filler` on the right and below, to the next multiple of `window`.

    Upstream pads before the projections, so a padded token's query, key and value are constants: they are put
    in here after the projections, which then work on real tokens alone. Exact.
    """
    batch, height, width, channels = tokens.shape
    below, right = -height % window, -width % window
    if right:
        tokens = torch.cat([tokens, filler.to(tokens.dtype).expand(batch, height, right, channels)], 2)
    if below:
        tokens = torch.cat([tokens, filler.to(tokens.dtype).expand(batch, below, width + right, channels)], 1)
    return tokens


def partition(tokens: Float[Tensor, "B H W C"], window: int) -> Float[Tensor, "n L C"]:
    """Cut a map whose sides are multiples of `window` into n windows of L = window^2 tokens."""
    batch, height, width, channels = tokens.shape
    tiles = tokens.view(batch, height // window, window, width // window, window, channels)
    return tiles.transpose(2, 3).reshape(-1, window * window, channels)


def unpartition(windows: Float[Tensor, "n L C"], window: int, size: tuple[int, int]) -> Float[Tensor, "B h w C"]:
    """Put windows back into their map and cut the padding off."""
    rows, columns = -(-size[0] // window), -(-size[1] // window)
    tiles = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    tokens = tiles.reshape(-1, rows * window, columns * window, windows.shape[-1])
    return tokens[:, : size[0], : size[1]]
