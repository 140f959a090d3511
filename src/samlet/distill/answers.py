"""Which of a prompt's four masks is its answer, and how good that answer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from samlet.frames import valid_cells
from samlet.losses.iou import actual_iou
from samlet.types import Batch, MaskOutput

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def is_ambiguous(batch: Batch) -> Bool[Tensor, "P"]:
    """True where a prompt is a single click: it may mean a part, an object or a group, so three masks answer it."""
    return (batch.prompts.point_labels >= 0).sum(dim=1) == 1


def answering_masks(batch: Batch) -> Float[Tensor, "P 4"]:
    """Share of each of the four masks in the answer: the three alike for a single click, else the single mask."""
    three = torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3], device=batch.pixels.device)
    single = torch.tensor([1.0, 0.0, 0.0, 0.0], device=batch.pixels.device)
    return torch.where(is_ambiguous(batch)[:, None], three, single)


def valid_per_prompt(batch: Batch, grid: int) -> Float[Tensor, "P grid grid"]:
    """Share of each cell that the prompt's image covers."""
    return valid_cells(batch.input_sizes, grid, batch.pixels.shape[-1])[batch.prompts.image_index]


def share_of_image(batch: Batch, counted: Bool[Tensor, "P"] | None = None) -> Float[Tensor, "P"]:
    """1 / (number of counted prompts of the same image) for each counted prompt, 0 for the others; None: all count."""
    counted = torch.ones_like(batch.labelled) if counted is None else counted
    numbers = torch.zeros(len(batch.image_ids), dtype=torch.int64, device=counted.device)
    numbers = numbers.index_add(0, batch.prompts.image_index, counted.long())
    return counted.float() / numbers.clamp_min(1)[batch.prompts.image_index]


class Answer(NamedTuple):
    """The one mask that a model would show for each prompt, and how sure it is of it."""

    logits: Float[Tensor, "P h w"]
    confidence: Float[Tensor, "P"]  # its own estimate of the mask's IoU, clipped to 0..1


@torch.no_grad()
def answer_of(output: MaskOutput, batch: Batch) -> Answer:
    """The most confident of the masks that answer, as SAM chose them in its training (arXiv:2304.02643, A)."""
    eligible = answering_masks(batch) > 0
    chosen = output.iou_predictions.float().masked_fill(~eligible, -torch.inf).argmax(dim=1)
    rows = torch.arange(len(chosen), device=chosen.device)
    return Answer(output.low_res_logits[rows, chosen], output.iou_predictions[rows, chosen].float().clamp(0, 1))


@torch.no_grad()
def best_iou(output: MaskOutput, batch: Batch) -> Float[Tensor, "P"]:
    """IoU with the ground truth of the best mask among those that answer; 0 where there is no ground truth."""
    logits = output.low_res_logits.float()
    found = actual_iou(logits, batch.masks, valid_per_prompt(batch, logits.shape[-1]))
    return (found * (answering_masks(batch) > 0)).amax(dim=1) * batch.labelled
