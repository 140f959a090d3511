"""What does each way to distil teach? The same student, the same steps, one difference at a time, on real images.

    python benchmarks/ablation.py --data DATA [--sets potholes nuclei_bbbc038] [--seeds 0 1 2] [--arms ARM ...]

Everything is as in benchmarks/distillation.py, whose teachers it shares, with half of the steps: teachers trained on
all labels, students with a tenth of the labels (configs/distillation_student.yaml) that differ in `distillation`,
`prompts` and `stages` alone. `none` sees no teacher and no unlabelled image. Stopped at any moment, the same command
goes on; arms that have been run are not run again. Writes ablation.md and ablation.png below --out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation import ALONE, CONFIGS, OWN_STUDENT, Scores, scores_of, teacher_scores
from samlet.config import RunConfig
from samlet.distill.configs import TERMS
from samlet.errors import SamletError
from samlet.schema import load_config

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


def run_set(root: Path, out: Path, seeds: list[int], arms: list[str]) -> dict[str, list[Scores]]:
    """Teachers and arms of one data set, seed by seed."""
    results: dict[str, list[Scores]] = {}
    for number, name in enumerate(["teacher", *(["teacher-1"] if TWO_TEACHERS in arms else [])]):
        results[name] = [teacher_scores(root, out / name, seed=number)]
    for seed in seeds:
        for arm in arms:
            results.setdefault(arm, []).append(student_scores(root, out, arm, seed))
    return results


def student_scores(root: Path, out: Path, arm: str, seed: int) -> Scores:
    """One student, trained unless it has been, and measured."""
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
    folder = out / f"{re.sub(r'[^a-z_]+', '-', arm.lower())}-{steps}-{seed}"
    return scores_of(load_config(RunConfig, file, (*place, *own, f"seed={seed}", f"output_dir={folder}")))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t; 0 for a single value)."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, 0.0
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, float(half)


def gains(arm: list[Scores], none: list[Scores], prompt: str) -> list[float]:
    """Seed by seed: how far an arm is above the student without a teacher."""
    return [getattr(a, prompt) - getattr(n, prompt) for a, n in zip(arm, none, strict=True)]


def table(results: dict[str, dict[str, list[Scores]]]) -> str:
    """Markdown: means, paired gains with their intervals, and how much of the gap to the teacher is closed."""
    lines = [
        "| data | arm | point | box | gain, point | gain, box | gap closed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, arms in results.items():
        teacher, none = arms["teacher"][0], arms["none"]
        for arm, scores in arms.items():
            means = [statistics.mean(getattr(score, prompt) for score in scores) for prompt in Scores._fields]
            cells = [f"{mean:.1f}" for mean in means]
            if not arm.startswith("teacher") and arm != "none":
                paired = [interval(gains(scores, none, prompt)) for prompt in Scores._fields]
                gap = sum(teacher) - sum(statistics.mean(getattr(n, p) for n in none) for p in Scores._fields)
                closed = sum(mean for mean, _ in paired) / gap
                cells += [f"{mean:+.1f} ± {half:.1f}" for mean, half in paired] + [f"{100 * closed:.0f} %"]
            lines.append(f"| {name} | {arm} | {' | '.join([*cells, *[''] * (5 - len(cells))])} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[Scores]]], path: Path) -> None:
    """Paired gains over the student without a teacher, with 95 % intervals; one panel a data set."""
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 5), sharey=True, squeeze=False)
    for axis, (name, arms) in zip(axes[0], results.items(), strict=True):
        shown = [arm for arm in arms if not arm.startswith("teacher") and arm != "none"]
        for offset, (prompt, colour) in zip((-0.18, 0.18), (("point", "#1f6f8b"), ("box", "#d98032")), strict=True):
            found = [interval(gains(arms[arm], arms["none"], prompt)) for arm in shown]
            places = [row + offset for row in range(len(shown))]
            axis.barh(
                places,
                [mean for mean, _ in found],
                xerr=[half for _, half in found],
                height=0.34,
                color=colour,
                label=f"{prompt} mIoU",
                error_kw={"ecolor": "#444444", "capsize": 2, "linewidth": 0.8},
            )
            gap = getattr(arms["teacher"][0], prompt) - statistics.mean(getattr(n, prompt) for n in arms["none"])
            axis.axvline(gap, color=colour, linestyle=":", linewidth=1)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.set_yticks(range(len(shown)), shown)
        axis.invert_yaxis()
        axis.set_xlabel("points over the student without a teacher (dotted: its teacher)")
        axis.set_title(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    arms = ["none", *(arm for arm in given.arms if arm != "none")]
    results = {name: run_set(given.data / name, given.out / name, given.seeds, arms) for name in given.sets}
    text = table(results)
    (given.out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    plot(results, given.out / "ablation.png")
    sys.stdout.write(f"{text}\n\n{given.out / 'ablation.png'}\n")


if __name__ == "__main__":
    try:
        main()
    except SamletError as error:
        sys.exit(f"error: {error}")
