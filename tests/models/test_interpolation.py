"""The line between two models: its ends to the bit, its middle by hand, and what has no line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlet.errors import CheckpointError
from samlet.models import Sam, build_sam
from samlet.models.interpolation import interpolate_states, moved_statistics, refuse_different
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER


def student(seed: int, **sizes: Any) -> Sam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_sam("vit_t", IMAGE_SIZE, **{**STUDENT, **sizes})


def test_the_middle_by_hand() -> None:
    base = {
        "w": torch.tensor([0.0, 2.0]),
        "bn.running_var": torch.tensor([1.0]),
        "bn.num_batches_tracked": torch.tensor(2),
    }
    tuned = {
        "w": torch.tensor([4.0, -2.0]),
        "bn.running_var": torch.tensor([3.0]),
        "bn.num_batches_tracked": torch.tensor(5),
    }
    mixed = interpolate_states(base, tuned, 0.25)
    assert mixed["w"].tolist() == [1.0, 1.0]
    assert mixed["bn.running_var"].tolist() == [1.5]
    assert mixed["bn.num_batches_tracked"].item() == 3  # 2.75, a whole number again
    assert mixed["bn.num_batches_tracked"].dtype == torch.int64


def test_the_ends_are_the_models_to_the_bit_and_nothing_is_changed() -> None:
    base, tuned = student(1).state_dict(), student(2).state_dict()
    before = copy.deepcopy(base)
    for alpha, end in ((0.0, base), (1.0, tuned)):
        mixed = interpolate_states(base, tuned, alpha)
        assert list(mixed) == list(base)
        assert all(torch.equal(mixed[name], value) for name, value in end.items())
    assert all(torch.equal(base[name], value) for name, value in before.items())


@given(st.floats(0, 1), st.floats(-100, 100), st.floats(-100, 100))
def test_a_point_lies_between_its_ends(alpha: float, start: float, end: float) -> None:
    ends = torch.tensor([start, end])
    mixed = interpolate_states({"w": ends[:1]}, {"w": ends[1:]}, alpha)["w"]
    slack = 1e-5 * (1 + ends.abs().max())
    assert ends.min() - slack <= mixed.item() <= ends.max() + slack


def test_running_statistics_that_moved_are_counted_by_layer() -> None:
    base = student(1).state_dict()
    tuned = copy.deepcopy(base)
    assert moved_statistics(base, tuned) == []
    layer = "image_encoder.patch_embed.seq.0.bn"
    tuned[f"{layer}.running_mean"] += 1
    tuned[f"{layer}.running_var"] += 1
    tuned[f"{layer}.weight"] += 1
    assert moved_statistics(base, tuned) == [layer]


def test_other_shapes_and_other_tensors_are_named() -> None:
    base = student(1)
    refuse_different(base, student(2))
    with pytest.raises(
        CheckpointError, match=r"image_encoder\.patch_embed\.seq\.0\.c\.weight is 4 x 3 x 3 x 3 in the base"
    ):
        refuse_different(base, student(2, embed_dims=[16, 16, 16, 32]))
    with pytest.raises(
        CheckpointError, match=r"image_encoder\.layers\.0\.blocks\.1\..* is in the tuned model alone; .* more"
    ):
        refuse_different(base, student(2, depths=[2, 1, 1, 1]))
    with pytest.raises(CheckpointError, match="from one model to the other"):
        refuse_different(base, build_sam("vit_b", IMAGE_SIZE, **TEACHER))
