"""Predict one mask: what the clicks and the box on an image point at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from samlet.artefacts import write_file
from samlet.errors import SamletError
from samlet.types import NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from jaxtyping import Bool


class Prediction(NamedTuple):
    """A mask in the original frame, and the IoU that the model expects of it."""

    mask: Bool[np.ndarray, "H W"]
    predicted_iou: float


class PointPrompt(NamedTuple):
    """A click in pixels of the original frame."""

    x: float
    y: float
    label: int


class BoxPrompt(NamedTuple):
    """A box in pixels of the original frame."""

    x0: float
    y0: float
    x1: float
    y1: float


def predict(
    checkpoint: str | Path,
    image: Path,
    *,
    points: Sequence[str] = (),
    box: str | None = None,
    out: Path = Path("mask.png"),
    overlay: Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
) -> Prediction:
    """Segment an image by clicks "x,y" (or "x,y,0" for what does not belong) and a box "x0,y0,x1,y1".

    Writes the mask to `out` as a PNG of 0 and 255 at the image's size, and to `overlay` the image with prompt and
    mask drawn in. One positive click alone is ambiguous: of three masks the one the model trusts most is taken.

    Raises:
        SamletError: no prompt, one that cannot be read or lies outside the image, or a file that cannot be used.
    """
    clicks = [parse_point(text) for text in points]
    corners = None if box is None else parse_box(box)
    if not clicks and corners is None:
        raise SamletError("predict: say what to segment with --point x,y or --box x0,y0,x1,y1")
    _refuse_other_suffixes(out, overlay)
    _refuse_to_overwrite(image, out, overlay)
    from samlet.data import read_image

    pixels = read_image(image)
    check_inside(image, (pixels.shape[0], pixels.shape[1]), clicks, corners)
    prediction = _segment(checkpoint, pixels, clicks, corners, image_size=image_size, device=device)
    write_file(out, lambda place: Image.fromarray(prediction.mask.astype(np.uint8) * 255).save(place, format="PNG"))
    if overlay is not None:
        _draw(overlay, pixels, clicks, corners, prediction)
    _say(prediction, out, overlay)
    return prediction


def parse_point(text: str) -> PointPrompt:
    """A click from "x,y" or "x,y,label" with label 1 (belongs to the object, the default) or 0.

    Raises:
        SamletError: anything else.
    """
    numbers = _numbers(text)
    if len(numbers) not in (2, 3) or (len(numbers) == 3 and numbers[2] not in (NEGATIVE, POSITIVE)):
        raise SamletError(f"--point '{text}': write x,y in pixels, or x,y,0 for a pixel that does not belong")
    return PointPrompt(numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else POSITIVE)


def parse_box(text: str) -> BoxPrompt:
    """A box from "x0,y0,x1,y1".

    Raises:
        SamletError: anything else, or a box without area.
    """
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise SamletError(f"--box '{text}': write x0,y0,x1,y1 in pixels, the top left and the bottom right corner")
    box = BoxPrompt(*numbers)
    if box.x0 >= box.x1 or box.y0 >= box.y1:
        raise SamletError(f"--box '{text}': x0 must be less than x1 and y0 less than y1")
    return box


def check_inside(image: Path, size: tuple[int, int], points: Sequence[PointPrompt], box: BoxPrompt | None) -> None:
    """Refuse prompts outside an image of (H, W) pixels; a box may end at its very edge.

    Raises:
        SamletError: names the prompt and the image's size.
    """
    height, width = size
    for point in points:
        if not (0 <= point.x < width and 0 <= point.y < height):
            raise SamletError(f"--point {point.x:g},{point.y:g}: outside {image}, which is {width} x {height} pixels")
    if box is not None and not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height):
        given = ",".join(f"{edge:g}" for edge in box)
        raise SamletError(f"--box {given}: reaches outside {image}, which is {width} x {height} pixels")


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return numbers if np.isfinite(numbers).all() else []


def _refuse_other_suffixes(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.suffix.lower() != ".png":
            raise SamletError(f"{path}: pictures are written as PNG; give a name that ends in .png")


def _refuse_to_overwrite(image: Path, out: Path, overlay: Path | None) -> None:
    for option, path in (("--out", out), ("--overlay", overlay)):
        if path is not None and _are_one(path, image):
            raise SamletError(f"{option} {path}: is the image itself, which would be lost; name another file")
    if overlay is not None and _are_one(out, overlay):
        raise SamletError(f"--overlay {overlay}: is --out as well, and one would replace the other; name another file")


def _are_one(first: Path, second: Path) -> bool:
    both_there = first.exists() and second.exists()
    return first.samefile(second) if both_there else first.resolve() == second.resolve()


def _segment(
    checkpoint: str | Path,
    pixels: np.ndarray,
    points: Sequence[PointPrompt],
    box: BoxPrompt | None,
    *,
    image_size: int | None,
    device: str,
) -> Prediction:
    from samlet.engine.evaluation import choose_device
    from samlet.models import Predictor, load_sam

    target = choose_device(device)
    predictor = Predictor(load_sam(checkpoint, image_size=image_size).to(target))
    predictor.set_image(pixels)
    masks, scores, _ = predictor.predict(
        point_coords=np.array([point[:2] for point in points], np.float32) if points else None,
        point_labels=np.array([point.label for point in points], np.int64) if points else None,
        box=None if box is None else np.array(box, np.float32),
        multimask_output=len(points) == 1 and box is None,
    )
    best = int(np.argmax(scores))
    return Prediction(np.asarray(masks[best], np.bool_), float(scores[best]))


def _draw(
    path: Path,
    pixels: np.ndarray,
    points: Sequence[PointPrompt],
    box: BoxPrompt | None,
    prediction: Prediction,
) -> None:
    from samlet.engine.overlays import DrawnPrompts, save_answer

    prompts = DrawnPrompts(
        points=np.array([point[:2] for point in points], np.float32).reshape(-1, 2),
        labels=np.array([point.label for point in points], np.int64),
        boxes=np.array([] if box is None else [box], np.float32).reshape(-1, 4),
    )
    save_answer(path, pixels, prompts, prediction.mask)


def _say(prediction: Prediction, out: Path, overlay: Path | None) -> None:
    covered, area = int(prediction.mask.sum()), prediction.mask.size
    nothing = "; the mask is empty" if not covered else ""
    files = f"{out}" if overlay is None else f"{out} and {overlay}"
    Console().print(
        f"wrote {files}: {covered} pixels ({100 * covered / area:.1f} % of the image), "
        f"predicted IoU {prediction.predicted_iou:.3f}{nothing}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
