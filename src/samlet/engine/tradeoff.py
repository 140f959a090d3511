"""The picture of a weight interpolation: scores along the line from base to tuned, and what is kept against gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from samlet.artefacts import write_file
from samlet.engine.curves import BLUE, FAINT, GREY, INK, PAPER, colours_of, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = {0.0: "base", 1.0: "tuned"}
CHOSEN = "#e0452f"
LINE_HEIGHT = 0.055  # of a label, as a share of the axes


class Curve(NamedTuple):
    """A score along the line, with its 95 % interval where it has one."""

    label: str
    values: Sequence[float]
    interval: Sequence[Sequence[float]] | None = None  # (low, high) for each value


class Scored(NamedTuple):
    """One data set: its name and its curves; the first decides the trade-off."""

    title: str
    curves: Sequence[Curve]


def plot_interpolation(
    out: Path, alphas: Sequence[float], chosen: float, tuned_for: Scored, kept: Scored | None = None
) -> None:
    """Draw the scores over alpha, and where there is a retention set that too, and one against the other.

    Raises:
        SamletError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = [tuned_for] if kept is None else [tuned_for, kept]
    columns = len(sets) + (kept is not None)
    figure = Figure(figsize=(4.1 * columns + 0.3, 3.7), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    for place, scored in enumerate(sets):
        _draw_line(figure.add_subplot(1, columns, place + 1), scored, alphas, chosen)
    if kept is not None:
        _draw_tradeoff(figure.add_subplot(1, columns, columns), alphas, chosen, tuned_for.curves[0], kept.curves[0])
    write_file(out, lambda temporary: save_figure(figure, temporary))


def _draw_line(axes: Axes, scored: Scored, alphas: Sequence[float], chosen: float) -> None:
    style(axes, scored.title)
    axes.axvline(chosen, color=CHOSEN, lw=1.0, ls=(0, (3, 2)), zorder=1)
    span = max(alphas[-1] - alphas[0], 0.1)
    for curve, colour in _coloured(scored):
        values = 100 * np.array(curve.values)
        if curve.interval is not None:
            low, high = 100 * np.array(curve.interval).T
            axes.fill_between(alphas, low, high, color=colour, alpha=0.09, lw=0)
        main = curve is scored.curves[0]
        axes.plot(alphas, values, color=colour, lw=2.2 if main else 1.5, marker="o", ms=4 if main else 3, zorder=3)
    axes.set_xticks(list(alphas), [_tick(alpha) for alpha in alphas])
    axes.set_xlim(alphas[0] - 0.06 * span, alphas[-1] + 0.32 * span)
    axes.margins(y=0.12)
    axes.set_xlabel("alpha, the tuned model's share", fontsize=7.5, color=FAINT)
    axes.set_ylabel("mIoU, percent", fontsize=7.5, color=FAINT)
    _label_ends(axes, scored, alphas[-1] + 0.04 * span)


def _label_ends(axes: Axes, scored: Scored, x: float) -> None:
    low, high = axes.get_ylim()
    ends = spread([100 * curve.values[-1] for curve in scored.curves], LINE_HEIGHT * (high - low))
    for (curve, colour), y in zip(_coloured(scored), ends, strict=True):
        text = f"{curve.label} {100 * curve.values[-1]:.1f}"
        axes.text(x, y, text, va="center", fontsize=7.5, color=colour, fontweight="bold")


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Places in the order of the wanted ones and near them, no two closer than `apart`."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(wanted[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < apart * (len(groups[-1]) + len(groups[-2])) / 2 - 1e-9:
            joined = groups[-2] + groups[-1]
            groups[-2:], centres[-2:] = [joined], [sum(wanted[i] for i in joined) / len(joined)]
    placed = list(wanted)
    for group, centre in zip(groups, centres, strict=True):
        for rank, index in enumerate(group):
            placed[index] = centre + apart * (rank - (len(group) - 1) / 2)
    return placed


def _coloured(scored: Scored) -> list[tuple[Curve, str]]:
    names = [curve.label for curve in scored.curves[1:]]
    return list(zip(scored.curves, [INK, *colours_of(names)], strict=True))


def _draw_tradeoff(axes: Axes, alphas: Sequence[float], chosen: float, gained: Curve, kept: Curve) -> None:
    style(axes, "kept against gained")
    x, y = 100 * np.array(kept.values), 100 * np.array(gained.values)
    axes.plot(x[[0, -1]], y[[0, -1]], color=GREY, lw=1.0, ls=(0, (2, 2)))
    axes.plot(x, y, color=BLUE, lw=2.0, marker="o", ms=4.5, zorder=3)
    for alpha, right, up in zip(alphas, x, y, strict=True):
        if alpha == chosen:
            axes.plot(right, up, "o", ms=11, mfc="none", mec=CHOSEN, mew=1.6, zorder=4)
        axes.annotate(
            _tick(alpha).replace("\n", " "),
            (right, up),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=7.5,
            color=CHOSEN if alpha == chosen else FAINT,
        )
    axes.margins(0.2)
    axes.set_xlabel(f"retention, {kept.label} mIoU", fontsize=7.5, color=FAINT)
    axes.set_ylabel(f"data, {gained.label} mIoU", fontsize=7.5, color=FAINT)


def _tick(alpha: float) -> str:
    return f"{alpha:g}" + (f"\n{ENDS[alpha]}" if alpha in ENDS else "")
