"""A diagnosis as a person reads it: tables on a terminal, aligned text elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samlet.engine.diagnosis import MODULES
from samlet.engine.memory import readable

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
PARTS = {
    "data": "data",
    "teacher": "teachers",
    "student": "student and losses",
    "backward": "backward",
    "optimizer": "optimizer",
}


def show(report: dict[str, Any]) -> None:
    """Print the whole report."""
    console = Console()
    for line in _head(report):
        _say(console, line)
    for stage in report["stages"]:
        title = f"stage {stage['stage']}: " if stage["stage"] else ""
        parts = report["run"]["accumulation"]
        batches, step = (
            ("batches", "one step") if parts == 1 else ("micro-batches", f"one step of {parts} micro-batches")
        )
        _table(console, f"{title}terms, mean of {len(stage['batches'])} {batches}", *_terms(stage))
        _table(console, f"{title}{step}", *_times(stage))
        for line in _facts(stage):
            _say(console, line)
    for line in (*_stores(report), *_tail(report)):
        _say(console, line)
    for finding in report["findings"]:
        colour = COLOURS[finding["level"]]
        console.print(f"[{colour}]{finding['level']}:[/] {escape(finding['text'])}", soft_wrap=True, highlight=False)
    if not report["findings"]:
        console.print("[green]nothing is off[/]" if console.is_terminal else "nothing is off")


def _head(report: dict[str, Any]) -> list[str]:
    run = report["run"]
    batch = f"{run['batch_size']}" + (f" x {run['accumulation']}" if run["accumulation"] > 1 else "")
    return [
        f"{run['student']} of {run['parameters'] / 1e6:.1f} M parameters at {run['image_size']} pixels on "
        f"{run['device']} in {run['precision']}: {run['steps']} steps of {batch} images, "
        f"{run['train_images']} to train on, {run['val_images']} to validate on"
    ]


def _terms(stage: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    batches = stage["batches"]
    shown = [name for name in MODULES if any(_gradient(batch, name) for batch in batches)]
    header = ["term", "raw", "weighted", *(f"grad {name}" for name in shown), "ms"]
    rows = []
    for name in batches[0]["terms"]:
        found = [batch["terms"][name] for batch in batches if name in batch["terms"]]
        cells = [_number(_mean([one[key] for one in found])) for key in ("raw", "weighted")]
        cells += [_number(_mean([one["gradients"][module] for one in found])) for module in shown]
        rows.append([name, *cells, f"{found[-1]['milliseconds']:.1f}"])
    return header, rows


def _gradient(batch: dict[str, Any], module: str) -> bool:
    return any(term["gradients"][module] for term in batch["terms"].values())


def _times(stage: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    found = stage["milliseconds"]
    whole = sum(found.values())
    rows = [[title, f"{found[part]:.1f}", f"{found[part] / whole:.0%}"] for part, title in PARTS.items() if found[part]]
    return ["part", "ms", "share"], [*rows, ["together", f"{whole:.1f}", ""]]


def _facts(stage: dict[str, Any]) -> list[str]:
    teachers = " and the teachers" if stage["batches"][0]["teacher_iou"] else ""
    still = f"{len(stage['moved'])} moved" if stage["moved"] else "all stayed as they were"
    lines = [f"frozen: {stage['frozen']} tensors (parameters, BatchNorm statistics, buffers){teachers}; {still}"]
    judged = [batch for batch in stage["batches"] if batch["student_iou"] is not None]
    if judged:
        told = [f"student {_mean([batch['student_iou'] for batch in judged]):.3f}"]
        told += [f"{name} {_mean([b['teacher_iou'][name] for b in judged]):.3f}" for name in judged[0]["teacher_iou"]]
        lines.append(f"IoU with the ground truth on these batches, best answering mask: {', '.join(told)}")
    if stage["grad_norms"]:
        lines.append(f"norm of the whole gradient: {', '.join(map(_number, stage['grad_norms']))}")
    return lines


def _stores(report: dict[str, Any]) -> list[str]:
    return [
        f"teacher {store['teacher']}: stored = live to {max(store['differences'].values()):.0e} ({store['dtype']})"
        for store in report["stores"]
    ]


def _tail(report: dict[str, Any]) -> list[str]:
    memory, predicted = report["memory"], report["predicted_seconds"]
    cuda = memory["peak_cuda_bytes"]
    return [
        f"peak memory: {readable(memory['peak_rss_bytes'])} of main memory"
        + ("" if cuda is None else f", {readable(cuda)} of the GPU's"),
        f"the whole run: about {_duration(predicted['whole'])} ({_duration(predicted['steps'])} for the steps, "
        f"{_duration(predicted['validations'])} for {predicted['validation_count']} validations, "
        f"{_duration(predicted['checkpoints'])} for {predicted['checkpoint_count']} checkpoints)",
    ]


def _table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if console.is_terminal:
        table = Table(title=title, title_justify="left", title_style="bold")
        for place, heading in enumerate(header):
            table.add_column(heading.replace("grad ", "gradient\n"), justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        return
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    _say(console, f"{title}:")
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        _say(console, "  ".join([f"  {first}", *others]).rstrip())


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}" if value == 0 else str(value)
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
