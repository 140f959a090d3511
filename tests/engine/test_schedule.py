from __future__ import annotations

import math

import pytest

from samlet.engine.schedule import learning_rate


def test_warm_up_then_cosine_by_hand() -> None:
    rates = [learning_rate(step, total_steps=40, peak=1.0, floor=0.2, warmup_steps=4) for step in range(41)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[22] == pytest.approx(0.6)  # half way through the cosine
    assert rates[40] == pytest.approx(0.2)
    assert rates[13] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 9 / 36)) / 2)


def test_a_short_run_is_not_all_warm_up() -> None:
    assert learning_rate(1, total_steps=10, peak=1.0, warmup_steps=1000) == 1.0


def test_the_rate_never_rises_after_the_warm_up() -> None:
    rates = [learning_rate(step, total_steps=100, peak=3e-4, warmup_steps=10) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)
