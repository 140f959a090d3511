"""Weight interpolation between a base model and the one that was fine-tuned from it (WiSE-FT, arXiv:2109.01903).

Fine-tuning buys accuracy on new images with some on the old. The models on the straight line between the two sets of
weights often keep most of both, and one of them is chosen here; nothing is trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from samlet import __version__
from samlet.artefacts import write_json
from samlet.data.opening import DEFAULT_SPLIT, open_split
from samlet.engine.progress import ImageBars
from samlet.errors import DataError, SamletError

if TYPE_CHECKING:
    import torch

    from samlet.config import RunConfig
    from samlet.data import ValidationSet
    from samlet.engine.tradeoff import Curve, Scored
    from samlet.models import Sam

DEFAULT_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = {"mean_miou": "mean", "point_miou": "point", "box_miou": "box"}
DATA, RETENTION = "data", "retention"
REPORT, CURVE, POINTS = "interpolation.json", "curve.png", "points"
FORMAT = 1  # of a kept point; another one is measured anew

Scores = dict[str, Any]  # of one point on one set: what `engine.evaluation.summarize` says
Point = dict[str, Scores]  # of one point, by set


class Measured(NamedTuple):
    """Images to measure on."""

    path: Path  # of the data set
    images: ValidationSet
    number: int  # of them that are measured on
    sha256: str = ""  # of these images and masks


class Line(NamedTuple):
    """The two ends, and the sha256 of their weights."""

    base: Sam
    tuned: Sam
    base_sha256: str
    tuned_sha256: str


def interpolate(
    base: Path,
    tuned: Path,
    *,
    data: Path,
    out: Path,
    points: Sequence[float] = DEFAULT_POINTS,
    retention: Path | None = None,
    metric: str = "mean_miou",
    max_retention_drop: float | None = None,
    split: str | None = None,
    format: str = "auto",
    image_size: int | None = None,
    max_images: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure points on the line from `base` to `tuned`, choose one, and write its student, the scores and the curve.

    `data` and `retention` are data sets, or configurations whose validation images are meant. Without `retention` the
    point with the best `metric` on the data is chosen; with it, the best mean of both, or with `max_retention_drop`
    the best on the data among those that lose no more of retention against the base. Of equals the one nearest to the
    base. Points that `out` holds already for these weights and images are not measured again.

    Raises:
        SamletError: something it was given cannot be used, or the two models are not of one architecture.
    """
    alphas = check_points(points, metric, max_retention_drop)
    refuse_folder(out)
    config = read_config(data)
    sets = {DATA: open_images(data, config, split, format, max_images)}
    if found := open_retention(retention, config, max_images):
        sets[RETENTION] = found
    elif max_retention_drop is not None:
        raise SamletError("--max-retention-drop: there is no retention set; name one with --retention")
    size = image_size or (config.model.image_size if config else None)
    line = load_line(base, tuned, size)
    measured = measure(line, alphas, sets, out, device)
    chosen, rule = choose(alphas, measured, metric, max_retention_drop)
    report = {
        "base": {"path": str(base), "sha256": line.base_sha256},
        "tuned": {"path": str(tuned), "sha256": line.tuned_sha256},
        "image_size": line.tuned.image_size,
        "batch_norm": describe_statistics(line),
        "sets": {
            role: {"path": str(one.path), **{key: measured[0][role][key] for key in ("images", "objects")}}
            for role, one in sets.items()
        },
        "points": [{"alpha": alpha, **point} for alpha, point in zip(alphas, measured, strict=True)],
        "metric": metric,
        "rule": rule,
        "chosen": chosen,
    }
    publish(line, report, out)
    return report


