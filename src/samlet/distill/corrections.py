"""Prompts in the loop: after an answer, one more click where it is wrong, for student and teachers alike.

The click falls uniformly on the cells where the student's answer differs from the reference: positive where it
misses, negative where it overshoots (arXiv:2304.02643, A; arXiv:2312.06660, 3.3). The reference is the ground truth,
and without one what the teachers say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from samlet.data.streams import Stream, generator, name_index
from samlet.distill.answers import answer_of, valid_per_prompt
from samlet.types import NEGATIVE, PADDING, POSITIVE, Batch, MaskOutput, Prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Corrections(NamedTuple):
    """How often, and how, prompts are corrected."""

    rounds: int = 0
    mask_input: bool = False  # give both models the student's last logits, too
    min_cells: int = 10  # an answer that is wrong in fewer low-res cells gets no click


@torch.no_grad()
def corrected(
    batch: Batch,
    student: MaskOutput,
    teachers: Sequence[tuple[float, MaskOutput]],
    settings: Corrections,
    draw: Float[Tensor, "P"],
) -> Prompts:
    """The batch's prompts with a click more in the student's error; a hole where the error is too small.

    `batch.prompts` are those that `student` and `teachers` (share, output) answered; `draw` (`draws`, 0 to 1) says
    where in the error. What is known to lie on no object gets no click.
    """
    said = answer_of(student, batch).logits > 0
    wanted, known = reference(batch, teachers)
    inside = valid_per_prompt(batch, said.shape[-1]) > 0.5
    error = (said != wanted) & inside & known[:, None, None]
    clicked = error.flatten(1).sum(dim=1) >= max(settings.min_cells, 1)
    rows, columns = uniform_cell(error, draw.to(error.device))
    side = batch.pixels.shape[-1] / error.shape[-1]  # of a cell, in pixels of the input frame
    points = torch.stack([columns, rows], dim=1) * side + (side - 1) / 2
    missed = wanted[torch.arange(len(rows), device=rows.device), rows, columns]
    labels = torch.where(missed, POSITIVE, NEGATIVE).where(clicked, torch.tensor(PADDING, device=missed.device))
    prompts = with_click(batch.prompts, points, labels, clicked)
    if not settings.mask_input:
        return prompts._replace(mask_input=None)
    logits = answer_of(student, batch).logits.detach()[:, None]
    return prompts._replace(mask_input=logits.to(torch.promote_types(logits.dtype, torch.float32)))


def reference(
    batch: Batch, teachers: Sequence[tuple[float, MaskOutput]]
) -> tuple[Bool[Tensor, "P h w"], Bool[Tensor, "P"]]:
    """The masks that an answer is held against, and which prompts have one."""
    truth = batch.masks > 0.5
    if not teachers:
        return truth, batch.labelled
    votes = [share * answer_of(output, batch).logits.float().sigmoid() for share, output in teachers]
    taught = torch.stack(votes).sum(dim=0) > 0.5
    known = torch.ones_like(batch.labelled) if batch.background is None else ~batch.background
    return torch.where(batch.labelled[:, None, None], truth, taught), known


def uniform_cell(allowed: Bool[Tensor, "P h w"], draw: Float[Tensor, "P"]) -> tuple[Tensor, Tensor]:
    """(row, column) of the true cell at the share `draw` (0 <= draw < 1) of all true cells in reading order."""
    reached = allowed.flatten(1).cumsum(dim=1)
    target = (draw * reached[:, -1]).floor().clamp_max(reached[:, -1] - 1).clamp_min(0) + 1
    place = torch.searchsorted(reached, target[:, None].to(reached.dtype)).squeeze(1).clamp_max(reached.shape[1] - 1)
    width = allowed.shape[2]
    return torch.div(place, width, rounding_mode="floor"), place % width


def draws(batch: Batch, number: int) -> Float[Tensor, "P"]:
    """A number in 0..1 for each prompt that no other image of the batch and no split of it changes.

    A function of `batch.draw`, the image's name, the prompt's place in the image, and the round.
    """
    index = batch.prompts.image_index.cpu()
    drawn = torch.zeros(len(index), dtype=torch.float64)
    for image, name in enumerate(batch.image_ids):
        own = torch.nonzero(index == image).flatten()
        word = name_index(name)
        drawn[own] = torch.from_numpy(
            generator(Stream.CORRECTION, batch.draw, index=word, item=number).random(len(own))
        )
    return drawn


def with_click(prompts: Prompts, points: Float[Tensor, "P 2"], labels: Tensor, clicked: Bool[Tensor, "P"]) -> Prompts:
    """One token more in each row; a hole where nothing was clicked."""
    coords = torch.cat([prompts.point_coords, points[:, None].to(prompts.point_coords.dtype)], dim=1)
    marks = torch.cat([prompts.point_labels, labels[:, None].to(prompts.point_labels.dtype)], dim=1)
    absent = torch.zeros_like(prompts.point_labels, dtype=torch.bool) if prompts.absent is None else prompts.absent
    return prompts._replace(
        point_coords=coords, point_labels=marks, absent=torch.cat([absent, ~clicked[:, None]], dim=1)
    )
