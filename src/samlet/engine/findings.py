"""What is off in a diagnosis, each in one sentence with its remedy. A check is one function in `CHECKS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from samlet.engine.diagnosis import Reading, StoreReading

DOMINATES = 100.0  # times the gradient of all other terms together
_SHOWN = 3


class Finding(NamedTuple):
    """One thing that a person should know; an error means that the run is not worth starting."""

    level: Literal["error", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What the steps of one stage showed."""

    stage: str  # "" where there is only one
    readings: Sequence[Reading]
    norms: Sequence[float]  # of the whole gradient, a step each; steps that were left out have none
    max_norm: float | None
    moved: Sequence[str]
    frozen: int = 0  # tensors that were to stay
    refused: Sequence[str] = ()  # steps that could not be taken, and why


def findings(seen: Diagnosis) -> list[Finding]:
    """Everything that is off, the worst first."""
    where = f"stage {seen.stage}: " if seen.stage else ""
    found = [finding._replace(text=where + finding.text) for check in CHECKS for finding in check(seen)]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def findings_of_stores(stores: Sequence[StoreReading]) -> list[Finding]:
    """Stores whose features are not what their teacher says."""
    return [
        Finding(
            "error",
            f"teacher {store.teacher}: {name} in {store.root} is not what its checkpoint says of the same images "
            f"(relative rms {difference:.2g}, {store.dtype} allows {store.allowed:.0e}); remove that folder and run "
            "samlet extract with this configuration",
        )
        for store in stores
        for name, difference in store.differences.items()
        if not difference <= store.allowed
    ]


def _finite(seen: Diagnosis) -> Iterator[Finding]:
    broken = {
        name: None for reading in seen.readings for name, term in reading.terms.items() if not math.isfinite(term.raw)
    }
    if broken:
        yield Finding(
            "error",
            f"{', '.join(broken)} not finite on the first batches; look at the images with `samlet check-data`, "
            "lower training.learning_rate, or set training.precision to fp32",
        )
    for reason in () if broken else seen.refused:
        yield Finding("error", reason)


def _reaches(seen: Diagnosis) -> Iterator[Finding]:
    names = {name: None for reading in seen.readings for name in reading.terms}
    for name in names:
        rows = [
            reading.terms[name]
            for reading in seen.readings
            if reading.weights.get(name, 1.0) > 0 and not (name.startswith("task/") and reading.student_iou is None)
        ]
        if not rows or any(any(row.gradients.values()) for row in rows) or not all(map(_is_finite, rows)):
            continue
        if all(row.raw == 0 for row in rows):
            text = f"{name}: is 0 everywhere, so it teaches nothing yet; is the teacher the student's own checkpoint?"
            yield Finding("warning", text)
        else:
            yield Finding(
                "error",
                f"{name}: has a weight and a value, but moves nothing; set its weight to 0 (or enable to false), or "
                "unfreeze the part it should teach (training.freeze)",
            )


def _is_finite(row: object) -> bool:
    return math.isfinite(getattr(row, "raw", math.nan))


def _balanced(seen: Diagnosis) -> Iterator[Finding]:
    sums: dict[str, float] = {}
    for reading in seen.readings:
        for name, row in reading.terms.items():
            sums[name] = sums.get(name, 0.0) + math.hypot(*row.gradients.values())
    heard = {name: norm for name, norm in sums.items() if norm > 0 and math.isfinite(norm)}
    if len(heard) < 2:
        return
    loudest = max(heard, key=lambda name: heard[name])
    others = sum(heard.values()) - heard[loudest]
    if heard[loudest] > DOMINATES * others:
        yield Finding(
            "warning",
            f"{loudest}: its gradient is {heard[loudest] / others:.0f} times that of all other terms together, which "
            "are hardly heard; divide its weight by about that much",
        )


def _still(seen: Diagnosis) -> Iterator[Finding]:
    if seen.moved:
        more = len(seen.moved) - _SHOWN
        shown = ", ".join(seen.moved[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield Finding(
            "error", f"{shown}: frozen, but moved; this is a fault of samlet's: please report it with the config"
        )


def _teachers_know_more(seen: Diagnosis) -> Iterator[Finding]:
    judged = [reading for reading in seen.readings if reading.student_iou is not None]
    for name in judged[0].teacher_iou if judged else ():
        teacher = sum(reading.teacher_iou[name] for reading in judged) / len(judged)
        student = sum(reading.student_iou or 0.0 for reading in judged) / len(judged)
        if teacher < student:
            yield Finding(
                "warning",
                f"teacher {name}: worse than the student it is to teach (IoU {teacher:.3f}, its {student:.3f} on "
                "these batches); compare them with `samlet evaluate`, fine-tune the teacher first, or lower "
                "distillation.lambda_coef",
            )


def _clipped(seen: Diagnosis) -> Iterator[Finding]:
    if seen.max_norm is not None and seen.norms and all(norm > seen.max_norm for norm in seen.norms):
        shown = ", ".join(f"{norm:.3g}" for norm in seen.norms)
        yield Finding(
            "note",
            f"every gradient was clipped (norms {shown}, training.max_grad_norm {seen.max_norm:g}): usual at a run's "
            "begin; where it stays so, learning_rate and weights say little: raise max_grad_norm",
        )


def _teaches(seen: Diagnosis) -> Iterator[Finding]:
    knows_no_object = all(reading.student_iou is None for reading in seen.readings)
    if seen.norms and not any(seen.norms) and knows_no_object:
        yield Finding(
            "warning",
            "the whole gradient is 0 in every step: nothing is learnt from these images, which have neither objects "
            "nor a teacher's answer; look at them with `samlet check-data`, and at the thresholds of mask_teacher",
        )


Check = Callable[[Diagnosis], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (_finite, _teaches, _reaches, _still, _balanced, _teachers_know_more, _clipped)
