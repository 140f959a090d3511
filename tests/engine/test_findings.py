"""What the doctor calls off, rule by rule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from samlet.engine.diagnosis import MODULES, Reading, TermReading
from samlet.engine.findings import Diagnosis, findings


def term(raw: float = 1.0, gradient: float = 1.0) -> TermReading:
    return TermReading(raw, 2 * raw, {**dict.fromkeys(MODULES, 0.0), "mask_decoder": gradient}, 1.0)


def seen(terms: dict[str, TermReading], **others: Any) -> Diagnosis:
    weights = others.pop("weights", {})
    student, teachers = others.pop("student_iou", 0.5), others.pop("teacher_iou", {"T": 0.6})
    readings = [Reading(terms, student, teachers, weights)] * 2
    return Diagnosis(**{"stage": "", "readings": readings, "norms": [0.5], "max_norm": 1.0, "moved": [], **others})


HEALTHY = {"task/dice": term(), "distill/a": term()}


def levels(diagnosis: Diagnosis) -> list[str]:
    return [finding.level for finding in findings(diagnosis)]


def test_a_healthy_run_has_no_findings() -> None:
    assert findings(seen(HEALTHY)) == []
    assert findings(seen(HEALTHY, max_norm=None, norms=[1e9])) == []


@pytest.mark.parametrize(
    ("diagnosis", "level", "words"),
    [
        (seen({**HEALTHY, "distill/b": term(raw=3.0, gradient=0.0)}), "error", "distill/b: has a weight and a value"),
        (seen({**HEALTHY, "distill/b": term(raw=0.0, gradient=0.0)}), "warning", "distill/b: is 0 everywhere"),
        (seen({**HEALTHY, "distill/b": term(raw=math.nan, gradient=math.nan)}), "error", "distill/b not finite"),
        (seen({**HEALTHY, "distill/b": term(gradient=300.0)}), "warning", "distill/b: its gradient is 150 times"),
        (seen(HEALTHY, moved=["x", "y", "z", "w"]), "error", "x, y, z and 1 more: frozen, but moved"),
        (seen(HEALTHY, teacher_iou={"T": 0.4}), "warning", "teacher T: worse than the student"),
        (seen(HEALTHY, norms=[2.0, 3.0]), "note", "clipped (norms 2, 3, training.max_grad_norm 1)"),
        (seen(HEALTHY, refused=["the gradient not finite"]), "error", "the gradient not finite"),
    ],
)
def test_each_rule_speaks_alone(diagnosis: Diagnosis, level: str, words: str) -> None:
    found = findings(diagnosis)
    assert [finding.level for finding in found] == [level]
    assert words in found[0].text


def test_what_is_no_fault() -> None:
    silent = {**HEALTHY, "distill/b": term(gradient=0.0)}
    assert levels(seen(silent, weights={"distill/b": 0.0})) == []
    without_labels = {**HEALTHY, "task/focal": term(raw=0.0, gradient=0.0)}
    assert levels(seen(without_labels, student_iou=None, teacher_iou={})) == []
    assert levels(seen({**HEALTHY, "distill/b": term(gradient=150.0)})) == []
    assert levels(seen({"task/dice": term(gradient=1e6)})) == []
    assert levels(seen(HEALTHY, norms=[0.5, 3.0])) == []


def test_the_worst_comes_first_and_the_stage_is_named() -> None:
    found = findings(seen(HEALTHY, stage="warm", moved=["x"], norms=[9.0], teacher_iou={"T": 0.1}))
    assert [finding.level for finding in found] == ["error", "warning", "note"]
    assert all(finding.text.startswith("stage warm: ") for finding in found)
