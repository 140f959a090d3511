"""Evaluate checkpoints in everything mode side by side: automatic masks against the objects, and calibration."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from samlet.artefacts import write_json, write_text
from samlet.data.opening import DEFAULT_SPLIT, open_split
from samlet.engine.naming import Named, name_checkpoints, refuse_model
from samlet.engine.progress import ImageBars
from samlet.engine.signals import listen_for_stop
from samlet.engine.tables import console_table, markdown_table, percent
from samlet.errors import SamletError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from samlet.data import ValidationSet
    from samlet.engine.everything import Chosen, Measured

DEFAULT_OUT = Path("evaluation")
REPORT, TABLES, SHEET = "everything.json", "everything.md", "everything.png"
UNFINISHED = ".unfinished"  # in the folder of the report: what is there of it when the command is killed
DRAWN = 4  # images on the contact sheet

NOTES = """\
In percent but for masks, FP, ECE, MAE and seconds, at the original resolution, class-agnostic. A model's masks are
ranked by its predicted IoU. *AR@k*: mean over IoU 0.5, 0.55 ... 0.95 of recall with the k most trusted masks of each
image. *AP*: area under precision over recall, mean over the same IoU, up to 1000 masks an image (COCOeval). *Boundary
AP*: the same with min(mask IoU, boundary IoU), boundaries 2 % of the image's diagonal wide (arXiv:2103.16562). *F1*,
*FP* (false positives an image) and *matched IoU*: one mask for one object at IoU 0.5. An image where nothing was
predicted counts 0. Where not every object is labelled, AP, F1 and FP blame a model for finding the others; AR does not.
*ECE*: sum over 10 bins b of the predicted IoU, clipped to 0 .. 1, of n_b / N |mean predicted - mean actual|, actual
being the IoU with the object that fits best, of all three masks of each point of an 8 x 8 grid and of each object's
centre; *on objects*: of the points on an object. *MAE*: mean |predicted - actual|. *s/image*: automatic masks alone,
with encoding. Sizes are COCO's: small is under 32 x 32 pixels, medium under 96 x 96."""


def evaluate_everything(
    checkpoints: Sequence[str],
    data: Path,
    *,
    split: str = DEFAULT_SPLIT,
    format: str = "auto",
    image_size: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    max_images: int | None = None,
    points_per_side: int | None = None,
    pred_iou_thresh: float | None = None,
    stability_score_thresh: float | None = None,
    fast: bool | None = None,
) -> dict[str, Any]:
    """Measure each checkpoint (a path, or name=path) in everything mode; print and write what came out.

    A checkpoint that `samlet tune-amg` tuned is run with its own settings; what is given here wins. Writes
    everything.json, everything.md, everything.png (a contact sheet) and reliability.png into `out`. Killed and called
    again, it goes on where it was.

    Raises:
        SamletError: a checkpoint, a data set, a split or a device that is not there or cannot be used.
    """
    named = name_checkpoints(checkpoints)
    refuse_model(data, named)
    where = out or DEFAULT_OUT
    if where.exists() and not where.is_dir():
        raise SamletError(f"{where}: is a file; --out names the folder for {REPORT}, {TABLES} and the pictures")
    images = open_split(data, split, format)
    from samlet.engine.everything import choose_settings

    given = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "fast": fast,
    }
    chosen = {one.name: choose_settings(one.path, image_size, **given) for one in named}
    count = min(len(images), max_images or len(images))
    facts, measured = measure_all(named, chosen, images, where, count=count, image_size=image_size, device=device)
    report = {"data": str(data), "split": split, "checkpoints": facts}
    publish(report, measured, images, where)
    shutil.rmtree(where / UNFINISHED, ignore_errors=True)
    return report