def check_points(points: Sequence[float], metric: str, max_retention_drop: float | None) -> list[float]:
    """The alphas in order; the base among them where retention is judged against it.

    Raises:
        SamletError: one is not from 0 to 1, there are fewer than two, or the metric does not exist.
    """
    if metric not in METRICS:
        raise SamletError(f"--metric: '{metric}' is not one of {', '.join(METRICS)}")
    outside = [point for point in points if not 0 <= point <= 1]
    if outside:
        raise SamletError(f"--points: {outside[0]:g} is not from 0 (the base) to 1 (the tuned model)")
    alphas = sorted({*points, *([] if max_retention_drop is None else [0.0])})
    if len(alphas) < 2:
        raise SamletError("--points: name two or more shares of the tuned model, as in 0 0.5 1")
    return alphas


def refuse_folder(out: Path) -> None:
    """Keep the chosen student from taking the place of a run's own.

    Raises:
        SamletError: `out` is a file or the folder of a run.
    """
    if out.exists() and not out.is_dir():
        raise SamletError(f"{out}: is a file; --out names a folder")
    if (out / "checkpoints").exists() or (out / "best").exists():
        raise SamletError(f"{out}: holds a training run, whose student would be replaced; choose another --out")


def read_config(data: Path) -> RunConfig | None:
    """The run configuration that a path names; None where it is a data set.

    Raises:
        ConfigError: it is one, with mistakes.
    """
    if not data.is_file() or data.suffix.lower() not in (".yaml", ".yml", ".json"):
        return None
    if data.suffix.lower() == ".json" and not _is_config(data):
        return None
    from samlet.config import RunConfig
    from samlet.schema import load_config

    return load_config(RunConfig, data, check_files=False)  # teachers need not be here


