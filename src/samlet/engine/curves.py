"""The run at a glance: one small picture per metric, from metrics.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samlet.artefacts import write_file
from samlet.errors import SamletError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLACE = ("step", "epoch", "split", "stage")
PLAIN = ("lr", "lambda")  # drawn as they are: they follow a rule, not a loss
SCORES = {"_miou": "mIoU", "_mdice": "mDice", "_ar": "AR@1000"}
RETENTION = "retention/"  # metrics of what should not be forgotten
COLUMNS = 4
WIDE_RANGE = 30.0  # largest by smallest value from which a logarithmic axis is easier to read
INK, FAINT, GRID, PAPER = "#26282e", "#787c84", "#e6e6e2", "#fafaf8"
BLUE, GREY = "#1484e6", "#9aa0a8"
SCORE_COLOURS = {"point": "#00a896", "box": "#f05454", "mean": "#6a5ae0", "everything": "#ffaa1e"}
OTHER_COLOURS = ("#1484e6", "#e848a0", "#7a8b1e")


class Line(NamedTuple):
    """One metric over the optimizer's steps."""

    steps: np.ndarray
    values: np.ndarray


class Panel(NamedTuple):
    """One small picture and the metrics it shows, by label."""

    title: str
    lines: dict[str, Line]
    kind: str  # "score", "kept" (a score that should stay where it began), "term" or "plain"


