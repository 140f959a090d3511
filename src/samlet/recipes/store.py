"""`samlet store`: what a store of teacher features holds and takes, whether it is whole, and other forms of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samlet.distill.store.checking import Report, check, count_entries, repair
from samlet.distill.store.conversion import convert as convert_store
from samlet.distill.store.conversion import usage
from samlet.distill.store.entries import ShardFiles, read_shard, remedy, shard_numbers, splits_of
from samlet.distill.store.identity import plain, read_store
from samlet.engine.memory import readable
from samlet.engine.progress import ImageBars

_SHOWN = 10  # paths listed below one heading
_HASH = 12  # characters of a digest that people look at


def info(path: Path, *, console: Console | None = None) -> int:
    """Print of what a store's features are and how far each split is.

    Raises:
        SamletError: there is no store, or its books are damaged.
    """
    console, store = console or Console(), read_store(path)
    table = Table(title=escape(str(path)), title_justify="left", show_header=False)
    for name, value in plain(store.identity).items():
        short = str(value)[:_HASH] if name == "teacher_sha256" else _in_words(value)
        table.add_row(name, escape(short))
    console.print(table)
    splits = Table("split", "images", "image-variants", "shards finished", "packed")
    for split in splits_of(path):
        with remedy(path):
            shards = [
                read_shard(ShardFiles(path, split, number), store.digest) for number in shard_numbers(path, split)
            ]
        keys = [key for shard in shards for key in shard.entries]
        finished, packed = (
            sum(flags) for flags in zip(*((s.finished, s.pack is not None) for s in shards), strict=True)
        )
        row = (len({image_id for image_id, _ in keys}), len(keys), f"{finished} of {store.identity.shards}", packed)
        splits.add_row(escape(split), *map(str, row))
    console.print(splits if splits.row_count else "No split has been extracted yet.")
    return 0


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "none"
    return "none" if value is None else str(value)


def verify(path: Path, *, repair_it: bool = False, console: Console | None = None) -> int:
    """Look at every byte of a store; 2 if anything is wrong or unfinished, else 0.

    Args:
        path: the store.
        repair_it: drop what is damaged, so that extracting again computes it.
        console: where to print; standard output for None.

    Raises:
        SamletError: there is no store, its manifest.json is damaged, or it cannot be written.
    """
    console = console or Console()
    with ImageBars() as bar:
        task = bar.add_task("verify", total=count_entries(path))
        report = check(path, lambda count: bar.advance(task, count))
    if report.sound:
        masks = f" and {report.sound_masks} files of automatic masks" if report.sound_masks else ""
        _say(console, f"[bold green]All {report.images} image-variants{masks} are as they were written.[/]")
        return 0
    _print_report(report, path, console)
    if not repair_it:
        return 2
    lost, strays = repair(path, report)
    books = sum(shard.unreadable for shard in report.shards)
    _say(console, f"Dropped {lost} image-variant(s) and {books} shard(s) whole; extracting again computes them.")
    for place in strays:
        _say(console, f"{escape(str(place))}: left alone, as no extraction wrote it; remove it yourself")
    left = strays or report.decoder or report.missing_masks
    return 2 if left or any(shard.unfinished and not shard.damage for shard in report.shards) else 0


def _print_report(report: Report, path: Path, console: Console) -> None:
    damage = [
        *report.decoder,
        *report.masks.values(),
        *(sentence for shard in report.shards for sentence in shard.damage),
    ]
    unfinished = [f"shard {shard.number} of {shard.split}" for shard in report.shards if shard.unfinished]
    unfinished += [f"{place}: missing" for place in report.missing_masks]
    lost = sum(len(shard.lost) for shard in report.shards)
    _print_list("Damaged", damage, "red", console, cut=False)
    _print_list("Files that nothing vouches for", [str(place) for place in report.strays], "yellow", console)
    _print_list("Unfinished", unfinished, "yellow", console)
    if lost:
        _say(console, f"[bold red]{lost} of {report.images} image-variants cannot be used.[/]")
    if report.strays or report.masks or any(shard.damage for shard in report.shards):
        _say(console, f"`samlet store verify {escape(str(path))} --repair` drops what is damaged or nobody's; then,")
    if damage or unfinished:
        _say(console, "the command that extracted this store, run again, computes what is missing.")


def convert(
    path: Path,
    out: Path,
    *,
    dtype: Literal["fp32", "fp16", "int8"] | None = None,
    pack: bool | None = None,
    console: Console | None = None,
) -> int:
    """Write a store anew in a coarser dtype or another form; the same command goes on where it was stopped.

    Args:
        path: the store.
        out: folder of the new one.
        dtype: of the new store; the same for None.
        pack: one file a shard, or .npy files; as it is for None.
        console: where to print; standard output for None.

    Raises:
        SamletError: it cannot be converted so, or there is no room.
        DataError: it is damaged or unfinished.
    """
    with ImageBars() as bar:
        task = bar.add_task("convert", total=count_entries(path))
        identity = convert_store(path, out, dtype, pack, lambda count: bar.advance(task, count))
    before, after = (sum(sum(sizes.values()) for sizes in usage(place).values()) for place in (path, out))
    _say(console or Console(), f"{escape(str(out))}: {identity.dtype}, {readable(after)} (before: {readable(before)})")
    return 0


def du(path: Path, *, console: Console | None = None) -> int:
    """Print what a store takes on disk, by split and feature.

    Raises:
        SamletError: there is no store, or its books are damaged.
    """
    console, sizes = console or Console(), usage(path)
    table = Table("split", "what", "size", title=escape(str(path)), title_justify="left")
    table.columns[2].justify = "right"
    for split, parts in sizes.items():
        for name, size in parts.items():
            if size:
                table.add_row(escape(split), escape(name), readable(size))
    total = sum(sum(parts.values()) for parts in sizes.values())
    images = count_entries(path)
    table.add_row("", "total", readable(total), style="bold")
    console.print(table)
    _say(console, f"{images} image-variants, {readable(total / max(images, 1))} each.")
    return 0


def _print_list(title: str, lines: Sequence[str], colour: str, console: Console, *, cut: bool = True) -> None:
    if lines:
        _say(console, f"[bold {colour}]{title}[/] ({len(lines)})")
    shown = lines[:_SHOWN] if cut else lines
    for line in shown:
        _say(console, f"  {escape(line)}")
    if len(shown) < len(lines):
        _say(console, f"  ... and {len(lines) - len(shown)} more")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
