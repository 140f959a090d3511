"""What the automatic generator asks a model: low-res answers to clicks on a part of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from samlet.frames import to_input_coords
from samlet.models.predictor import Predictor, make_prompts
from samlet.types import ImageFeatures

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor


class Answers(NamedTuple):
    """Of the clicks that got an answer: their rows, and three masks each."""

    rows: Int[Tensor, "k"]
    low_res_logits: Float[Tensor, "k 3 h w"]
    iou: Float[Tensor, "k 3"]


class PointPredictor(Protocol):
    """What stands behind the generator; tests put a stand-in here."""

    input_size: tuple[int, int] | None  # (H, W) that the image which is set takes up of the input frame

    @property
    def image_size(self) -> int:
        """Side of the input frame."""

    def set_image(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Encode a part of an image."""

    def reset_image(self) -> None:
        """Forget it."""

    def at_points(self, points: Float[np.ndarray, "P 2"], min_iou: float | None) -> Answers:
        """P clicks (x, y) in its pixels are P prompts.

        Clicks all of whose estimates are at or under `min_iou` may be left out.
        """


class SamPredictor(Predictor):
    """A Predictor that is asked for many single clicks."""

    @property
    def image_size(self) -> int:
        """Side of the input frame."""
        return self.model.image_size

    @torch.no_grad()
    def at_points(self, points: Float[np.ndarray, "P 2"], min_iou: float | None) -> Answers:
        """P clicks are P prompts of one point (and SAM's padding point); see PointPredictor.

        Raises:
            SamletError: no image is set.
        """
        embedding, (original, frame) = self.get_image_embedding(), self._sizes()
        clicks = torch.as_tensor(points, dtype=torch.float32, device=self.device)[:, None]
        index = torch.zeros(len(clicks), dtype=torch.long, device=self.device)
        prompts = make_prompts(index, to_input_coords(clicks, original, frame), torch.ones_like(index)[:, None])
        out = self.model.decode(ImageFeatures(embedding, {}), prompts, multimask_output=True, min_iou=min_iou)
        rows = torch.arange(len(clicks), device=self.device)
        rows = rows if out.kept is None else rows[out.kept]
        return Answers(rows, out.low_res_logits.float(), out.iou_predictions.float())
