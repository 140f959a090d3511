"""Find the thresholds of automatic masks that suit a checkpoint: all masks once, then every pair of thresholds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from samlet.data.opening import DEFAULT_SPLIT, open_split
from samlet.engine.naming import Named, name_checkpoints, refuse_model
from samlet.engine.progress import ImageBars
from samlet.engine.signals import listen_for_stop
from samlet.engine.tables import console_table, percent
from samlet.errors import DataError, SamletError

if TYPE_CHECKING:
    from samlet.data import EvalImage
    from samlet.engine.tuning import Candidates, Cell, Sweep
    from samlet.models import Sam
    from samlet.models.amg import AmgSettings

METRICS = ("f1", "ar")


def tune_amg(
    checkpoint: str,
    data: Path,
    *,
    split: str = DEFAULT_SPLIT,
    format: str = "auto",
    metric: str = "f1",
    points_per_side: int | None = None,
    image_size: int | None = None,
    device: str = "auto",
    max_images: int | None = None,
) -> dict[str, Any]:
    """Choose pred_iou_thresh and stability_score_thresh for a checkpoint; print, draw and save them beside it.

    F1 = 2 matched / (masks + objects), one mask for one object at IoU 0.5, over all images of the split together; AR =
    mean over IoU 0.5, 0.55 ... 0.95 of matched / objects. Of equally good pairs the one with the fewest masks is taken.
    Killed and called again, it goes on where it was.

    Raises:
        SamletError: a metric, a checkpoint, a data set, a split or a device that is not there or cannot be used.
    """
    if metric not in METRICS:
        raise SamletError(f"--metric: '{metric}' is not one of {', '.join(METRICS)}")
    named = name_checkpoints([checkpoint])[0]
    refuse_model(data, [named], "tune-amg")
    images = open_split(data, split, format)
    count = min(len(images), max_images or len(images))
    from samlet.engine.evaluation import choose_device
    from samlet.engine.tuning import best_cell, nearest_cell, sweep
    from samlet.models import load_sam
    from samlet.models.amg import AmgSettings, amg_path

    settings = AmgSettings() if points_per_side is None else AmgSettings(points_per_side=points_per_side)
    sam = load_sam(named.path, image_size=image_size).to(choose_device(device))
    unfinished = amg_path(named.path).with_suffix(".unfinished")
    with ImageBars() as progress, listen_for_stop() as stop:

        def one_by_one() -> Iterator[EvalImage]:
            task = progress.add_task(named.name, total=count)
            for index in range(count):
                yield images.item(index)
                progress.advance(task)
                stop.leave_if_asked()

        found = collect(named.path, sam, one_by_one(), settings, unfinished)
    objects = sum(one.iou.shape[1] for one in found)
    if not objects:
        raise DataError(f"{data}: there is no object to tune on; `samlet check-data` says what was found")
    table = sweep(found, settings.box_nms_thresh)
    cells = (
        nearest_cell(table, settings.pred_iou_thresh, settings.stability_score_thresh),
        best_cell(table, metric),
    )
    if not getattr(table, metric)[cells[1]]:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise DataError(
            f"{data}: no mask of {named.path} comes near an object, whatever the thresholds: train it further, or give "
            "more --points-per-side; nothing was saved"
        )
    facts = {
        "data": str(data),
        "split": split,
        "images": count,
        "objects": objects,
        "image_size": sam.image_size,
        "metric": metric,
    }
    made = publish(named, settings, facts, table, cells)
    shutil.rmtree(unfinished, ignore_errors=True)
    return made


def collect(
    checkpoint: Path, sam: Sam, items: Iterable[EvalImage], settings: AmgSettings, unfinished: Path
) -> list[Candidates]:
    """All masks of images, nothing filtered and no duplicate removed: the plain form, every point.

    What is found in an image is kept below `unfinished`.
    """
    from samlet.engine.evaluation import unchanged_in_eval_mode
    from samlet.engine.kept_measurements import KeptMeasurements
    from samlet.engine.tuning import Candidates, candidates
    from samlet.models.amg import AutomaticMaskGenerator
    from samlet.models.checkpoints import digest_of_weights

    every = dataclasses.replace(
        settings, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0, fast=False
    )
    facts = {
        "weights": digest_of_weights(checkpoint),
        "image_size": sam.image_size,
        "device": next(sam.parameters()).device.type,
        "settings": every.as_dict(),
    }
    kept = KeptMeasurements(unfinished, facts)
    generator = AutomaticMaskGenerator.of(sam, every)

    def found_in(item: EvalImage) -> Candidates:
        arrays = kept.of(item, lambda: candidates(generator.find(item.image), item.masks, item.crowds)._asdict())
        return Candidates(*(arrays[name] for name in Candidates._fields))

    with unchanged_in_eval_mode(sam):
        return [found_in(item) for item in items]


def publish(
    named: Named, settings: AmgSettings, facts: dict[str, Any], table: Sweep, cells: tuple[Cell, Cell]
) -> dict[str, Any]:
    """Save settings and heat map beside the checkpoint, and show what has changed; `cells`: before and after."""
    from samlet.engine.tuning import facts_of, plot_sweep
    from samlet.models.amg import save_tuned

    before, after = (facts_of(table, cell) for cell in cells)
    thresholds = {name: after[name] for name in ("pred_iou_thresh", "stability_score_thresh")}
    tuned = dataclasses.replace(settings, **thresholds)
    place = save_tuned(named.path, tuned, **facts, before=before, after=after)
    picture = place.with_suffix(".png")
    plot_sweep(picture, table, facts["metric"], *cells)
    header = ["", "predicted IoU", "stability", "F1", "precision", "recall", "AR@1000", "masks /image"]
    rows = [
        [name, f"{one['pred_iou_thresh']:g}", f"{one['stability_score_thresh']:g}"]
        + [percent(one[key]) for key in ("f1", "precision", "recall", "ar")]
        + [f"{one['masks']:.1f}"]
        for name, one in (("default", before), ("tuned", after))
    ]
    title = f"{named.name} on {facts['data']}, {facts['images']} images, by {facts['metric'].upper()}, percent"
    console = Console()
    console.print(console_table(title, header, rows, is_narrow=True))
    lines = [
        f"wrote {place}, which `samlet evaluate --everything`, `samlet masks` and mask_teacher use from now on, and "
        f"{picture}",
        "Chosen on these images, so the scores on them flatter it: measure it on others",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)
    return {**facts, "settings": tuned.as_dict(), "before": before, "after": after, "path": str(place)}
