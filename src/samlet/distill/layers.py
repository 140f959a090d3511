"""Where in the image encoders student and teacher are compared, and what brings the two to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from samlet.data.streams import Stream, generator, name_index
from samlet.distill.views import NECK, View
from samlet.errors import ConfigError
from samlet.frames import valid_cells
from samlet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

COVER_FLOOR = 1e-6
PLACES = 64  # rows of an attention matrix that are compared; all of a global one's are 16 million weights a head


class Layer(NamedTuple):
    """A student's tap that learns from a teacher's."""

    student: str
    teacher: str
    projection: Literal["none", "neck", "pca", "learnt"]

    @property
    def name(self) -> str:
        """How projections and views call it."""
        return f"{self.student}>{self.teacher}:{self.projection}"

    @property
    def has_weights(self) -> bool:
        """Whether a module of its own brings it to one shape."""
        return self.projection in ("pca", "learnt")

    def tapped(self, name: str) -> str:
        """A tap of this layer as models are asked for it."""
        return f"{name}{NECK}" if self.projection == "neck" and name.startswith("blocks.") else name


def asked(*taps: str) -> tuple[str, ...]:
    """Taps that `encode` does not return anyway."""
    return tuple(tap for tap in taps if tap != "neck")


def tapped(view: View, tap: str) -> Float[Tensor, "B C h w"]:
    """A tap's map."""
    return view.features.embedding if tap == "neck" else view.features.taps[tap]


def matched(
    term: str, layer: Layer, student: View, teacher: View, batch: Batch
) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
    """The two maps of a layer, channels and grids alike.

    Raises:
        ConfigError: they are not, and the layer's projection does not make them so; names both and the remedy.
    """
    if layer.has_weights:
        of_student, of_teacher = student.features.taps[layer.name], teacher.features.taps[layer.name]
    else:
        of_student = tapped(student, layer.tapped(layer.student))
        of_teacher = tapped(teacher, layer.tapped(layer.teacher))
    if layer.projection != "none":
        of_student, of_teacher = on_coarser_grid(of_student, of_teacher, batch)
    remedy = f"set {term}.projection to learnt, or name taps of one shape"
    refuse_unlike(term, (layer.student, of_student), (layer.teacher, of_teacher), remedy)
    return of_student, of_teacher


def refuse_unlike(term: str, student: tuple[str, Tensor], teacher: tuple[str, Tensor], remedy: str) -> None:
    """Refuse two taps, name and value, whose shapes cannot correspond.

    Raises:
        ConfigError: names both, and the remedy.
    """
    if student[1].shape != teacher[1].shape:
        one, other = (" x ".join(map(str, value.shape[1:])) for _, value in (student, teacher))
        raise ConfigError(
            f"distillation.{term}: the student's {student[0]} is {one}, the teacher's {teacher[0]} {other}; {remedy}"
        )


def on_coarser_grid(
    one: Float[Tensor, "B C h w"], other: Float[Tensor, "B D a b"], batch: Batch
) -> tuple[Float[Tensor, "B C c c"], Float[Tensor, "B D c c"]]:
    """Both maps on the grid of the coarser: means over cells, in which padding does not count."""
    grid = min(one.shape[-1], other.shape[-1])
    return _pooled(one, grid, batch), _pooled(other, grid, batch)


def _pooled(maps: Float[Tensor, "B C h w"], grid: int, batch: Batch) -> Float[Tensor, "B C grid grid"]:
    if maps.shape[-1] == grid:
        return maps
    covered = valid_cells(batch.input_sizes, maps.shape[-1], batch.pixels.shape[-1])[:, None].to(maps.dtype)
    total = F.adaptive_avg_pool2d(covered, grid).clamp_min(COVER_FLOOR)
    return F.adaptive_avg_pool2d(maps * covered, grid) / total


def sampled_places(batch: Batch, count: int) -> Float[Tensor, "B count 2"]:
    """Places on each image, uniformly drawn: (y, x) as shares of the input frame's side, never in the padding.

    A function of `batch.draw` and the image's name, so that no split into batches changes it.
    """
    drawn = []
    for name in batch.image_ids:
        word = name_index(name)
        drawn.append(torch.from_numpy(generator(Stream.PLACES, batch.draw, index=word).random((count, 2))))
    inside = torch.stack(drawn) * (1 - 1e-4)  # rounded to float32, no place falls off the image's edge
    shares = batch.input_sizes.double() / batch.pixels.shape[-1]
    return (inside.to(shares.device) * shares[:, None]).float()


def first_of_each(cells: Int[Tensor, "B N 2"]) -> Float[Tensor, "B N"]:
    """1 for a cell that none before it in its row equals, else 0."""
    same = (cells[:, :, None] == cells[:, None]).all(dim=3)
    return (~same.tril(-1).any(dim=2)).float()


def attention_places(batch: Batch, taps: Sequence[str]) -> Float[Tensor, "B Q 2"] | None:
    """Where attention is read, the same places for student and teachers; None where none of the taps is attention."""
    return sampled_places(batch, PLACES) if any(tap.startswith("attention.") for tap in taps) else None
