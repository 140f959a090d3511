"""Does everything-mode training make automatic masks better? The same student, the same further steps, on real images.

    python benchmarks/everything.py --data DATA [--sets nuclei_bbbc038 potholes] [--seeds 0 1 2]

Students are the `distilled` ones of benchmarks/distillation.py, which has to be run before: points and boxes, a tenth
of the labels. From there each goes on for STEPS steps, once with points and boxes as before (`prompts`) and once in
everything mode (EVERYTHING), with the same teacher, images and learning rate. Automatic masks of all validation images
are scored against the objects: AR and AP as COCO's, class-agnostic, of all masks that are no duplicates, ranked by the
predicted IoU, so that no threshold suits one model more than another; the IoU head's calibration error (ECE) over a
grid of points and over those on objects; and box mIoU as in validation. All in percent. Stopped at any moment, the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation import CONFIGS, OWN_STUDENT, scores_in, scores_of, spread
from samlet.config import RunConfig
from samlet.errors import SamletError
from samlet.recipes.evaluate_everything import evaluate_everything
from samlet.schema import load_config

STEPS = 150
GO_ON = (
    f"training.max_steps={STEPS}",
    f"validation.every_steps={STEPS}",
    "training.learning_rate=3e-4",
    "model.decoder_checkpoint=null",
    "model.batch_norm=frozen",  # at the statistics with which the student was trained
)
EVERYTHING = (
    "dataset.mode=everything",
    "dataset.grid_points=32",
    "everything.unlabelled=negative",
    "everything.max_points=32",
    "everything.boxes=8",
    "training.prompts_per_chunk=256",  # all at once: at 256 pixels memory is no concern, and nothing is computed again
)
ARMS: dict[str, tuple[str, ...]] = {"prompts": (), "everything": EVERYTHING}
GRID = {"points_per_side": 16, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "fast": False}
COLUMNS = {
    "AR@10": ("scores", "ar", "10"),
    "AR@100": ("scores", "ar", "100"),
    "AR@1000": ("scores", "ar", "1000"),
    "AP": ("scores", "ap"),
    "ECE": ("calibration", "ece"),
    "ECE on objects": ("calibration", "on_objects", "ece"),
}


def run_set(root: Path, out: Path, seeds: list[int]) -> dict[str, list[dict[str, float]]]:
    """Every model of one data set, seed by seed."""
    runs = {"teacher": [out / "teacher"], "before": [out / f"distilled-{seed}" for seed in seeds]}
    for seed, start in zip(seeds, runs["before"], strict=True):
        if not (start / "best").exists():
            raise SamletError(f"{start}: no such run; run benchmarks/distillation.py first, with --out {out.parent}")
        for arm, own in ARMS.items():
            folder = out / f"{arm}-after-{STEPS}-{seed}"
            scores_of(config_of(root, start, folder, own, seed))
            runs.setdefault(arm, []).append(folder)
    return {name: [measured(run, root) for run in folders] for name, folders in runs.items()}


def config_of(root: Path, start: Path, folder: Path, own: tuple[str, ...], seed: int) -> RunConfig:
    """A run that goes on from a student's weights."""
    settings = (
        f"dataset.root={root}",
        *OWN_STUDENT.get(root.name, ()),
        *GO_ON,
        *own,
        f"model.checkpoint={start}",
        f"teachers.0.checkpoint={folder.parent / 'teacher'}",
        f"seed={seed}",
        f"output_dir={folder}",
    )
    return load_config(RunConfig, CONFIGS / "distillation_student.yaml", settings)


def measured(run: Path, root: Path) -> dict[str, float]:
    """What a run's student scores, in percent; measured once."""
    place = run / "everything"
    report = place / "everything.json"
    if not report.exists():
        evaluate_everything([f"model={run}"], root, out=place, **GRID)  # type: ignore[arg-type]
    facts = json.loads(report.read_text(encoding="utf-8"))["checkpoints"]["model"]
    found = {column: 100 * at(facts, path) for column, path in COLUMNS.items()}
    return found | {"box mIoU": scores_in(run).box}


def at(facts: Any, path: tuple[str, ...]) -> float:
    """A figure deep in a report."""
    for key in path:
        facts = facts[key]
    return float(facts)


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown: mean and standard deviation over the seeds, and what everything mode gains over prompts."""
    columns = [*COLUMNS, "box mIoU"]
    lines = [f"| data | model | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name, models in results.items():
        for model, scores in models.items():
            cells = [spread([one[column] for one in scores]) for column in columns]
            lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
        pairs = list(zip(models["everything"], models["prompts"], strict=True))
        cells = [f"**{spread([mine[column] - other[column] for mine, other in pairs])}**" for column in columns]
        lines.append(f"| {name} | **everything over prompts** | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything that has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=["nuclei_bbbc038", "potholes"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distillation"), help="where distillation.py left its students"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = {name: run_set(given.data / name, given.out / name, given.seeds) for name in given.sets}
    text = table(results)
    (given.out / "everything.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except SamletError as error:
        sys.exit(f"error: {error}")
