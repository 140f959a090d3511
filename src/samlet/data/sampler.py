"""Which images a step sees: a pure function of the seed, the epoch and the step, whoever asks and from wherever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samlet.data.streams import Stream, generator
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Int64


class SampleKey(NamedTuple):
    """Names one training sample for ever: image `index` as it is drawn in `epoch`."""

    epoch: int
    index: int  # type: ignore[assignment]  # tuple.index is of no use here


def epoch_order(length: int, seed: int, epoch: int) -> Int64[np.ndarray, "length"]:
    """The order in which an epoch visits its images: a permutation of 0..length-1."""
    return generator(Stream.ORDER, seed, epoch).permutation(length)


class StepSampler:
    """Micro-batches of `SampleKey` for one rank, from any position on: a torch `batch_sampler`.

    An epoch is ceil(length / batch_size) micro-batches, so each image is seen at least once; the last one is
    filled up from the start of the same epoch's permutation (again and again where it is shorter than a batch).
    `batch_size` counts over all ranks: rank r takes every world-th key of the global micro-batch, so its
    images do not depend on the number of ranks.

    Args:
        length: number of images.
        seed: the run's seed.
        batch_size: images in a global micro-batch.
        rank: this process among `world`.
        world: number of processes.
        start_epoch: the epoch to begin in.
        start_step: the micro-batch of that epoch to begin with; the epoch's length means the next epoch.
        epochs: the epoch to stop before; None goes on for ever.

    Raises:
        DataError: there are no images, or the batch cannot be shared evenly among the ranks.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_epoch: int = 0,
        start_step: int = 0,
        epochs: int | None = None,
    ) -> None:
        if length < 1:
            raise DataError("The training split holds no image that can be used; `samlet check-data` says why")
        if batch_size < 1 or batch_size % world:
            raise DataError(
                f"batch_size {batch_size} cannot be shared by {world} processes; give a multiple of {world}"
            )
        self.length, self.seed, self.batch_size = length, seed, batch_size
        self.rank, self.world, self.epochs = rank, world, epochs
        self.steps_per_epoch = -(-length // batch_size)
        self.start_epoch = start_epoch + start_step // self.steps_per_epoch
        self.start_step = start_step % self.steps_per_epoch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, step = self.start_epoch, self.start_step
        while self.epochs is None or epoch < self.epochs:
            order = epoch_order(self.length, self.seed, epoch)
            for position in range(step, self.steps_per_epoch):
                yield self._share(order, epoch, position)
            epoch, step = epoch + 1, 0

    def __len__(self) -> int:
        """Micro-batches still to come.

        Raises:
            TypeError: the sampler goes on for ever.
        """
        if self.epochs is None:
            raise TypeError("an endless StepSampler has no length")
        return max(0, (self.epochs - self.start_epoch) * self.steps_per_epoch - self.start_step)

    def _share(self, order: Int64[np.ndarray, "length"], epoch: int, step: int) -> list[SampleKey]:
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world]
        return [SampleKey(epoch, int(order[place % self.length])) for place in places]
