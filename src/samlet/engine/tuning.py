"""Thresholds of automatic masks, swept without the network: all candidates once, then every pair of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samlet.artefacts import write_file
from samlet.data.dataset import NO_REGIONS
from samlet.engine.automatic_evaluation import (
    HIT,
    IOU_THRESHOLDS,
    MAX_MASKS,
    Matches,
    count_judged,
    encode,
    f1,
    match,
    pairwise_iou,
    share_in,
)
from samlet.engine.curves import FAINT, PAPER, save_figure, style
from samlet.models.amg.boxes import nms

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int64
    from matplotlib.axes import Axes

    from samlet.models.amg import AutomaticMasks

PREDICTED_IOU = (0.0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.84, 0.88, 0.92, 0.96)
STABILITY = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98)
METRICS = {"f1": "F1 at IoU 0.5", "ar": "AR@1000"}
CHOSEN = "#e0452f"


class Candidates(NamedTuple):
    """All masks that the points of one image gave, the order as the generator hands them over; O objects."""

    boxes: Float32[np.ndarray, "M 4"]  # (x0, y0, x1, y1)
    predicted: Float64[np.ndarray, "M"]
    stability: Float64[np.ndarray, "M"]  # NaN: kept by the threshold 0 alone
    iou: Float64[np.ndarray, "M O"]
    in_crowd: Float64[np.ndarray, "M"]  # share of the mask that lies in a crowd region


class Sweep(NamedTuple):
    """Scores of every pair of thresholds, stability by row, predicted IoU by column."""

    stability: tuple[float, ...]
    predicted: tuple[float, ...]
    f1: Float64[np.ndarray, "S P"]
    ar: Float64[np.ndarray, "S P"]
    precision: Float64[np.ndarray, "S P"]
    recall: Float64[np.ndarray, "S P"]
    masks: Float64[np.ndarray, "S P"]  # an image


class Cell(NamedTuple):
    """A pair of thresholds, by its place in the sweep."""

    row: int
    column: int


def candidates(
    masks: AutomaticMasks, truth: Bool[np.ndarray, "O H W"], crowds: Bool[np.ndarray, "K H W"] = NO_REGIONS
) -> Candidates:
    """What the sweep needs of an image's unfiltered masks."""
    corners = np.concatenate([masks.boxes[:, :2], masks.boxes[:, :2] + masks.boxes[:, 2:]], axis=1)
    return Candidates(
        boxes=corners.astype(np.float32),
        predicted=masks.predicted_iou.astype(np.float64),
        stability=masks.stability_score.astype(np.float64),
        iou=pairwise_iou(masks.rles, [encode(mask) for mask in truth]),
        in_crowd=share_in(masks.rles, [encode(region) for region in crowds]),
    )


def sweep(
    images: Sequence[Candidates],
    box_nms_thresh: float,
    predicted: Sequence[float] = PREDICTED_IOU,
    stability: Sequence[float] = STABILITY,
) -> Sweep:
    """F1 and AR of each pair of thresholds over all images together, duplicates suppressed anew for each.

    F1 = 2 matched / (masks + objects), one to one at IoU 0.5. AR = mean over IoU 0.5 .. 0.95 of matched / objects,
    matched as COCO does, the most trusted mask first. Both as `summarize_masks` has them: at most 1000 masks an image.
    """
    shape = (len(stability), len(predicted))
    matched, masks, recalled = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for image in images:
        for row, least in enumerate(stability):
            kept = _survivors(image, least, box_nms_thresh)
            counts = [_over(image.predicted[kept], threshold) for threshold in predicted]
            hits = np.concatenate([np.zeros(1), np.cumsum(_hits(image.iou[kept]).mean(axis=0))])
            found = [_matches(image.iou[kept[:count]]) for count in counts]
            masks[row] += [
                count_judged(image.in_crowd[kept[:count]], one) for count, one in zip(counts, found, strict=True)
            ]
            recalled[row] += hits[counts]
            matched[row] += [len(one.iou) for one in found]
    objects = sum(image.iou.shape[1] for image in images)
    scores = [
        [f1(hit, all_, objects) for hit, all_ in zip(*pair, strict=True)] for pair in zip(matched, masks, strict=True)
    ]
    return Sweep(
        stability=tuple(stability),
        predicted=tuple(predicted),
        f1=np.array(scores),
        ar=recalled / max(objects, 1),
        precision=matched / np.maximum(masks, 1),
        recall=matched / max(objects, 1),
        masks=masks / max(len(images), 1),
    )


def best_cell(table: Sweep, metric: str) -> Cell:
    """The pair with the highest "f1" or "ar"; of equals the one that keeps the fewest masks, then the stricter one."""
    values = np.round(getattr(table, metric), 12)
    best = np.argwhere(values == values.max()).tolist()
    row, column = min(best, key=lambda at: (table.masks[at[0], at[1]], -at[1], -at[0]))
    return Cell(row, column)


