"""Progress where there is no terminal: a line now and then, none for what is over at once."""

from __future__ import annotations

import pytest

from samlet.engine import progress
from samlet.engine.progress import ImageBars, clock


def test_the_time_left() -> None:
    assert [clock(seconds) for seconds in (0, 65.9, 3661)] == ["0:00", "1:05", "1:01:01"]


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_long_work_writes_lines_into_a_log(
    rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with ImageBars() as bars:
        task = bars.add_task("teacher[s]", total=4)
        bars.advance(task)
        bars.update(task, completed=4)
        bars.advance(bars.add_task("all there are", total=None))
    told = capsys.readouterr().err.splitlines()
    assert (
        told
        == ["teacher[s]: 1/4 images  eta 0:00", "teacher[s]: 4/4 images  eta 0:00", "all there are: 1 images"] * shown
    )


def test_what_is_over_at_once_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ImageBars() as bars:
        bars.advance(bars.add_task("images", total=3), 3)
    assert capsys.readouterr().err == ""


def test_the_last_line_is_there_where_others_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter((0.0, 11.0, 12.0, 13.0))
    monkeypatch.setattr("samlet.engine.progress.time.monotonic", lambda: next(now))
    with ImageBars() as bars:
        task = bars.add_task("x", total=3)
        for _ in range(3):
            bars.advance(task)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/3", "3/3"]
