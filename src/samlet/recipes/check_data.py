"""`samlet check-data`: what a data set holds, what is wrong with it, and a contact sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from samlet.artefacts import write_file, write_json
from samlet.data.contact_sheet import contact_sheet
from samlet.data.formats import FormatName
from samlet.data.images import is_image_name
from samlet.data.inspection import NO_MASKS, Report, SplitReport, Unlabelled, inspect
from samlet.data.records import Problem
from samlet.errors import DataError

_MEANT = "name the folder that holds train/ and val/, or images/ and masks/"
_SHOWN = 10  # paths listed below one and the same remark; the JSON file holds them all


def check_data(
    path: Path,
    *,
    format: FormatName = "auto",
    sheet: Path | None = None,
    json: Path | None = None,
    image_size: int = 1024,
    unlabelled: Unlabelled = "refuse",
    console: Console | None = None,
) -> int:
    """Print a report on a data set and write its contact sheet; 2 if training would refuse it, else 0.

    Args:
        path: the data set's folder, one split's folder, or an annotation file.
        format: how masks are written; "auto" finds out.
        sheet: where the contact sheet goes; `<name>_sheet.png` in the working directory for None.
        json: where the whole report goes as JSON; nowhere for None.
        image_size: the side of the input frame that tiny objects are judged by.
        unlabelled: what training would do with images without masks.
        console: where to print; standard output for None.

    Raises:
        DataError: there is nothing to check at `path`.
    """
    console = console or Console()
    _refuse_what_is_no_data_set(path)
    report = _inspect_with_progress(path, format, image_size, unlabelled)
    if not any(split.records or split.problems[1:] for split in report.splits):  # there is nothing else to be said
        raise DataError(f"{path}: there is no image in it; {_MEANT}")
    print_report(report, console)
    sheet = sheet or Path(f"{report.root.resolve().name}_sheet.png")
    picture = contact_sheet(report)
    write_file(sheet, lambda place: picture.save(place, format="PNG"))
    console.print(f"Contact sheet: {escape(str(sheet))}", soft_wrap=True)
    if json is not None:
        write_json(json, report.to_json())
    return 2 if report.refused else 0


def _refuse_what_is_no_data_set(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {_MEANT}")
    if path.is_file() and is_image_name(path):
        raise DataError(f"{path}: is a single image; {_MEANT}")
    if path.is_file() and path.suffix.lower() != ".json":
        raise DataError(f"{path}: is neither a folder nor annotations in JSON; {_MEANT}")


def _inspect_with_progress(path: Path, format: FormatName, image_size: int, unlabelled: Unlabelled) -> Report:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {}

        def advance(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(split, total=total)
            progress.update(tasks[split], completed=done)

        return inspect(path, format=format, image_size=image_size, unlabelled=unlabelled, advance=advance)


def print_report(report: Report, console: Console) -> None:
    """What was found, what should be known, what training refuses, and the verdict."""
    console.print(_table(report))
    for split in report.splits:
        if split.also_seen:
            others = ", ".join(split.also_seen)
            console.print(
                f"{split.name}: {split.format} is used; it could be read as {others} as well "
                "(--format or dataset.format chooses)"
            )
    problems = report.all_problems()
    errors = [problem for problem in problems if problem.level == "error"]
    _print_grouped("Good to know", [problem for problem in problems if problem.level != "error"], "yellow", console)
    _print_grouped("Training refuses", errors, "red", console, cut=False)
    files = [problem for problem in errors if problem not in report.problems]
    bare = [problem for problem in files if problem.reason == NO_MASKS["refuse"]]
    broken = len(files) - len(bare)
    remedies = ["mend them, or set dataset.broken to skip and have them counted"] if broken else []
    if bare:
        whose = f"for the {len(bare)} without masks " if broken else ""
        remedies.append(f"{whose}set dataset.unlabelled to use if a teacher is to supervise them, or to drop")
    if files:
        console.print(f"[bold red]{len(files)} file(s) stop training[/]; {'; '.join(remedies)}.", soft_wrap=True)
    elif errors:
        console.print("[bold red]Training cannot start[/] on these splits.")
    else:
        console.print("[bold green]Training can use all of it.[/]")


def _table(report: Report) -> Table:
    table = Table(title=escape(str(report.root)), title_justify="left")
    table.add_column("")
    for split in report.splits:
        table.add_column(split.name, justify="right")
    rows = [_facts(split) for split in report.splits]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _facts(split: SplitReport) -> dict[str, str]:
    per_image = f"{split.objects / split.labelled:.1f}" if split.labelled else "-"
    longest = [max(size) for size in split.sizes]
    return {
        "format": split.format,
        "images": str(split.images),
        "with masks": str(split.labelled),
        "objects": str(split.objects),
        "objects per image": per_image,
        f"tiny objects (under {split.min_area} px at {split.image_size})": str(split.tiny),
        "longest side (min / median / max)": _spread(longest),
        "object area in px (min / median / max)": _spread(split.areas),
        "image files": _tally(split.kinds),
        "mask files": _tally(split.storage),
    }


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "-"
    return f"{min(values)} / {int(np.median(values))} / {max(values)}"


def _tally(counts: dict[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])[:4]
    return "\n".join(f"{count} x {name}" for name, count in most) or "-"


def _print_grouped(title: str, problems: Sequence[Problem], colour: str, console: Console, *, cut: bool = True) -> None:
    """One line a remark with its files below; long lists of warnings are cut, errors never are."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(problem.reason, []).append(problem.path)
    if groups:
        console.print(f"[bold {colour}]{title}[/]")
    for reason, paths in groups.items():
        shown = paths[:_SHOWN] if cut else paths
        if len(paths) == 1:
            console.print(f"  {escape(paths[0])}: {escape(reason)}", soft_wrap=True, highlight=False)
            continue
        console.print(f"  {len(paths)} files: {escape(reason)}", soft_wrap=True, highlight=False)
        for path in shown:
            console.print(f"    {escape(path)}", soft_wrap=True, highlight=False)
        if len(shown) < len(paths):
            console.print(f"    ... and {len(paths) - len(shown)} more (--json writes them all)")
