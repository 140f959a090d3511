"""run.json: what decides whether two starts of one configuration end in equal bits, and how a run came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from samlet.engine.facts import facts_of_end, facts_of_start


def test_threads_and_switches_are_those_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True)
    try:
        facts = facts_of_start({"seed": 3}, 1, [])
    finally:
        torch.use_deterministic_algorithms(False)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["determinism"]["deterministic_algorithms"]
    assert facts["determinism"]["cudnn_benchmark"]
    assert not facts_of_start({"seed": 3}, 1, [])["determinism"]["deterministic_algorithms"]
    json.dumps(facts, allow_nan=False)


def test_a_run_is_not_finished_until_it_is(tmp_path: Path) -> None:
    weights = tmp_path / "student.safetensors"
    weights.write_bytes(b"")
    begun = facts_of_start({"seed": 3}, 1, [])
    assert begun["outcome"] == "not finished"
    assert (begun | facts_of_end(weights, steps=4))["outcome"] == "finished"
