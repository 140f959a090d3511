from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samlet.engine.curves import arrange, plot_curves, read_lines, read_stages, smoothed
from samlet.errors import SamletError


def _rows() -> list[dict[str, Any]]:
    train = [
        {"step": step, "epoch": 0, "split": "train", "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0}
        | {"task/focal": 1.0 / step, "task/focal/weighted": 20.0 / step, "distill/encoder_patch": 0.5 / step}
        for step in range(1, 41)
    ]
    val = [
        {
            "step": step,
            "epoch": 0,
            "split": "val",
            "point_miou": step / 50,
            "box_miou": 0.9,
            "point_mdice": 0.8,
            "extra": 3,
        }
        for step in (20, 40)
    ]
    return [*train, *val]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_by_split_and_name(tmp_path: Path) -> None:
    lines = read_lines(_write(tmp_path / "metrics.jsonl", _rows()))
    assert sorted(lines) == ["train", "val"]
    assert lines["train"]["loss"].steps.tolist() == list(range(1, 41))
    assert lines["val"]["point_miou"].values.tolist() == [0.4, 0.8]
    assert "epoch" not in lines["train"]


def test_panels_in_reading_order(tmp_path: Path) -> None:
    panels = arrange(read_lines(_write(tmp_path / "metrics.jsonl", _rows())))
    titles = [panel.title for panel in panels]
    assert titles == [
        "validation mIoU",
        "validation mDice",
        "loss",
        "task / focal",
        "distill / encoder_patch",
        "grad_norm",
        "lr",
        "validation extra",
    ]
    assert sorted(panels[0].lines) == ["box", "point"]
    assert sorted(panels[3].lines) == ["raw", "weighted"]
    assert sorted(panels[4].lines) == ["raw"]


def test_a_picture_and_the_same_again(tmp_path: Path) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", _rows())
    plot_curves(metrics, tmp_path / "a.png")
    plot_curves(metrics, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "split": "train", "loss": 1.0}],
        [{"step": 1, "split": "train", "loss": 0.0}, {"step": 2, "split": "train", "loss": 0.0}],
        [{"step": 1, "split": "train", "loss": -1.0}, {"step": 2, "split": "train", "loss": 5.0}],
        [{"step": 1, "split": "val", "point_miou": 0.5}],
    ],
)
def test_short_and_odd_histories(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_curves(_write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_last_row_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "metrics.jsonl", _rows()[:3])
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 4, "lo', encoding="utf-8")
    assert read_lines(path)["train"]["loss"].steps.tolist() == [1, 2, 3]


def test_any_other_broken_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1]\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(SamletError, match=r"metrics\.jsonl:2"):
        read_lines(path)
    with pytest.raises(SamletError, match="cannot be read"):
        plot_curves(tmp_path / "none.jsonl", tmp_path / "curves.png")


def test_smoothing_keeps_straight_lines_and_their_ends() -> None:
    straight = np.linspace(3, -2, 30)
    np.testing.assert_allclose(smoothed(straight, 9), straight)
    np.testing.assert_allclose(smoothed(straight, 1), straight)
    assert smoothed(np.array([0.0, 3.0, 0.0]), 3).tolist() == [0.0, 1.0, 0.0]
    assert len(smoothed(np.zeros(0), 5)) == 0


def test_no_global_plotting_state(tmp_path: Path) -> None:
    metrics = _write(tmp_path / "metrics.jsonl", _rows())
    code = (
        "import sys; from pathlib import Path; from samlet.engine.curves import plot_curves;"
        f"plot_curves(Path({str(metrics)!r}), Path({str(tmp_path / 'c.png')!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stages_are_read_in_order_and_drawn(tmp_path: Path) -> None:
    rows = [row | {"stage": "neck" if row["step"] < 15 else "masks", "lambda": 0.5} for row in _rows()]
    metrics = _write(tmp_path / "metrics.jsonl", rows)
    assert read_stages(metrics) == [(1, "neck"), (15, "masks")]
    assert read_stages(_write(tmp_path / "plain.jsonl", _rows())) == []
    assert "stage" not in read_lines(metrics)["train"]
    assert [panel.kind for panel in arrange(read_lines(metrics)) if panel.title == "lambda"] == ["plain"]
    plot_curves(metrics, tmp_path / "with.png")
    plot_curves(_write(tmp_path / "one.jsonl", [row | {"stage": "neck"} for row in rows]), tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
