"""What does each way to distil teach? The same student, the same steps, one difference at a time, on real images.

    python benchmarks/ablation.py --data DATA [--sets potholes nuclei_bbbc038] [--seeds 0 1 2] [--arms ARM ...]

Everything is as in benchmarks/distillation.py, whose teachers it shares, with half of the steps: teachers trained on
all labels, students with a tenth of the labels (configs/distillation_student.yaml) that differ in `distillation`,
`prompts` and `stages` alone. `none` sees no teacher and no unlabelled image. Stopped at any moment, the same command
goes on; arms that have been run are not run again. Writes ablation.md and ablation.png below --out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation import ALONE, CONFIGS, OWN_STUDENT, Scores, scores_in, scores_of, teacher_scores
from samlet.config import RunConfig
from samlet.distill.configs import TERMS
from samlet.errors import SamletError
from samlet.schema import load_config

BySeed = dict[int, Scores]
SEEDS_FOUR = TERMS[:4]
STEPS = {"potholes": 160, "nuclei_bbbc038": 200}  # half as many as in distillation.py: there are 48 students a set
DEFAULT_STEPS = 160
W_DICE = {"potholes": 0.0, "nuclei_bbbc038": 0.2}  # without it the masks of nuclei teach nothing
WEIGHTS = {"dense_mask_logits": 5.0}  # the others: 1; all times lambda_coef


def only(*terms: str) -> tuple[str, ...]:
    """Overrides that leave these terms alone switched on."""
    switches = tuple(f"distillation.{term}.enable={str(term in terms).lower()}" for term in TERMS)
    return (*switches, *(f"distillation.{term}.weight={WEIGHTS.get(term, 1.0)}" for term in terms))


NECK_SHARE = 0.375  # of the steps
NECK_THEN_MASK = (
    *only("encoder_patch", "dense_mask_logits"),
    "stages=["
    "{name: neck, training: {max_steps: NECK, freeze: [prompt_encoder, mask_decoder]}, "
    "loss: {focal: 0.0, dice: 0.0, iou: 0.0}, distillation: {dense_mask_logits: {enable: false}}}, "
    "{name: masks, training: {max_steps: REST}, distillation: {encoder_patch: {enable: false}}}]",
)
IN_THE_LOOP = ("prompts.correction_rounds=1",)
ARMS: dict[str, tuple[str, ...]] = {
    "none": ALONE,
    "neck + mask": only("encoder_patch", "dense_mask_logits"),
    "neck + mask, Dice": (
        *only("encoder_patch", "dense_mask_logits"),
        "distillation.dense_mask_logits.w_dice=0.2",
    ),
    "seeds' four": only(*SEEDS_FOUR),
    "neck, then mask": NECK_THEN_MASK,
    "neck + mask, in the loop": (*only("encoder_patch", "dense_mask_logits"), *IN_THE_LOOP),
    "neck + mask, in the loop, trust": (
        *only("encoder_patch", "dense_mask_logits"),
        *IN_THE_LOOP,
        "distillation.trust=hard_mask",
    ),
    "neck + mask, two teachers": only("encoder_patch", "dense_mask_logits"),
    **{f"{term} alone": only(term) for term in TERMS},
}
TWO_TEACHERS = "neck + mask, two teachers"


def run_set(root: Path, out: Path, seeds: list[int], arms: list[str], *, finished: bool) -> dict[str, BySeed]:
    """Teachers and arms of one data set, seed by seed; `finished`: only what has been run before."""
    results: dict[str, BySeed] = {}
    for number, name in enumerate(["teacher", *(["teacher-1"] if TWO_TEACHERS in arms else [])]):
        if not finished:
            results[name] = {number: teacher_scores(root, out / name, seed=number)}
        elif has_ended(out / name):
            results[name] = {number: scores_in(out / name)}
    for seed in seeds:
        for arm in arms:
            folder = folder_of(root, out, arm, seed)
            if not finished:
                results.setdefault(arm, {})[seed] = scores_of(student_config(root, out, arm, seed))
            elif has_ended(folder):
                results.setdefault(arm, {})[seed] = scores_in(folder)
    return results


def folder_of(root: Path, out: Path, arm: str, seed: int) -> Path:
    """Where a student of an arm is trained."""
    name = re.sub(r"[^a-z_]+", "-", arm.lower())
    return out / f"{name}-{STEPS.get(root.name, DEFAULT_STEPS)}-{seed}"


def has_ended(run: Path) -> bool:
    return (run / "run.json").exists() and "best" in json.loads((run / "run.json").read_text())


def student_config(root: Path, out: Path, arm: str, seed: int) -> RunConfig:
    """One student of an arm."""
    file, teacher, steps = CONFIGS / "distillation_student.yaml", out / "teacher", STEPS.get(root.name, DEFAULT_STEPS)
    place = (
        f"dataset.root={root}",
        *OWN_STUDENT.get(root.name, ()),
        f"training.max_steps={steps}",
        f"validation.every_steps={steps}",
        f"distillation.dense_mask_logits.w_dice={W_DICE.get(root.name, 0.0)}",
        f"model.decoder_checkpoint={teacher}",
        f"teachers.0.checkpoint={teacher}",
    )
    if arm == TWO_TEACHERS:
        both = f"[{{name: first, checkpoint: {teacher}}}, {{name: second, checkpoint: {out / 'teacher-1'}}}]"
        place = (*place[:-1], f"teachers={both}")
    neck = round(steps * NECK_SHARE)
    own = tuple(setting.replace("NECK", str(neck)).replace("REST", str(steps - neck)) for setting in ARMS[arm])
    return load_config(RunConfig, file, (*place, *own, f"seed={seed}", f"output_dir={folder_of(root, out, arm, seed)}"))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t; 0 for a single value)."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, 0.0
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, float(half)


def gains(arm: BySeed, none: BySeed, prompt: str) -> list[float]:
    """Seed by seed: how far an arm is above the student without a teacher."""
    return [getattr(arm[seed], prompt) - getattr(none[seed], prompt) for seed in arm if seed in none]


def gap_of(arms: dict[str, BySeed], seeds: Iterable[int], prompt: str) -> float:
    """How far the teacher is above the student without one, in the mean over some seeds."""
    best: float = getattr(arms["teacher"][0], prompt)
    return best - float(statistics.mean(getattr(arms["none"][seed], prompt) for seed in seeds))


def table(results: dict[str, dict[str, BySeed]]) -> str:
    """Markdown: means, paired gains with their intervals, and how much of the gap to the teacher is closed."""
    lines = [
        "| data | arm | seeds | point | box | gain, point | gain, box | gap closed |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arms in results.items():
        for arm, scores in arms.items():
            means = [statistics.mean(getattr(score, prompt) for score in scores.values()) for prompt in Scores._fields]
            cells = [str(len(scores)), *(f"{mean:.1f}" for mean in means)]
            if not arm.startswith("teacher") and arm != "none":
                paired = [interval(gains(scores, arms["none"], prompt)) for prompt in Scores._fields]
                gap = sum(gap_of(arms, scores, prompt) for prompt in Scores._fields)
                cells += [f"{mean:+.1f}" + (f" ± {half:.1f}" if half else "") for mean, half in paired]
                cells += [f"{100 * sum(mean for mean, _ in paired) / gap:.0f} %"]
            lines.append(f"| {name} | {arm} | {' | '.join([*cells, *[''] * (6 - len(cells))])} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, BySeed]], path: Path) -> None:
    """Paired gains over the student without a teacher, bars for means and dots for seeds; one panel a data set."""
    shown = [arm for arm in ARMS if arm != "none" and any(arm in arms for arms in results.values())]
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 5.5), sharey=True, squeeze=False)
    for axis, (name, arms) in zip(axes[0], results.items(), strict=True):
        for offset, (prompt, colour) in zip((-0.19, 0.19), (("point", "#1f6f8b"), ("box", "#d98032")), strict=True):
            label = f"{prompt} mIoU"
            for row, arm in enumerate(shown):
                found = gains(arms.get(arm, {}), arms["none"], prompt)
                if found:
                    axis.barh(row + offset, statistics.mean(found), height=0.34, color=colour, label=label)
                    axis.scatter(found, [row + offset] * len(found), s=7, color="#333333", zorder=3)
                    label = ""
            axis.axvline(gap_of(arms, arms["none"], prompt), color=colour, linestyle=":", linewidth=1)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.set_xlabel("points over the student without a teacher")
        axis.set_title(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(shown)), shown)
    axes[0][0].invert_yaxis()
    figure.suptitle("dots: seeds; dotted lines: the teacher", fontsize=9, color="#666666")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="upper left", ncols=2, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run everything that has not been run; write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=["potholes", "nuclei_bbbc038"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distillation"), help="where distillation.py left its teachers"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--finished", action="store_true", help="train nothing; report the runs that have ended")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    arms = ["none", *(arm for arm in given.arms if arm != "none")]
    results = {
        name: run_set(given.data / name, given.out / name, given.seeds, arms, finished=given.finished)
        for name in given.sets
    }
    text = table(results)
    (given.out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    plot(results, given.out / "ablation.png")
    sys.stdout.write(f"{text}\n\n{given.out / 'ablation.png'}\n")


if __name__ == "__main__":
    try:
        main()
    except SamletError as error:
        sys.exit(f"error: {error}")
