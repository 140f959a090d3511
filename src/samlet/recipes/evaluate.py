"""Evaluate checkpoints side by side: mIoU and mDice at the original resolution, by prompt and by object size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from samlet.artefacts import write_json, write_text
from samlet.data.opening import DEFAULT_SPLIT, open_split
from samlet.engine.naming import Named, name_checkpoints, refuse_model
from samlet.engine.progress import ImageBars
from samlet.engine.tables import console_table, markdown_table, percent
from samlet.errors import SamletError

if TYPE_CHECKING:
    import torch

    from samlet.data import ValidationSet
    from samlet.models import Sam

DEFAULT_OUT = Path("evaluation")
TITLES = {"miou": "mIoU", "mdice": "mDice"}

NOTES = """\
In percent, over every object at the original resolution; a prediction of nothing counts 0. *point*: one click at
the object's most interior pixel, of three masks the one the model trusts most. *+k clicks*: k more, each at the
most interior pixel of the largest error, the last logits fed back. *box*: the object's exact box. Mean over
objects; in brackets the 95 % interval of a bootstrap over images (1000 resamples, seeded). Sizes are COCO's:
small is under 32 x 32 pixels, medium under 96 x 96."""


def evaluate(
    checkpoints: Sequence[str],
    data: Path,
    *,
    split: str = DEFAULT_SPLIT,
    format: str = "auto",
    image_size: int | None = None,
    out: Path | None = None,
    clicks: Sequence[int] = (1, 3, 5),
    device: str = "auto",
    max_images: int | None = None,
) -> dict[str, Any]:
    """Measure each checkpoint (a path, or name=path) on a split of a data set; print and write what came out.

    `data` has the split below it, or is itself one where no split is named. Writes evaluate.json and
    evaluate.md into `out`, by default `evaluation`; two evaluations of the same files write the same bytes.

    Raises:
        SamletError: a checkpoint, a data set, a split or a device that is not there or cannot be used.
    """
    named = name_checkpoints(checkpoints)
    refuse_model(data, named)
    images = open_split(data, split, format)
    from samlet.engine.evaluation import BOX, CLICKS, POINT, choose_device

    kinds = (POINT, *(f"{CLICKS}{count}" for count in sorted(set(clicks))), BOX)
    target = choose_device(device)
    count = min(len(images), max_images or len(images))
    results: dict[str, Any] = {}
    with ImageBars() as progress:
        for checkpoint in named:
            task = progress.add_task(checkpoint.name, total=count)
            results[checkpoint.name] = _measure(
                checkpoint,
                images,
                kinds,
                count=count,
                image_size=image_size,
                device=target,
                on_image=partial(progress.advance, task),
            )
    report = {"data": str(data), "split": split, "prompts": list(kinds), "checkpoints": results}
    _publish(report, out or DEFAULT_OUT)
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    tables = [
        markdown_table(header, rows)
        for header, rows in (
            *(_means(report, name, title) for name, title in TITLES.items()),
            _over_images(report),
            _sizes(report),
        )
    ]
    first = next(iter(report["checkpoints"].values()))
    title = f"# Evaluation on {report['data']}, {first['images']} images, {first['objects']} objects"
    return "\n\n".join([title, *tables, NOTES]) + "\n"


def _measure(
    checkpoint: Named,
    images: ValidationSet,
    kinds: tuple[str, ...],
    *,
    count: int,
    image_size: int | None,
    device: torch.device,
    on_image: Callable[[], object],
) -> dict[str, Any]:
    from samlet.engine.evaluation import evaluate_sam, summarize
    from samlet.models import load_sam

    sam: Sam = load_sam(checkpoint.path, image_size=image_size).to(device)
    scores = evaluate_sam(sam, images, kinds, indices=range(count), on_image=on_image)
    return {
        "path": str(checkpoint.path),
        "kind": sam.kind,
        "image_size": sam.image_size,
        "parameters": sum(parameter.numel() for parameter in sam.parameters()),
        **summarize(scores),
    }


def _publish(report: dict[str, Any], out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise SamletError(f"{out}: is a file; --out names the folder for evaluate.json and evaluate.md")
    write_json(out / "evaluate.json", report)
    write_text(out / "evaluate.md", markdown(report))
    console = Console()
    for name, title in TITLES.items():
        header, rows = _means(report, name, title)
        shown = [[cell.partition(" [")[0] for cell in row] for row in rows]
        console.print(console_table(f"{title} on {report['data']}, percent", ["checkpoint", *header[1:]], shown))
    console.print(
        f"wrote {out / 'evaluate.json'} and {out / 'evaluate.md'} (with 95 % intervals)",
        markup=False,
        soft_wrap=True,
        highlight=False,
    )


def _title(kind: str) -> str:
    number = kind.removeprefix("clicks_")
    return kind if number == kind else f"+{number} click{'s' * (number != '1')}"


def _means(report: dict[str, Any], name: str, title: str) -> tuple[list[str], list[list[str]]]:
    header = [title, "size", "input", *map(_title, report["prompts"])]
    rows = [
        [checkpoint, f"{facts['parameters'] / 1e6:.2f} M", str(facts["image_size"])]
        + [
            f"{100 * means[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for means in (facts["prompts"][kind] for kind in report["prompts"])
            for low, high in [means[f"{name}_interval"]]
        ]
        for checkpoint, facts in report["checkpoints"].items()
    ]
    return header, rows


def _over_images(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["mean over images", *(f"{_title(kind)} mIoU" for kind in report["prompts"])]
    rows = [
        [name, *(percent(facts["prompts"][kind]["miou_over_images"]) for kind in report["prompts"])]
        for name, facts in report["checkpoints"].items()
    ]
    return header, rows


def _sizes(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    first = next(iter(report["checkpoints"].values()))
    sizes = first["prompts"][report["prompts"][0]]["by_size"]
    header = ["mIoU by object size"] + [f"{size} ({facts['objects']})" for size, facts in sizes.items()]
    rows = [
        [f"{name}, {_title(kind)}", *(percent(facts["prompts"][kind]["by_size"][size]["miou"]) for size in sizes)]
        for name, facts in report["checkpoints"].items()
        for kind in report["prompts"]
    ]
    return header, rows
