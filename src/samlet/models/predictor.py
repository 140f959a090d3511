"""Masks for prompts on one image, with the interface of SAM's SamPredictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from samlet.errors import SamletError
from samlet.frames import postprocess_masks, preprocess, to_input_coords
from samlet.types import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING, ImageFeatures, Prompts

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

    from samlet.models.sam import Sam


def make_prompts(
    image_index: Int[Tensor, "P"],
    points: Float[Tensor, "P N 2"] | None = None,
    labels: Int[Tensor, "P N"] | None = None,
    boxes: Float[Tensor, "P 4"] | None = None,
    mask_input: Float[Tensor, "P 1 h w"] | None = None,
) -> Prompts:
    """Prompts as SAM orders their tokens: points, then one padding point or the box's two corners. Input frame.

    Raises:
        SamletError: points without labels or the other way round, or numbers of prompts that differ.
    """
    count = image_index.shape[0]
    if (points is None) != (labels is None):
        raise SamletError("points and labels: give both or neither")
    for name, given in (("points", points), ("labels", labels), ("boxes", boxes), ("mask_input", mask_input)):
        if given is not None and given.shape[0] != count:
            raise SamletError(f"{name}: {given.shape[0]} rows for {count} prompts")
    like = next((x for x in (points, boxes, mask_input) if x is not None), torch.zeros(0, device=image_index.device))
    coords, kinds = [like.new_zeros(count, 0, 2)], [image_index.new_zeros(count, 0)]
    if points is not None and labels is not None:
        coords.append(points)
        kinds.append(labels.to(image_index.dtype))
    if boxes is not None:
        coords.append(boxes.reshape(-1, 2, 2))
        kinds.append(image_index.new_tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]).expand(count, 2))
    elif points is not None:
        coords.append(like.new_zeros(count, 1, 2))
        kinds.append(image_index.new_full((count, 1), PADDING))
    return Prompts(image_index, torch.cat(coords, 1), torch.cat(kinds, 1), mask_input)


def check_image(image: object) -> None:
    """Refuse what is no RGB image.

    Raises:
        SamletError: not an (H, W, 3) array of uint8, or one without a pixel.
    """
    is_rgb = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not is_rgb or not image.size:  # type: ignore[attr-defined]
        found = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise SamletError(f"image: must be a numpy array of uint8 and shape (H, W, 3), not empty, not {found}")


class Predictor:
    """Encode an image once with `set_image`, then ask for masks as often as you like."""

    def __init__(self, sam: Sam) -> None:
        self.model = sam
        self.reset_image()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.pixel_mean.device

    @property
    def features(self) -> Float[Tensor, "1 256 h w"] | None:
        """The image embedding, if an image is set."""
        return None if self._features is None else self._features.embedding

    def reset_image(self) -> None:
        """Forget the image."""
        self._features: ImageFeatures | None = None
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None
        self.is_image_set = False

    def set_image(self, image: UInt8[np.ndarray, "H W 3"], image_format: Literal["RGB", "BGR"] = "RGB") -> None:
        """Preprocess and encode an image.

        Raises:
            SamletError: not an (H, W, 3) array of uint8; an unknown format; a model in training mode.
        """
        if image_format not in ("RGB", "BGR"):
            raise SamletError(f"image_format '{image_format}': must be RGB or BGR")
        check_image(image)
        rgb = np.ascontiguousarray(image[..., ::-1]) if image_format == "BGR" else image
        pixels, input_size = preprocess(rgb, self.model.image_size)
        self._encode(pixels[None], input_size, (image.shape[0], image.shape[1]))

    def set_torch_image(
        self, transformed_image: Float[Tensor, "1 3 h w"], original_image_size: tuple[int, int]
    ) -> None:
        """Normalise, pad and encode an RGB image of values 0..255 whose longest side is the input frame's already.

        Raises:
            SamletError: an image of another size; a model in training mode.
        """
        size = self.model.image_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != size:
            raise SamletError(f"transformed_image: must be (1, 3, h, w) with a longest side of {size}, not {shape}")
        pixels = (transformed_image.to(self.device) - self.model.pixel_mean) / self.model.pixel_std
        pixels = F.pad(pixels, (0, size - shape[3], 0, size - shape[2]))
        self._encode(pixels, (shape[2], shape[3]), (original_image_size[0], original_image_size[1]))

    def predict(  # noqa: PLR0917 - SamPredictor's signature
        self,
        point_coords: Float[np.ndarray, "N 2"] | None = None,
        point_labels: Int[np.ndarray, "N"] | None = None,
        box: Float[np.ndarray, "4"] | None = None,
        mask_input: Float[np.ndarray, "1 h w"] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, Float[np.ndarray, "M"], Float[np.ndarray, "M h w"]]:
        """Masks (M, H, W) of one prompt in pixels of the original image, their estimated IoU, and low-res logits.

        Raises:
            SamletError: no image is set; points without labels or the other way round.
        """
        original, frame = self._sizes()
        if (point_coords is None) != (point_labels is None):
            raise SamletError("point_coords and point_labels: give both or neither")

        def place(coords: np.ndarray, shape: tuple[int, ...]) -> Tensor:
            tensor = torch.as_tensor(coords, dtype=torch.float32, device=self.device)
            return to_input_coords(tensor.reshape(shape), original, frame)

        points = None if point_coords is None else place(point_coords, (1, -1, 2))
        labels = None if point_labels is None else torch.as_tensor(point_labels, device=self.device).reshape(1, -1)
        boxes = None if box is None else place(box, (1, 2, 2)).reshape(1, 4)
        masks_in = None
        if mask_input is not None:
            masks_in = torch.as_tensor(mask_input, dtype=torch.float32, device=self.device)[None]
        answer = self.predict_torch(points, labels, boxes, masks_in, multimask_output, return_logits)
        masks, iou, low_res = (x[0].cpu().numpy() for x in answer)
        return masks, iou, low_res

    @torch.no_grad()
    def predict_torch(  # noqa: PLR0917 - SamPredictor's signature
        self,
        point_coords: Float[Tensor, "P N 2"] | None = None,
        point_labels: Int[Tensor, "P N"] | None = None,
        boxes: Float[Tensor, "P 4"] | None = None,
        mask_input: Float[Tensor, "P 1 h w"] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Float[Tensor, "P M"], Float[Tensor, "P M h w"]]:
        """As `predict`, for P prompts at once, in tensors, with coordinates in the input frame.

        Raises:
            SamletError: no image is set; prompts that do not fit each other.
        """
        original, frame = self._sizes()
        assert self._features is not None
        given = (point_coords, boxes, mask_input)
        count = next((x.shape[0] for x in given if x is not None), 1)
        index = torch.zeros(count, dtype=torch.long, device=self.device)
        prompts = make_prompts(index, point_coords, point_labels, boxes, mask_input)
        out = self.model.decode(self._features, prompts, multimask_output)
        low_res = out.low_res_logits.float()
        logits = postprocess_masks(low_res, frame, original, self.model.image_size)
        return logits if return_logits else logits > 0, out.iou_predictions.float(), low_res

    def get_image_embedding(self) -> Float[Tensor, "1 256 h w"]:
        """The image embedding.

        Raises:
            SamletError: no image is set.
        """
        self._sizes()
        assert self._features is not None
        return self._features.embedding

    @torch.no_grad()
    def _encode(self, pixels: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> None:
        if self.model.training:
            raise SamletError("the model is in training mode, where predicting would change it: call sam.eval() first")
        self.reset_image()
        self._features = self.model.encode(pixels.to(self.device))
        self.original_size, self.input_size, self.is_image_set = original_size, input_size, True

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.original_size is None or self.input_size is None:
            raise SamletError("no image is set: call set_image first")
        return self.original_size, self.input_size
