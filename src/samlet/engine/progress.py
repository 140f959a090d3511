"""The progress of long work: a bar with an ETA and every loss term on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class StepProgress:
    """Counts optimizer steps; only the main process shows anything."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.total, self.start = total, done
        self._began, self._last_line = time.monotonic(), 0.0
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, terms="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, terms: str) -> None:
        """Show the state after `step` optimizer steps."""
        self._bar.update(self._task, completed=step, terms=terms)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line > SECONDS_BETWEEN_LINES or step == self.total):
            self._last_line = now
            eta = (now - self._began) / max(step - self.start, 1) * (self.total - step)
            self.console.print(f"step {step}/{self.total}  eta {clock(eta)}  {terms}", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True, highlight=False)


class ImageBars(Progress):
    """A bar over images with an ETA for each thing that is done with them; elsewhere than on a terminal, lines.

    What takes less than SECONDS_BETWEEN_LINES has no line. Of several processes only the first shows anything.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._last_line, self._told = time.monotonic(), set[TaskID]()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """So many more are done."""
        super().advance(task_id, advance)
        self._tell(self._tasks[task_id])

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change how much is done, or the description."""
        super().update(task_id, **changes)
        self._tell(self._tasks[task_id])

    def _tell(self, task: Task) -> None:
        now = time.monotonic()
        is_due = now - self._last_line >= SECONDS_BETWEEN_LINES or (task.finished and task.id in self._told)
        if self.console.is_terminal or not is_due or not task.completed:
            return
        self._last_line = now
        self._told.add(task.id)
        of = " images"
        if task.total:
            left = max(task.total - task.completed, 0) / task.completed
            of = f"/{task.total:.0f} images  eta {clock((task.elapsed or 0.0) * left)}"
        told = f"{task.description}: {task.completed:.0f}{of}"
        self.console.print(told, markup=False, soft_wrap=True, highlight=False)


def shown_terms(row: Mapping[str, float | int | str]) -> str:
    """Loss and terms for the progress bar, each raw and, in brackets, as it enters the loss."""
    names = [name for name in row if f"{name}/weighted" in row]
    terms = [f"{name.partition('/')[2]} {row[name]:.3g} ({row[f'{name}/weighted']:.3g})" for name in names]
    return "  ".join([f"loss {row['loss']:.4g}", *terms]) if row else "step left out"


def clock(seconds: float) -> str:
    """Time as 4:05 or 1:04:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