def nearest_cell(table: Sweep, predicted: float, stability: float) -> Cell:
    """The pair of the sweep that is nearest to two thresholds."""
    row = int(np.abs(np.array(table.stability) - stability).argmin())
    return Cell(row, int(np.abs(np.array(table.predicted) - predicted).argmin()))


def facts_of(table: Sweep, cell: Cell) -> dict[str, Any]:
    """Thresholds and scores of a pair, by name."""
    scores = {name: float(getattr(table, name)[cell]) for name in ("f1", "precision", "recall", "ar", "masks")}
    thresholds = {"pred_iou_thresh": table.predicted[cell.column], "stability_score_thresh": table.stability[cell.row]}
    return {**thresholds, **scores}


def plot_sweep(out: Path, table: Sweep, metric: str, before: Cell, after: Cell) -> None:
    """Draw both scores over both thresholds, the chosen pair and the one before it marked; the chosen metric first.

    Raises:
        SamletError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 4.6), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    for place, name in enumerate(sorted(METRICS, key=lambda name: name != metric)):
        axes = figure.add_subplot(1, 2, place + 1)
        told = ": it decides" if name == metric else ""
        _draw_map(axes, f"{METRICS[name]}, percent{told}", table, 100 * getattr(table, name), (before, after))
    figure.supxlabel("red frame: the thresholds that were saved; white dashes: those before", fontsize=8, color=FAINT)
    write_file(out, lambda temporary: save_figure(figure, temporary))


def _survivors(image: Candidates, least: float, box_nms_thresh: float) -> Int64[np.ndarray, "N"]:
    """Rows that are stable enough and no duplicates, the most trusted first.

    A threshold of predicted IoU cuts this list short: what it removes is trusted less than what it leaves, and a mask
    is suppressed by more trusted ones only.
    """
    stable = np.flatnonzero(image.stability >= least) if least > 0 else np.arange(len(image.stability))
    rows: Int64[np.ndarray, "N"] = stable[nms(image.boxes[stable], image.predicted[stable], box_nms_thresh)]
    return rows[: MAX_MASKS[-1]]


def _over(predicted: Float64[np.ndarray, "N"], threshold: float) -> int:
    """How many of falling predictions are kept: all above the threshold, or all where it is 0."""
    return int((predicted > threshold).sum()) if threshold > 0 else len(predicted)


def _matches(iou: Float64[np.ndarray, "N O"]) -> Matches:
    """As `match`, which is slow where most rows can match nothing."""
    near = np.flatnonzero((iou >= HIT).any(axis=1))
    found = match(iou[near])
    return found._replace(masks=near[found.masks])


def _hits(iou: Float[np.ndarray, "N O"]) -> Float64[np.ndarray, "T N"]:
    """Whether each mask, the most trusted first, gets an object at each IoU threshold: the best that is left."""
    hits = np.zeros((len(IOU_THRESHOLDS), len(iou)))
    for row, threshold in enumerate(IOU_THRESHOLDS):
        left = np.where(iou >= threshold, iou, 0)
        for place in np.flatnonzero(left.any(axis=1)):
            best = int(left[place].argmax())
            if left[place, best] > 0:
                hits[row, place] = 1
                left[:, best] = 0
    return hits


def _draw_map(axes: Axes, title: str, table: Sweep, values: Float64[np.ndarray, "S P"], cells: Sequence[Cell]) -> None:
    style(axes, title)
    axes.grid(visible=False)
    axes.imshow(values, origin="lower", cmap="viridis", aspect="auto")
    bright = values.min() + 0.62 * max(float(np.ptp(values)), 1e-9)
    for (row, column), value in np.ndenumerate(values):
        colour = "#26282e" if value > bright else "#ffffff"
        number = axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
        number.set_in_layout(False)  # which would measure every one of them
    for cell, colour, line in zip(cells, ("#ffffff", CHOSEN), ((0, (2, 1.5)), "-"), strict=True):
        box = {"fill": False, "ec": colour, "lw": 2.0, "ls": line}
        axes.add_patch(_square(cell, box))
    axes.set_xticks(range(len(table.predicted)), [f"{value:g}" for value in table.predicted])
    axes.set_yticks(range(len(table.stability)), [f"{value:g}" for value in table.stability])
    axes.set_xlabel("pred_iou_thresh", fontsize=7.5, color=FAINT)
    axes.set_ylabel("stability_score_thresh", fontsize=7.5, color=FAINT)


def _square(cell: Cell, look: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((cell.column - 0.5, cell.row - 0.5), 1, 1, **look)