def _is_config(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "dataset" in content and "annotations" not in content


def open_images(
    data: Path, config: RunConfig | None, split: str | None, format: str, max_images: int | None
) -> Measured:
    """The validation images of a data set, or those that a configuration's training validates on.

    Raises:
        DataError: they are not there, or cannot be used.
    """
    if config is None:
        path, images = data, open_split(data, split or DEFAULT_SPLIT, format)
    else:
        if not config.dataset.root.exists():
            raise DataError(f"{data}: dataset.root: no such file or folder: '{config.dataset.root}'")
        chosen = config.dataset if split is None else config.dataset.model_copy(update={"val": split})
        path, images = chosen.root, chosen.build_val(seed=config.seed)
        max_images = max_images or config.validation.max_images
    return Measured(path, images, min(len(images), max_images or len(images)))


def open_retention(retention: Path | None, config: RunConfig | None, max_images: int | None) -> Measured | None:
    """The retention set that is named, or else the one of the configuration."""
    if retention is not None:
        return open_images(retention, read_config(retention), None, "auto", max_images)
    known = config.validation.retention if config else None
    if known is None:
        return None
    images = known.build()
    return Measured(known.root, images, min(len(images), max_images or known.max_images or len(images)))


def load_line(base: Path, tuned: Path, image_size: int | None) -> Line:
    """Both ends at one input size: the given one, or what the tuned model's file says.

    Raises:
        CheckpointError: one cannot be read, or they differ in a tensor; it is named.
    """
    from samlet.models import load_sam
    from samlet.models.checkpoints import digest_of, plain_state
    from samlet.models.interpolation import refuse_different

    end = load_sam(tuned, image_size=image_size)
    start = load_sam(base, image_size=end.image_size)
    refuse_different(start, end)
    return Line(start, end, digest_of(plain_state(start), {}), digest_of(plain_state(end), {}))


def measure(line: Line, alphas: Sequence[float], sets: dict[str, Measured], out: Path, device: str) -> list[Point]:
    """Scores of each point on each set, from `out` where it holds them."""
    from samlet.engine.evaluation import choose_device

    sam = copy.deepcopy(line.base).to(choose_device(device))
    with ImageBars() as bar:
        for role, one in sets.items():
            sets[role] = one._replace(sha256=digest_of_images(one, bar, role))
        kept = {(alpha, role): _kept(out, line, alpha, one) for alpha in alphas for role, one in sets.items()}
        missing = sum(sets[role].number for (_, role), scores in kept.items() if scores is None)
        task = bar.add_task("measure", total=missing, visible=missing > 0)
        for alpha in alphas:
            at = [role for role in sets if kept[alpha, role] is None]
            if at:
                sam.load_state_dict(weights_at(line, alpha))
            for role in at:
                bar.update(task, description=f"alpha {alpha:g}, {role}")
                kept[alpha, role] = _score(sam, sets[role], lambda: bar.advance(task))
                _keep(out, line, alpha, sets[role], kept[alpha, role])
            _say(bar, alpha, {role: kept[alpha, role] for role in sets}, is_new=bool(at))
    return [{role: kept[alpha, role] or {} for role in sets} for alpha in alphas]


def weights_at(line: Line, alpha: float) -> dict[str, torch.Tensor]:
    """The weights of a point."""
    from samlet.models.interpolation import interpolate_states

    return interpolate_states(line.base.state_dict(), line.tuned.state_dict(), alpha)


def digest_of_images(measured: Measured, bar: Progress, role: str) -> str:
    """sha256 over the decoded images and masks, so that a file written anew with the same content is the same."""
    import numpy as np

    task = bar.add_task(f"read {role}", total=measured.number)
    digest = hashlib.sha256()
    for index in range(measured.number):
        item = measured.images.item(index)
        digest.update(f"{item.image_id} {item.image.shape} {item.masks.shape}".encode())
        digest.update(np.ascontiguousarray(item.image).data)
        digest.update(np.packbits(item.masks).data)
        bar.advance(task)
    bar.remove_task(task)
    return digest.hexdigest()


def choose(
    alphas: Sequence[float], measured: Sequence[Point], metric: str, max_retention_drop: float | None
) -> tuple[float, str]:
    """The alpha that is taken, and the rule in words."""
    gained = [value(point[DATA], metric) for point in measured]
    name = f"{METRICS[metric]} mIoU"
    if RETENTION not in measured[0]:
        values, rule = gained, f"the best {name} on the data"
    else:
        kept = [value(point[RETENTION], metric) for point in measured]
        if max_retention_drop is None:
            values = [(up + back) / 2 for up, back in zip(gained, kept, strict=True)]
            rule = f"the best mean of the {name} on data and retention set"
        else:
            fell = [kept[0] - back for back in kept]
            values = [
                up if drop <= max_retention_drop else -1.0 for up, drop in zip(gained, fell, strict=True)
            ]  # the base itself lost nothing, so one is left
            rule = f"the best {name} on the data that loses at most {100 * max_retention_drop:g} points of retention"
    return alphas[values.index(max(values))], rule


def value(scores: Scores, metric: str) -> float:
    """A metric of one point, 0 to 1."""
    point, box = (float(scores["prompts"][kind]["miou"]) for kind in ("point", "box"))
    return {"point_miou": point, "box_miou": box, "mean_miou": (point + box) / 2}[metric]


def describe_statistics(line: Line) -> str:
    """What happened to BatchNorm's running statistics, in a sentence."""
    from samlet.models.interpolation import moved_statistics

    moved = moved_statistics(line.base.state_dict(), line.tuned.state_dict())
    if not moved:
        return "BatchNorm statistics are the same in both models, so also between them"
    return (
        f"BatchNorm statistics differ in {len(moved)} layers ({moved[0]} first) and are interpolated like weights, "
        "which need not be what the weights between would measure; train with model.batch_norm: frozen to keep them"
    )


def publish(line: Line, report: dict[str, Any], out: Path) -> None:
    """Write scores, curve and the chosen student, and show them."""
    from samlet.engine.run_dir import upstream_name
    from samlet.engine.tradeoff import plot_interpolation
    from samlet.models.checkpoints import STUDENT, save_sam_safetensors, save_sam_upstream

    student = copy.deepcopy(line.base)
    student.load_state_dict(weights_at(line, report["chosen"]))
    paths = [out / name for name in (upstream_name(student.kind), STUDENT, CURVE, REPORT)]
    save_sam_upstream(student, paths[0])
    save_sam_safetensors(student, paths[1])
    alphas = [point["alpha"] for point in report["points"]]
    drawn = [_scored(report, role) for role in report["sets"]]
    plot_interpolation(paths[2], alphas, report["chosen"], *drawn)
    write_json(paths[3], report)
    console = Console()
    console.print(_table(report))
    lines = [
        f"alpha {report['chosen']:g}: {report['rule']}. Chosen on these images, so its score on them flatters it: "
        "measure it on others",
        report["batch_norm"],
        "wrote " + ", ".join(map(str, paths)),
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)


def _scored(report: dict[str, Any], role: str) -> Scored:
    from samlet.engine.tradeoff import Curve, Scored

    def curve(metric: str) -> Curve:
        kind = METRICS[metric]
        interval = [] if kind == "mean" else [p[role]["prompts"][kind]["miou_interval"] for p in report["points"]]
        return Curve(kind, [value(point[role], metric) for point in report["points"]], interval or None)

    facts = report["sets"][role]
    first = report["metric"]
    metrics = [first, *(metric for metric in METRICS if metric != first)]
    title = f"{'data' if role == DATA else role}: {Path(facts['path']).resolve().stem}, {facts['images']} images"
    return Scored(title, [curve(metric) for metric in metrics])


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="mIoU along the line from base (0) to tuned (1), percent", title_justify="left")
    table.add_column("alpha", justify="right")
    for role in report["sets"]:
        for kind in METRICS.values():
            table.add_column(f"{role}\n{kind}", justify="right")
    table.add_column("")
    for point in report["points"]:
        cells = [f"{100 * value(point[role], metric):.1f}" for role in report["sets"] for metric in METRICS]
        is_chosen = point["alpha"] == report["chosen"]
        style = "bold" if is_chosen else ""
        table.add_row(f"{point['alpha']:g}", *cells, "chosen" if is_chosen else "", style=style)
    return table


