"""The regression of the IoU head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from samlet.losses.reduction import (
    Reduction,
    check_cells,
    check_dims,
    check_same_shape,
    in_full_precision,
    mean_over_cells,
    reduce_items,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

IouKind = Literal["l1", "mse"]


@torch.no_grad()
def actual_iou(
    logits: Float[Tensor, "P M h w"], masks: Float[Tensor, "P h w"], valid: Float[Tensor, "P h w"] | None
) -> Float[Tensor, "P M"]:
    """Intersection over union of `logits > 0` and the covered share of each cell; 0 where both are empty."""
    predicted = (logits > 0).to(logits.dtype)
    target = masks.to(logits.dtype)[:, None]
    overlap = mean_over_cells(predicted * target, valid)
    union = mean_over_cells(predicted, valid) + mean_over_cells(target, valid) - overlap
    return overlap / union.clamp_min(torch.finfo(logits.dtype).tiny)


@torch.no_grad()
def best_fit_iou(
    logits: Float[Tensor, "P M h w"],
    objects: Float[Tensor, "O h w"],
    shared: Bool[Tensor, "P O"],
    valid: Float[Tensor, "P h w"] | None,
) -> Float[Tensor, "P M"]:
    """The largest `actual_iou` of each mask with any object; 0 where there is none.

    `shared` tells which objects are in the image of which prompt.
    """
    seen = torch.ones_like(logits[:, 0], dtype=objects.dtype) if valid is None else valid.to(objects.dtype)
    predicted, cells = (logits > 0) * seen[:, None], objects.flatten(1).mT
    overlap, area = predicted.flatten(2) @ cells, seen.flatten(1) @ cells
    union = predicted.sum(dim=(2, 3))[..., None] + area[:, None] - overlap
    iou = overlap / union.clamp_min(torch.finfo(objects.dtype).tiny) * shared[:, None]
    return F.pad(iou, (1, 0)).amax(dim=2)


def iou_error_per_mask(
    iou_predictions: Float[Tensor, "P M"], actual: Float[Tensor, "P M"], kind: IouKind
) -> Float[Tensor, "P M"]:
    """The error of each predicted IoU."""
    error = iou_predictions - actual
    return error.abs() if kind == "l1" else error.square()


@in_full_precision
def iou_loss(
    iou_predictions: Float[Tensor, "P M"],
    logits: Float[Tensor, "P M h w"],
    masks: Float[Tensor, "P h w"],
    valid: Float[Tensor, "P h w"] | None = None,
    *,
    kind: IouKind = "l1",
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "P"]:
    """How far the raw IoU head is from the IoU that its masks really have; mean over masks.

    L = |u - IoU(logits > 0, y)|  ("l1", SAM 2, arXiv:2408.00714)   or its square  ("mse", SAM, arXiv:2304.02643)

    SAM 1's head is a raw regression: no sigmoid here, none at inference. The IoU is a target, not a
    function of the logits: gradient flows to `iou_predictions` only.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind.
    """
    check_dims(logits, 4, "logits")
    check_same_shape(iou_predictions, logits[..., 0, 0], "iou_predictions and the masks' (P, M)")
    check_cells(logits, masks, "masks")
    check_cells(logits, valid, "valid")
    if kind not in ("l1", "mse"):
        raise ValueError(f"kind must be 'l1' or 'mse', got {kind!r}")
    error = iou_error_per_mask(iou_predictions, actual_iou(logits, masks, valid), kind)
    return reduce_items(error.mean(dim=1), reduction)