def plot_curves(metrics: Path, out: Path) -> None:
    """Draw every number in metrics.jsonl over the steps as small multiples, into a PNG.

    Scores share one picture, the best of each marked and named; a term shows its raw value, and thinly what it
    adds to the loss. Train curves are drawn faintly as logged, and smoothed on top. Stages are parted by lines.

    Raises:
        SamletError: the metrics cannot be read, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, stages = arrange(read_lines(metrics)), read_stages(metrics)
    columns = min(max(len(panels), 1), COLUMNS)
    rows = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(3.5 * columns + 0.3, 2.5 * rows + 0.5), dpi=130, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr, call-arg]
    if not panels:
        figure.text(0.5, 0.5, "nothing logged yet", ha="center", va="center", color=FAINT)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw(axes, panel)
        _mark_stages(axes, stages)
        if place + columns >= len(panels):
            axes.set_xlabel("step", fontsize=7, color=FAINT)
    write_file(out, lambda temporary: save_figure(figure, temporary))


def read_lines(metrics: Path) -> dict[str, dict[str, Line]]:
    """The metrics of each split by name; a last row that was cut short by a kill is left out.

    Raises:
        SamletError: no such file, or a row that is no JSON object with a step.
    """
    points: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(metrics):
        for name, value in row.items():
            if name not in PLACE and isinstance(value, int | float):
                points[str(row.get("split", "train"))][name].append((int(row["step"]), float(value)))
    return {split: {name: _line(pairs) for name, pairs in sorted(names.items())} for split, names in points.items()}


def read_stages(metrics: Path) -> list[tuple[int, str]]:
    """The first logged step and the name of each stage, in their order; none where the run has no stages.

    Raises:
        SamletError: as `read_lines`.
    """
    begins: list[tuple[int, str]] = []
    for row in _rows(metrics):
        name = row.get("stage")
        if row.get("split") == "train" and isinstance(name, str) and (not begins or begins[-1][1] != name):
            begins.append((row["step"], name))
    return begins


def arrange(lines: Mapping[str, Mapping[str, Line]]) -> list[Panel]:
    """Panels in reading order: scores, retention, loss, task terms, distillation terms, then everything else."""
    train, val = dict(lines.get("train", {})), dict(lines.get("val", {}))
    panels = []
    for start, kind in (("", "score"), (RETENTION, "kept")):
        for ending, title in SCORES.items():
            names = [n for n in val if n.endswith(ending) and n.startswith(RETENTION) == (kind == "kept")]
            scores = {name.removeprefix(start).removesuffix(ending): val.pop(name) for name in names}
            if scores:
                panels.append(Panel(f"{'retention' if start else 'validation'} {title}", scores, kind))
    for name in sorted((name for name in train if not name.endswith("/weighted")), key=_reading_order):
        shown = {"raw": train[name]}
        if f"{name}/weighted" in train:
            shown["weighted"] = train[f"{name}/weighted"]
        panels.append(Panel(name.replace("/", " / "), shown, "plain" if name in PLAIN else "term"))
    panels += [Panel(f"validation {name}", {"raw": line}, "plain") for name, line in val.items()]
    return panels


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average whose window shrinks symmetrically at the ends, so that they are not pulled."""
    half = np.minimum(window // 2, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    where = np.arange(len(values))
    averages: np.ndarray = (sums[where + half + 1] - sums[where - half]) / (2 * half + 1)
    return averages


def _rows(metrics: Path) -> list[dict[str, Any]]:
    try:
        texts = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SamletError(f"{metrics}: cannot be read: {error}") from error
    rows = []
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(texts):
                raise SamletError(f"{metrics}:{number}: is no row of metrics: {error}") from error
    return rows


def _line(pairs: Sequence[tuple[int, float]]) -> Line:
    finite = [(step, value) for step, value in pairs if np.isfinite(value)]
    steps, values = zip(*finite, strict=True) if finite else ((), ())
    return Line(np.array(steps, np.int64), np.array(values, np.float64))


def _reading_order(name: str) -> tuple[int, str]:
    groups = ("loss", "task/", "distill/", "", "grad_norm", "lr", "lambda")
    matching = [place for place, group in enumerate(groups) if group and name.startswith(group)]
    return (matching[0] if matching else groups.index(""), name)


def _draw(axes: Axes, panel: Panel) -> None:
    style(axes, panel.title)
    if panel.kind in ("score", "kept"):
        (_draw_scores if panel.kind == "score" else _draw_kept)(axes, panel)
        return
    for label, line in panel.lines.items():
        window = max(len(line.values) // 20, 1)
        if len(line.values) == 1:  # a line of one point is invisible
            axes.plot(line.steps, line.values, "o", color=INK, ms=3)
        if label == "weighted":
            axes.plot(line.steps, smoothed(line.values, window), color=GREY, lw=1.0, ls=(0, (4, 2)), label=label)
        elif panel.kind == "plain":
            axes.plot(line.steps, line.values, color=INK, lw=1.4)
        else:
            axes.plot(line.steps, line.values, color=BLUE, lw=0.7, alpha=0.3)
            axes.plot(line.steps, smoothed(line.values, window), color=BLUE, lw=1.7, label=label)
    _scale(axes, panel)
    if len(panel.lines) > 1:
        axes.legend(fontsize=7, frameon=False, labelcolor=FAINT, loc="upper right", handlelength=1.8)


def _mark_stages(axes: Axes, stages: Sequence[tuple[int, str]]) -> None:
    """A line where a stage begins, with its name; the first needs no line."""
    for place, (step, name) in enumerate(stages):
        if place:
            axes.axvline(step - 0.5, color=FAINT, lw=0.8, ls=(0, (1, 2)))
        axes.annotate(
            name,
            (step - 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -7),
            textcoords="offset points",
            fontsize=6,
            color=FAINT,
            annotation_clip=True,
        )


def colours_of(names: Iterable[str]) -> list[str]:
    """Colours of scores: those of SCORE_COLOURS the same in every picture."""
    others = cycle(OTHER_COLOURS)
    return [SCORE_COLOURS.get(name) or next(others) for name in names]


def _draw_scores(axes: Axes, panel: Panel) -> None:
    for (name, line), colour in zip(panel.lines.items(), colours_of(panel.lines), strict=True):
        best = int(line.values.argmax()) if len(line.values) else None
        label = name if best is None else f"{name}  {line.values[best]:.3f}"
        axes.plot(line.steps, line.values, color=colour, lw=1.7, marker="o", ms=2.6, label=label)
        if best is not None:
            axes.plot(line.steps[best], line.values[best], "o", ms=6.5, mfc="none", mec=colour, mew=1.2)
    axes.margins(y=0.1)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right", handlelength=1.2)


def _draw_kept(axes: Axes, panel: Panel) -> None:
    """Scores with the level that each began at, and how far from it the last one is."""
    for (name, line), colour in zip(panel.lines.items(), colours_of(panel.lines), strict=True):
        if not len(line.values):
            continue
        first, last = line.values[0], line.values[-1]
        axes.axhline(first, color=colour, lw=0.8, ls=(0, (3, 2)), alpha=0.7)
        axes.plot(
            line.steps, line.values, color=colour, lw=1.7, marker="o", ms=2.6, label=f"{name}  {last - first:+.3f}"
        )
    axes.margins(y=0.1)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower left", handlelength=1.2)


def _scale(axes: Axes, panel: Panel) -> None:
    values = np.concatenate([line.values for line in panel.lines.values()])
    if not len(values):
        return
    if panel.kind == "term" and values.min() > 0 and values.max() / values.min() > WIDE_RANGE:
        axes.set_yscale("log")
    elif values.min() >= 0:
        axes.set_ylim(bottom=0, top=max(float(values.max()) * 1.12, 1e-12))


def style(axes: Axes, title: str) -> None:
    """The look that all pictures of numbers share."""
    axes.set_facecolor(PAPER)
    axes.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold")
    axes.grid(visible=True, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=7, length=0, colors=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def save_figure(figure: Figure, place: Path) -> None:
    """Write a PNG that is the same bytes for the same picture."""
    figure.savefig(place, format="png", metadata={"Software": None})