def _score(sam: Sam, one: Measured, on_image: Callable[[], object]) -> Scores:
    from samlet.engine.evaluation import BOX, POINT, evaluate_sam, summarize

    return summarize(evaluate_sam(sam, one.images, (POINT, BOX), indices=range(one.number), on_image=on_image))


def _say(bar: Progress, alpha: float, point: dict[str, Scores | None], *, is_new: bool) -> None:
    told = ", ".join(
        f"{role} " + " ".join(f"{kind} {100 * value(scores, metric):.1f}" for metric, kind in METRICS.items())
        for role, scores in point.items()
        if scores is not None
    )
    console = bar.console
    console.print(f"alpha {alpha:g}: {told}{'' if is_new else ' (measured before)'}", soft_wrap=True, highlight=False)


def _key(line: Line, alpha: float, one: Measured) -> dict[str, Any]:
    """All that a point's scores depend on."""
    return {
        "format": FORMAT,
        "samlet": __version__,
        "base": line.base_sha256,
        "tuned": line.tuned_sha256,
        "image_size": line.tuned.image_size,
        "alpha": alpha,
        "images": one.sha256,
    }


def _place(out: Path, key: dict[str, Any]) -> Path:
    return out / POINTS / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}.json"


def _keep(out: Path, line: Line, alpha: float, one: Measured, scores: Scores | None) -> None:
    key = _key(line, alpha, one)
    write_json(_place(out, key), {"key": key, "scores": scores})


def _kept(out: Path, line: Line, alpha: float, one: Measured) -> Scores | None:
    """The scores of a point that was measured before; None where it was not, or its file is damaged."""
    key = _key(line, alpha, one)
    try:
        content = json.loads(_place(out, key).read_text(encoding="utf-8"))
        scores = content["scores"]
        for metric in METRICS:
            value(scores, metric)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(scores) if content.get("key") == key else None
