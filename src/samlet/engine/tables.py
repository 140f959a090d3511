"""Tables of numbers for Markdown and the terminal: the first column names the row, the others are right-aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)])


def console_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, is_narrow: bool = False
) -> Table:
    """A table for a rich console; whatever the cells hold is no markup. Narrow: each word of a heading has a line."""
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False} if is_narrow else {}
    table = Table(title=escape(title), title_justify="left", **look)
    for place, heading in enumerate(header):
        table.add_column(
            heading.replace(" ", "\n") if is_narrow else heading,
            justify="right" if place else "left",
            no_wrap=place > 0,
            overflow="fold",  # a name on two lines rather than cut off
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
