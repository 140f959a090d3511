"""The supervised loss: focal, dice and IoU of the mask that the prompt asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samlet.losses.dice import dice_per_mask
from samlet.losses.focal import focal_per_mask
from samlet.losses.iou import IouKind, actual_iou, iou_error_per_mask
from samlet.losses.reduction import check_cells, check_dims, check_same_shape, in_full_precision

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

NUM_MASKS = 4  # the single mask, then the three of an ambiguous prompt


@torch.no_grad()
def chosen_masks(
    low_res_logits: Float[Tensor, "P 4 h w"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None,
    ambiguous: Bool[Tensor, "P"],
    *,
    w_focal: float = 20.0,
    w_dice: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Int[Tensor, "P"]:
    """Index of the mask to train: 0, or of 1..3 the one with the least loss where the prompt is ambiguous."""
    three = low_res_logits[:, 1:]
    cost = w_focal * focal_per_mask(three, masks, valid, alpha, gamma)
    cost = cost + w_dice * dice_per_mask(three, masks, valid)
    return torch.where(ambiguous, cost.argmin(dim=1) + 1, 0)


@in_full_precision
def task_loss(
    low_res_logits: Float[Tensor, "P 4 h w"],
    iou_predictions: Float[Tensor, "P 4"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None,
    ambiguous: Bool[Tensor, "P"],
    *,
    actual: Float[Tensor, "P 4"] | None = None,
    w_focal: float = 20.0,
    w_dice: float = 1.0,
    iou_kind: IouKind = "l1",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> dict[str, Float[Tensor, "P"]]:
    """The unweighted terms "focal", "dice" and "iou" of each prompt (Kirillov et al. 2023, arXiv:2304.02643).

    A single point is `ambiguous`: of the masks 1..3 only the best by w_focal focal + w_dice dice is trained, and the
    IoU head on all three (as SAM 2, arXiv:2408.00714). Any other prompt trains mask 0 and its IoU alone. The
    weights choose the mask; they do not scale the terms. `masks` is the covered share of each low-res cell. `actual`
    is what the IoU head shall say; None: the IoU with `masks`.

    Raises:
        ValueError: shapes that do not fit; both are named.
    """
    check_dims(low_res_logits, 4, "low_res_logits")
    if low_res_logits.shape[1] != NUM_MASKS:
        raise ValueError(f"low_res_logits must be (P, 4, h, w), got {tuple(low_res_logits.shape)}")
    check_same_shape(iou_predictions, low_res_logits[..., 0, 0], "iou_predictions and the masks' (P, 4)")
    check_cells(low_res_logits, masks, "masks")
    check_cells(low_res_logits, valid, "valid")
    check_same_shape(ambiguous, iou_predictions[:, 0], "ambiguous and the prompts' (P,)")
    settings = {"w_focal": w_focal, "w_dice": w_dice, "alpha": alpha, "gamma": gamma}
    index = chosen_masks(low_res_logits, masks, valid, ambiguous, **settings)
    chosen = low_res_logits.gather(1, index[:, None, None, None].expand(-1, 1, *masks.shape[-2:]))
    if actual is None:
        actual = actual_iou(low_res_logits, masks, valid)
    check_same_shape(actual, iou_predictions, "actual and iou_predictions")
    errors = iou_error_per_mask(iou_predictions, actual, iou_kind)
    return {
        "focal": focal_per_mask(chosen, masks, valid, alpha, gamma)[:, 0],
        "dice": dice_per_mask(chosen, masks, valid)[:, 0],
        "iou": torch.where(ambiguous, errors[:, 1:].mean(dim=1), errors[:, 0]),
    }
