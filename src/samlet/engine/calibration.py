"""Whether a model's predicted IoU is the IoU: expected calibration error, and the picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from samlet.artefacts import write_file
from samlet.data.grid import objects_under
from samlet.data.masks import mask_box
from samlet.engine.curves import BLUE, FAINT, GREY, GRID, INK, PAPER, save_figure, style
from samlet.engine.evaluation import MAX_PIXELS, unchanged_in_eval_mode
from samlet.frames import to_input_coords
from samlet.models import Predictor
from samlet.models.amg.points import point_grid
from samlet.types import POSITIVE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64
    from matplotlib.axes import Axes
    from torch import Tensor

    from samlet.data import EvalImage
    from samlet.models import Sam

BINS = 10
ANSWERS = 3  # masks of a click
GRID_SIDE = 8  # points a side of the grid; with the objects' centres, these are what is asked
COLUMNS = 4


class Guesses(NamedTuple):
    """What the model said of its masks, and what they are; N masks."""

    predicted: Float64[np.ndarray, "N"]  # IoU, as the head says it
    actual: Float64[np.ndarray, "N"]  # IoU with the object that the mask fits best; 0 where there is none
    on_object: Bool[np.ndarray, "N"]  # whether the point lies on an object


def ask(sam: Sam, item: EvalImage, grid_side: int = GRID_SIDE) -> Guesses:
    """The three masks of each point of a grid over an image and of each object's centre.

    The best fit is over all objects of the image: a mask that belongs to no object has the actual IoU 0, wherever its
    point lies. Points of the grid in crowd regions are not asked. `sam` is left as it was.
    """
    grid = grid_points((item.image.shape[0], item.image.shape[1]), grid_side)
    in_crowd = objects_under(grid, list(item.crowds)).any(axis=0)
    points = np.concatenate([grid[~in_crowd], item.points])
    on_object = objects_under(points, list(item.masks)).any(axis=0)
    predicted, actual = [np.zeros(0)], [np.zeros(0)]
    with unchanged_in_eval_mode(sam):
        predictor = Predictor(sam)
        predictor.set_image(item.image)
        truth = torch.from_numpy(item.masks).to(predictor.device)
        chunk = max(MAX_PIXELS // (ANSWERS * (item.image.shape[0] * item.image.shape[1] + sam.image_size**2)), 1)
        for start in range(0, len(points), chunk):
            masks, iou = _decode(predictor, points[start : start + chunk])
            predicted.append(iou.flatten().cpu().numpy())
            actual.append(_best_fit(masks.flatten(0, 1), truth))
    return Guesses(np.concatenate(predicted), np.concatenate(actual), np.repeat(on_object, ANSWERS))


def grid_points(size: tuple[int, int], side: int) -> Float32[np.ndarray, "P 2"]:
    """The middles (x, y) of side x side equal cells of an image of size (H, W), row by row; pixels, original frame."""
    points: Float32[np.ndarray, "P 2"] = (point_grid(side) * (size[1], size[0])).astype(np.float32)
    return points


def join_guesses(parts: Sequence[Guesses]) -> Guesses:
    """The masks of several images as one."""
    return Guesses(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def summarize_calibration(guesses: Guesses, bins: int = BINS) -> dict[str, Any]:
    """How far predicted IoU is from actual IoU; numbers from 0 to 1.

    ECE = sum_b n_b / N |mean predicted of b - mean actual of b| over `bins` equal bins of the predicted IoU, clipped to
    0 .. 1 [Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, with IoU for accuracy]. MAE = mean |predicted -
    actual|, clipped as well. Of all masks, and of those whose point lies on an object.
    """
    on = guesses.on_object
    predicted = np.clip(guesses.predicted, 0, 1)
    return {
        "masks": len(predicted),
        **_errors(predicted, guesses.actual, bins),
        "on_objects": {"masks": int(on.sum()), **_errors(predicted[on], guesses.actual[on], bins)},
        "bins": reliability(predicted, guesses.actual, bins),
    }


def expected_calibration_error(
    predicted: Float64[np.ndarray, "N"], actual: Float64[np.ndarray, "N"], bins: int = BINS
) -> float:
    """ECE of predictions from 0 to 1, as `summarize_calibration` tells; 0 of none."""
    gaps = [row["masks"] * abs(row["predicted"] - row["actual"]) for row in reliability(predicted, actual, bins)]
    return float(sum(gaps)) / max(len(predicted), 1)


def reliability(
    predicted: Float64[np.ndarray, "N"], actual: Float64[np.ndarray, "N"], bins: int = BINS
) -> list[dict[str, Any]]:
    """Of each bin [low, high) that holds a prediction (the last one up to 1): how many, and both means."""
    numbers = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "masks": int((numbers == number).sum()),
            "predicted": float(predicted[numbers == number].mean()),
            "actual": float(actual[numbers == number].mean()),
        }
        for number in np.unique(numbers).tolist()
    ]


def plot_reliability(out: Path, checkpoints: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw actual over predicted IoU, one picture for each summary by name; below it how many masks a bin has.

    Raises:
        SamletError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(checkpoints), COLUMNS)
    rows = -(-len(checkpoints) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.3, 4.5 * rows), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.4, 1] * rows)
    for place, (name, summary) in enumerate(checkpoints.items()):
        row, column = divmod(place, columns)
        _draw_bins(figure.add_subplot(grid[2 * row, column]), name, summary)
        _draw_counts(figure.add_subplot(grid[2 * row + 1, column]), summary)
    write_file(out, lambda temporary: save_figure(figure, temporary))


def _decode(predictor: Predictor, points: Float32[np.ndarray, "P 2"]) -> tuple[Tensor, Tensor]:
    """Masks (P, 3, H, W) and their predicted IoU (P, 3)."""
    assert predictor.original_size is not None
    assert predictor.input_size is not None
    coords = torch.from_numpy(points).to(predictor.device)[:, None]
    coords = to_input_coords(coords, predictor.original_size, predictor.input_size)
    labels = torch.full(coords.shape[:2], POSITIVE, device=predictor.device)
    masks, iou, _ = predictor.predict_torch(coords, labels, multimask_output=True)
    return masks, iou


def _best_fit(masks: Bool[Tensor, "M H W"], truth: Bool[Tensor, "O H W"]) -> Float64[np.ndarray, "M"]:
    """The highest IoU of each mask with any object, from whole numbers of pixels; 0 where there are no objects."""
    areas = masks.flatten(1).sum(dim=1)
    best = np.zeros(len(masks))
    for mask in truth:
        x0, y0, x1, y1 = mask_box(mask.cpu().numpy())
        inside = mask[y0:y1, x0:x1]
        both = (masks[:, y0:y1, x0:x1] & inside).flatten(1).sum(dim=1)
        either = areas + inside.sum() - both
        best = np.maximum(best, both.cpu().numpy() / either.cpu().numpy())
    return best


def _errors(
    predicted: Float64[np.ndarray, "N"], actual: Float64[np.ndarray, "N"], bins: int
) -> dict[str, float | None]:
    if not len(predicted):
        return {"ece": None, "mae": None}
    return {
        "ece": expected_calibration_error(predicted, actual, bins),
        "mae": float(np.abs(predicted - actual).mean()),
    }


def _draw_bins(axes: Axes, name: str, summary: Mapping[str, Any]) -> None:
    style(axes, name)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1.0, ls=(0, (3, 2)), zorder=2)
    bars = summary["bins"]
    width = [row["high"] - row["low"] for row in bars]
    lows = [row["low"] for row in bars]
    axes.bar(lows, [row["actual"] for row in bars], width, align="edge", color=BLUE, alpha=0.75, ec=PAPER, lw=1.2)
    for row in bars:  # the gap that the ECE sums, at the bin's mean prediction
        axes.plot([row["predicted"]] * 2, [row["actual"], row["predicted"]], color="#e0452f", lw=1.3, zorder=3)
        axes.plot(row["predicted"], row["predicted"], "o", ms=2.6, color="#e0452f", zorder=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_ylabel("IoU with the best object", fontsize=7.5, color=FAINT)
    on_objects = summary["on_objects"]["ece"]
    told = f"ECE {summary['ece']:.3f}" + ("" if on_objects is None else f"\non objects {on_objects:.3f}")
    axes.text(0.04, 0.97, told, transform=axes.transAxes, va="top", fontsize=8, color=INK, linespacing=1.4)


def _draw_counts(axes: Axes, summary: Mapping[str, Any]) -> None:
    style(axes, "")
    bars = summary["bins"]
    shares = [100 * row["masks"] / summary["masks"] for row in bars]
    width = [row["high"] - row["low"] for row in bars]
    axes.bar([row["low"] for row in bars], shares, width, align="edge", color=GREY, ec=PAPER, lw=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1.12 * max(shares)))
    axes.grid(visible=True, color=GRID, lw=0.7)
    axes.set_ylabel("% of masks", fontsize=7.5, color=FAINT)
    axes.set_xlabel("predicted IoU", fontsize=7.5, color=FAINT)
