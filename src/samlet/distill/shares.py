"""How much each teacher's word counts for each object, and how much the ground truth's does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from samlet.distill.answers import answer_of, best_iou, share_of_image, valid_per_prompt
from samlet.distill.configs import TeamRule, TrustRule
from samlet.losses.iou import actual_iou
from samlet.types import Batch, MaskOutput

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

IOU_FLOOR = 1e-6  # under a student's IoU in the ratio that decides on hard masks


class Shares(NamedTuple):
    """Factors of K teachers' terms and of the ground truth's."""

    per_prompt: Float[Tensor, "K P"]
    per_image: Float[Tensor, "K B"]
    truth: Float[Tensor, "P"]  # of the mask terms of the task loss


@torch.no_grad()
def shares_of(
    weights: Sequence[float],
    batch: Batch,
    student: MaskOutput,
    teachers: Sequence[MaskOutput],
    of_image: Float[Tensor, "P"] | None = None,
    *,
    team: TeamRule = "static",
    trust: TrustRule = "constant",
) -> Shares:
    """Shares of the teachers for each prompt and image, by rule.

    team "static": the given weights. "per_sample": all of it to the teacher whose mask has the best IoU with the ground
    truth, without one to the most confident; an image's share is the mean over its prompts, of which each counts by
    `of_image`; None: all of them are here.

    trust "constant": 1 for all. "hard_mask": sigmoid(IoU(teacher, truth) / IoU(student, truth) - 1) on the teacher's
    terms, so that it counts most where it is right and the student wrong (TinySAM, arXiv:2312.13789). "confidence":
    c on the teacher's terms and 1 - c on the ground truth's, with c the teacher's own estimate of its IoU
    (PicoSAM2, arXiv:2506.18807). Where there is no ground truth the teacher counts in full.
    """
    index, images = batch.prompts.image_index, len(batch.image_ids)
    fixed = torch.tensor(weights, device=index.device)
    by_team = fixed[:, None].expand(-1, len(index))
    if team == "per_sample" and len(weights) > 1:
        by_team = F.one_hot(_winners(batch, teachers), len(weights)).t().float()
    trusted, truth = torch.ones_like(by_team), torch.ones(len(index), device=index.device)
    if trust == "hard_mask" and teachers:
        known = best_iou(student, batch)
        ratios = torch.stack([best_iou(teacher, batch) / (known + IOU_FLOOR) for teacher in teachers])
        trusted = torch.where(batch.labelled, torch.sigmoid(ratios - 1), 1.0)
    elif trust == "confidence" and teachers:
        sure = torch.stack([answer_of(teacher, batch).confidence for teacher in teachers])
        trusted = torch.where(batch.labelled, sure, 1.0)
        truth = torch.where(batch.labelled, 1 - (by_team * sure).sum(dim=0), 1.0)
    of_image = share_of_image(batch) if of_image is None else of_image
    per_image = by_team @ (F.one_hot(index, images) * of_image[:, None])
    return Shares(by_team * trusted, per_image, truth)


def _winners(batch: Batch, teachers: Sequence[MaskOutput]) -> Tensor:
    by_truth = torch.stack([best_iou(teacher, batch) for teacher in teachers])
    by_confidence = torch.stack([answer_of(teacher, batch).confidence for teacher in teachers])
    return torch.where(batch.labelled, by_truth, by_confidence).argmax(dim=0)


@torch.no_grad()
def agreement(batch: Batch, teachers: Sequence[MaskOutput]) -> Float[Tensor, "P"]:
    """Mean IoU between the answers of every two teachers, over the unpadded image."""
    said = [answer_of(teacher, batch).logits.float() for teacher in teachers]
    valid = valid_per_prompt(batch, said[0].shape[-1])
    pairs = [actual_iou(one[:, None], (other > 0).float(), valid)[:, 0] for one, other in combinations(said, 2)]
    return torch.stack(pairs).mean(dim=0)