def measure_all(
    named: Sequence[Named],
    chosen: Mapping[str, Chosen],
    images: ValidationSet,
    out: Path,
    *,
    count: int,
    image_size: int | None,
    device: str,
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """What the report says of each checkpoint, and what came out of it; kept image by image below `out`."""
    from samlet.engine.evaluation import choose_device
    from samlet.engine.everything import measure_everything
    from samlet.engine.kept_measurements import KeptMeasurements
    from samlet.models import load_sam
    from samlet.models.checkpoints import digest_of_weights

    target = choose_device(device)
    facts: dict[str, Any] = {}
    measured: dict[str, Measured] = {}
    with ImageBars() as progress, listen_for_stop() as stop:

        def count_image(task: TaskID) -> None:
            progress.advance(task)
            stop.leave_if_asked()

        for name, path in named:
            task = progress.add_task(name, total=count)
            sam = load_sam(path, image_size=image_size).to(target)
            own = {
                "weights": digest_of_weights(path),
                "image_size": sam.image_size,
                "device": target.type,
                "settings": chosen[name].settings.as_dict(),
            }
            one = measured[name] = measure_everything(
                sam,
                images,
                chosen[name].settings,
                indices=range(count),
                kept=KeptMeasurements(out / UNFINISHED, own),
                shown=drawn_images(count),
                on_image=partial(count_image, task),
            )
            facts[name] = {
                "path": str(path),
                "kind": sam.kind,
                "image_size": sam.image_size,
                "parameters": sum(parameter.numel() for parameter in sam.parameters()),
                "settings": chosen[name].settings.as_dict(),
                "is_tuned": chosen[name].is_tuned,
                "scores": one.scores,
                "calibration": one.calibration,
                "seconds_per_image": one.seconds,
            }
        stop.leave_if_asked()
    return facts, measured


def drawn_images(count: int) -> list[int]:
    """The images on the contact sheet, evenly through those measured."""
    return sorted({round(place * (count - 1) / max(DRAWN - 1, 1)) for place in range(DRAWN)})


def publish(report: dict[str, Any], measured: Mapping[str, Measured], images: ValidationSet, out: Path) -> None:
    """Write report, tables and pictures, and show the tables."""
    from samlet.engine.calibration import plot_reliability
    from samlet.engine.mask_sheet import save_mask_sheet

    places = [out / name for name in (REPORT, TABLES, SHEET, "reliability.png")]
    write_json(places[0], report)
    write_text(places[1], markdown(report))
    save_mask_sheet(places[2], list(_sheet_rows(measured, images)))
    plot_reliability(places[3], {name: one.calibration for name, one in measured.items()})
    console = Console()
    for header, rows in _tables(report):
        title = f"{header[0]}, {report['data']}"
        console.print(console_table(title, ["checkpoint", *header[1:]], rows, is_narrow=True))
    for name, facts in report["checkpoints"].items():
        if not facts["scores"]["masks"]:
            again = f"samlet tune-amg {facts['path']} {report['data']}"
            said = f"{name}: no mask passes its thresholds; `{again}` finds those that suit it"
            console.print(said, markup=False, soft_wrap=True, highlight=False)
    console.print("wrote " + ", ".join(map(str, places)), markup=False, soft_wrap=True, highlight=False)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    scores = next(iter(report["checkpoints"].values()))["scores"]
    title = f"# Everything mode on {report['data']}, {scores['images']} images, {scores['objects']} objects"
    return "\n\n".join([title, *(markdown_table(*table) for table in _tables(report)), NOTES]) + "\n"


def _sheet_rows(measured: Mapping[str, Measured], images: ValidationSet) -> Iterable[Any]:
    import numpy as np

    from samlet.engine.automatic_evaluation import count_judged, decode, f1, match, overlaps
    from samlet.engine.mask_sheet import SheetRow
    from samlet.engine.overlays import TRUTH

    for index in next(iter(measured.values())).shown:
        item = images.item(index)
        columns, notes = {TRUTH: item.masks}, {}
        for name, one in measured.items():
            rles = one.shown[index]
            columns[name] = np.array([decode(rle) for rle in rles], np.bool_).reshape(-1, *item.image.shape[:2])
            common = overlaps(rles, np.zeros(len(rles)), item.masks, item.crowds)
            found = match(common.iou)
            judged = count_judged(common.in_crowd, found)
            notes[name] = f"F1 {100 * f1(len(found.iou), judged, len(item.masks)):.0f}"
        yield SheetRow(item.image_id, item.image, columns, notes)


def _tables(report: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    checkpoints: dict[str, dict[str, Any]] = report["checkpoints"]
    return [
        _found(checkpoints),
        _right(checkpoints),
        _calibration(checkpoints),
        _sizes(checkpoints),
        _settings(checkpoints),
    ]


def _found(checkpoints: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    counts = list(next(iter(checkpoints.values()))["scores"]["ar"])
    columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "boundary AP": "boundary_ap"}
    header = ["Automatic masks", *(f"AR@{count}" for count in counts), *columns]
    rows = [
        [name, *(percent(facts["scores"]["ar"][count]) for count in counts)]
        + [percent(facts["scores"][key]) for key in columns.values()]
        for name, facts in checkpoints.items()
    ]
    return header, rows


def _right(checkpoints: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["What is right", "F1", "matched IoU", "masks /image", "FP /image", "s /image"]
    rows = [
        [
            name,
            percent(scores["f1"]),
            percent(scores["matched_iou"]),
            f"{scores['masks'] / scores['images']:.1f}",
            f"{scores['false_positives']:.1f}",
            f"{facts['seconds_per_image']:.2f}",
        ]
        for name, facts in checkpoints.items()
        for scores in [facts["scores"]]
    ]
    return header, rows


def _calibration(checkpoints: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["Calibration", "ECE", "ECE on objects", "MAE", "MAE on objects"]
    rows = [
        [name, *(_error(part[key]) for key in ("ece", "mae") for part in (found, found["on_objects"]))]
        for name, facts in checkpoints.items()
        for found in [facts["calibration"]]
    ]
    return header, rows


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sizes(checkpoints: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    sizes = next(iter(checkpoints.values()))["scores"]["by_size"]
    header = ["AR@1000, AP, boundary AP by size", *(f"{size} ({sizes[size]['objects']})" for size in sizes)]
    rows = [
        [name, *(" / ".join(percent(by_size[size][key]) for key in ("ar", "ap", "boundary_ap")) for size in sizes)]
        for name, facts in checkpoints.items()
        for by_size in [facts["scores"]["by_size"]]
    ]
    return header, rows


def _settings(checkpoints: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = {
        "points a side": "points_per_side",
        "predicted IoU": "pred_iou_thresh",
        "stability": "stability_score_thresh",
        "fast": "fast",
    }
    header = ["Settings", "size", "input", *columns, "tuned"]
    rows = [
        [
            name,
            f"{facts['parameters'] / 1e6:.2f} M",
            str(facts["image_size"]),
            *(_plain(facts["settings"][key]) for key in columns.values()),
            _plain(facts["is_tuned"]),
        ]
        for name, facts in checkpoints.items()
    ]
    return header, rows


def _plain(value: float | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}"
