"""Windows of maps that are not square, and their padding."""

from __future__ import annotations

import pytest
import torch

from samlet.models.windows import pad_to_multiple, partition, unpartition


@pytest.mark.parametrize("size", [(6, 9), (5, 9), (6, 7), (2, 10), (3, 3)])
def test_a_map_comes_back_from_its_windows(size: tuple[int, int]) -> None:
    tokens = torch.arange(2 * size[0] * size[1] * 4.0).view(2, *size, 4)
    filler = torch.tensor([-1.0, -2, -3, -4])
    padded = pad_to_multiple(tokens, 3, filler)
    assert padded.shape[1:3] == (-(-size[0] // 3) * 3, -(-size[1] // 3) * 3)
    assert torch.equal(padded[:, : size[0], : size[1]], tokens)
    assert (padded[:, size[0] :] == filler).all()
    assert (padded[:, :, size[1] :] == filler).all()
    windows = partition(padded, 3)
    assert torch.equal(windows[0], padded[0, :3, :3].reshape(9, 4))
    assert torch.equal(windows[-1], padded[-1, -3:, -3:].reshape(9, 4))
    assert torch.equal(unpartition(windows, 3, size), tokens)
