"""Everything in an image: the fast form of the automatic generator beside the plain one, on images with ground truth.

    python benchmarks/amg.py CHECKPOINT DATA [--images 8] [--pred-iou-thresh 0.5] [--stability-score-thresh 0.7]

DATA holds `val.json` (COCO) and `val/images`. Time is that of whole images, from pixels to run lengths, the forms in
turn after one image of warm-up; `all upscaled` is the plain form without its one saving, the decoder's: it upscales
what the estimates then rule out. Average recall is COCO's at 1000 masks an image; the mean best IoU goes over the plain
form's masks, each with the nearest of the fast form's, and back. Goal: 3x at an average recall within 0.5 points.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Bench, Report, add_options, start
from benchmarks.models import build, command
from samlet.data import read_image
from samlet.models import AmgSettings, AutomaticMaskGenerator, AutomaticMasks, Sam, load_sam
from samlet.models.amg.predicting import Answers, SamPredictor

GOAL, TOLERANCE = 3.0, 0.5  # times; points of average recall


class Scene(NamedTuple):
    """An image of the ground truth by its number there."""

    number: int
    pixels: np.ndarray


class AllUpscaled(SamPredictor):
    """Decodes every mask of every click."""

    def at_points(self, points: np.ndarray, min_iou: float | None) -> Answers:
        """As if all estimates would do."""
        return super().at_points(points, None)


class Searched(NamedTuple):
    """A form, what it found in all images, and how long each took."""

    generator: AutomaticMaskGenerator
    masks: list[AutomaticMasks]
    times: list[float]

    @property
    def seconds(self) -> float:
        """For all images."""
        return sum(self.times)


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit code."""
    options = parse(arguments)
    bench = start(options)
    truth = quietly(lambda: COCO(str(options.data / "val.json")))
    scenes = read_scenes(truth, options.data / "val/images", options.skip, options.images)
    sam = build("vit_t", 64, tiny=True) if options.tiny else load_sam(options.checkpoint)
    settings = AmgSettings(
        points_per_side=options.points_per_side,
        pred_iou_thresh=options.pred_iou_thresh,
        stability_score_thresh=options.stability_score_thresh,
        crop_n_layers=options.crop_n_layers,
    )
    found = search(bench, sam.to(bench.device), settings, scenes)
    recall = {form: 100 * average_recall(truth, scenes, of.masks) for form, of in found.items()}
    report = Report("Everything in an image", command(__file__, arguments), bench.facts(bench.ceilings()))
    header = ["form", "s an image", "speed-up", "masks an image", "AR@1000"]
    base = found["plain"].seconds
    rows = [
        [form, of.seconds / len(scenes), base / of.seconds, kept(of.masks) / len(scenes), recall[form]]
        for form, of in found.items()
    ]
    report.table(f"{options.data.name}, {len(scenes)} images, input of {sam.image_size} pixels", header, rows)
    faster, lost = base / found["fast"].seconds, recall["plain"] - recall["fast"]
    plain, fast = found["plain"].masks, found["fast"].masks
    report.figures = {
        "speed-up": faster,
        "points of AR@1000 lost": lost,
        "mean best IoU, plain's masks among fast's": mean_best_iou(plain, fast),
        "mean best IoU, fast's masks among plain's": mean_best_iou(fast, plain),
        f"goal {GOAL:g}x within {TOLERANCE:g} points": "reached" if faster >= GOAL and lost <= TOLERANCE else "missed",
    }
    report.finish(options.json)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("checkpoint", type=Path, help="what `load_sam` reads; not opened with --tiny")
    parser.add_argument("data", type=Path, help="folder with val.json and val/images")
    parser.add_argument("--images", type=int, default=8, help="so many")
    parser.add_argument("--skip", type=int, default=0, help="after so many")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--pred-iou-thresh", type=float, default=0.88)
    parser.add_argument("--stability-score-thresh", type=float, default=0.95)
    parser.add_argument("--crop-n-layers", type=int, default=0)
    return parser.parse_args(arguments)


def read_scenes(truth: COCO, folder: Path, skip: int, count: int) -> list[Scene]:
    """Images of the ground truth, by their numbers."""
    infos = truth.loadImgs(sorted(truth.getImgIds())[skip : skip + count])
    return [Scene(info["id"], read_image(folder / info["file_name"])) for info in infos]


def search(bench: Bench, sam: Sam, settings: AmgSettings, scenes: list[Scene]) -> dict[str, Searched]:
    """All forms on each image in turn."""
    given = settings.as_dict()
    plain, slow, fast = (AutomaticMaskGenerator(sam, **{**given, "fast": fast}) for fast in (False, False, True))
    slow.predictor = AllUpscaled(sam)
    found = {name: Searched(form, [], []) for name, form in (("all upscaled", slow), ("plain", plain), ("fast", fast))}
    with bench.autocast():
        fast.find(scenes[0].pixels)
        for scene in scenes:
            for form in found.values():
                form.times.append(bench.seconds(lambda: form.masks.append(form.generator.find(scene.pixels))))  # noqa: B023
    return found


def kept(masks: list[AutomaticMasks]) -> int:
    """How many masks."""
    return sum(len(found.rles) for found in masks)


def average_recall(truth: COCO, scenes: list[Scene], masks: list[AutomaticMasks]) -> float:
    """COCO's AR at 1000 masks an image, classes ignored; NaN without objects."""
    answers: list[dict[str, Any]] = [
        {"image_id": scene.number, "category_id": 1, "segmentation": rle, "score": float(score)}
        for scene, found in zip(scenes, masks, strict=True)
        for rle, score in zip(found.rles, found.predicted_iou, strict=True)
    ]
    if not answers:
        return 0.0
    evaluation = COCOeval(truth, quietly(lambda: truth.loadRes(answers)), "segm")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = [10, 100, 1000]
    evaluation.params.imgIds = [scene.number for scene in scenes]
    quietly(lambda: (evaluation.evaluate(), evaluation.accumulate()))
    recall = evaluation.eval["recall"][:, :, 0, 2]  # IoU thresholds x classes, all sizes, 1000 masks
    return float(recall[recall > -1].mean()) if (recall > -1).any() else float("nan")


def mean_best_iou(ours: list[AutomaticMasks], theirs: list[AutomaticMasks]) -> float:
    """The mean over our masks of the largest IoU with one of theirs in the same image."""
    best: list[float] = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine.rles and other.rles:
            best += coco_mask.iou(mine.rles, other.rles, [0] * len(other.rles)).max(axis=1).tolist()
        else:
            best += [0.0] * len(mine.rles)
    return float(np.mean(best)) if best else float("nan")


def quietly(work: Any) -> Any:
    """What pycocotools does, without what it says."""
    with contextlib.redirect_stdout(io.StringIO()):
        return work()


if __name__ == "__main__":
    sys.exit(main())
