"""P8: the order of samples is f(seed, epoch), whatever the workers, the ranks and the resume point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, PromptConfig
from samlet.data.dataset import SegmentationDataset
from samlet.data.sampler import SampleKey, StepSampler, epoch_order
from samlet.errors import DataError
from samlet.types import Batch, Prompts
from tests.data.builders import config, write_small


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_sees_every_image_and_fills_the_last_batch(length: int, batch: int, seed: int) -> None:
    steps = list(StepSampler(length, seed, batch, epochs=2))
    per_epoch = -(-length // batch)
    assert len(steps) == 2 * per_epoch == len(StepSampler(length, seed, batch, epochs=2))
    for epoch in range(2):
        keys = [key for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for key in step]
        assert {key.epoch for key in keys} == {epoch}
        indices = [key.index for key in keys]
        assert indices[:length] == epoch_order(length, seed, epoch).tolist()
        assert sorted(indices[:length]) == list(range(length))
        assert indices == (indices[:length] * (batch + 1))[: per_epoch * batch]


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("length", [7, 8])
def test_any_rank_and_any_resume_point_sees_the_same_global_batches(length: int) -> None:
    reference = list(StepSampler(length, 3, 4, epochs=3))
    for step in range(len(reference) + 1):
        epoch, within = divmod(step, 2)
        for world in (1, 2, 4):
            ranks = [
                list(StepSampler(length, 3, 4, rank=rank, world=world, start_epoch=epoch, start_step=within, epochs=3))
                for rank in range(world)
            ]
            joined = [
                [share[place] for place in range(4 // world) for share in shares] for shares in zip(*ranks, strict=True)
            ]
            assert joined == reference[step:]


def test_a_step_at_the_end_of_an_epoch_is_the_next_epoch() -> None:
    assert next(iter(StepSampler(7, 0, 4, start_step=2))) == next(iter(StepSampler(7, 0, 4, start_epoch=1)))


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size 3 cannot be shared by 2"):
        StepSampler(10, 0, 3, world=2)
    with pytest.raises(DataError, match="no image"):
        StepSampler(0, 0, 3)


_FIELDS = [*Batch._fields[:2], *Prompts._fields, *Batch._fields[3:]]


def _flat(batch: Batch) -> list[object]:
    return [
        tensor.tolist() if isinstance(tensor, torch.Tensor) else tensor
        for tensor in (*batch[:2], *batch[2], *batch[3:])
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    root = write_small(tmp_path_factory.mktemp("p8"), train=5)
    return config(root).build_train(image_size=32, seed=7, prompts=PromptConfig(), augmentation=AugmentationConfig())


def _load(dataset: SegmentationDataset, sampler: StepSampler, workers: int) -> list[Batch]:
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    return list(loader)


@pytest.fixture(scope="module")
def reference(small: SegmentationDataset) -> list[list[object]]:
    return [_flat(batch) for batch in _load(small, StepSampler(5, 7, 2, epochs=2), 0)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores are meant
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_a_bit(small: SegmentationDataset, reference: list[list[object]], workers: int) -> None:
    batches = _load(small, StepSampler(5, 7, 2, start_step=1, epochs=2), workers)
    assert [_flat(batch) for batch in batches] == reference[1:]


def test_two_ranks_hold_the_samples_of_one(small: SegmentationDataset, reference: list[list[object]]) -> None:
    ranks = [_load(small, StepSampler(5, 7, 2, rank=rank, world=2, epochs=2), 0) for rank in range(2)]
    for first, second, whole in zip(ranks[0], ranks[1], reference, strict=True):
        for place in ("pixels", "masks"):
            joined = torch.cat([getattr(first, place), getattr(second, place)])
            assert joined.tolist() == whole[_FIELDS.index(place)]


def test_global_generators_are_neither_read_nor_moved(small: SegmentationDataset) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    legacy = repr(np.random.get_state(legacy=False))  # noqa: NPY002
    first = small[SampleKey(0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert legacy == repr(np.random.get_state(legacy=False))  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(first.pixels, small[SampleKey(0, 1)].pixels)


def test_epochs_vary_images_and_prompts(small: SegmentationDataset) -> None:
    first, second = small[SampleKey(0, 1)], small[SampleKey(1, 1)]
    assert not torch.equal(first.pixels, second.pixels)
