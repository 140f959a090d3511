"""Does distillation teach? The same student with and without it, on real images, over several seeds.

    python benchmarks/distillation.py --data DATA --sets potholes nuclei_bbbc038 --seeds 0 1 2

For each data set below DATA: a teacher trained on all labels (configs/distillation_teacher.yaml), then for each seed
a student with a third of its encoder (configs/distillation_student.yaml), distilled and alone: same start, same
number of steps, same labelled tenth of the images. The student alone sees that tenth; the distilled one also what its
teacher says of the other images. The last checkpoint counts. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from samlet.config import RunConfig
from samlet.engine.curves import read_lines
from samlet.errors import SamletError
from samlet.recipes.train import train
from samlet.schema import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ALONE = ("distillation.enable=false", "dataset.unlabelled=drop")
OWN_TEACHER: dict[str, tuple[str, ...]] = {
    "nuclei_bbbc038": ("dataset.objects_per_image=32", "training.max_steps=1400", "validation.every_steps=200"),
}
OWN_STUDENT: dict[str, tuple[str, ...]] = {
    "nuclei_bbbc038": (
        "dataset.objects_per_image=8",
        "training.max_steps=400",
        "validation.every_steps=400",
    ),
}
"""What a data set needs besides: an image of nuclei has 28 of them, the median is 10 pixels wide at 256."""
ARMS: dict[str, tuple[str, ...]] = {"alone": ALONE, "distilled": ()}


class Scores(NamedTuple):
    """mIoU in percent on the validation images, at the original resolution."""

    point: float
    box: float


def scores_of(config: RunConfig) -> Scores:
    """Train a configuration to its end (nothing is left to do where it has ended); its last validation counts.

    Raises:
        SystemExit: the run was stopped by a signal.
    """
    code = train(config)
    if code:
        sys.exit(code)
    return scores_in(config.output_dir)


def scores_in(run: Path) -> Scores:
    """What the last validation of a run said."""
    scores = read_lines(run / "metrics.jsonl")["val"]
    return Scores(*(100 * scores[f"{prompt}_miou"].values[-1] for prompt in Scores._fields))


def teacher_scores(root: Path, folder: Path, seed: int = 0) -> Scores:
    """The teacher of a data set, trained unless it has been, and measured."""
    settings = (f"dataset.root={root}", f"output_dir={folder}", f"seed={seed}", *OWN_TEACHER.get(root.name, ()))
    return scores_of(load_config(RunConfig, CONFIGS / "distillation_teacher.yaml", settings))


def run_set(root: Path, out: Path, seeds: list[int]) -> dict[str, list[Scores]]:
    """Teacher and students of one data set."""
    teacher = out / "teacher"
    place = (f"dataset.root={root}", *OWN_STUDENT.get(root.name, ()))
    results = {"teacher": [teacher_scores(root, teacher)], **{arm: list[Scores]() for arm in ARMS}}
    for seed in seeds:
        for arm, overrides in ARMS.items():
            settings = (
                *place,
                *overrides,
                f"seed={seed}",
                f"output_dir={out / f'{arm}-{seed}'}",
                f"model.decoder_checkpoint={teacher}",
                f"teachers.0.checkpoint={teacher}",
            )
            results[arm].append(scores_of(load_config(RunConfig, CONFIGS / "distillation_student.yaml", settings)))
    return results


def table(results: dict[str, dict[str, list[Scores]]]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the gain."""
    lines = ["| data | model | centre point | box |", "|---|---|---:|---:|"]
    for name, arms in results.items():
        for arm, scores in arms.items():
            cells = [spread([getattr(score, prompt) for score in scores]) for prompt in Scores._fields]
            lines.append(f"| {name} | {arm} | {' | '.join(cells)} |")
        gains = [
            spread(
                [getattr(d, prompt) - getattr(a, prompt) for d, a in zip(arms["distilled"], arms["alone"], strict=True)]
            )
            for prompt in Scores._fields
        ]
        lines.append(f"| {name} | **gain by distillation** | {' | '.join(f'**{gain}**' for gain in gains)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of the sample."""
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run everything that has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=["potholes", "nuclei_bbbc038"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = {name: run_set(given.data / name, given.out / name, given.seeds) for name in given.sets}
    text = table(results)
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except SamletError as error:
        sys.exit(f"error: {error}")
