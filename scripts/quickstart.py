"""Distillation in four minutes: draw scenes, train a teacher, distil it, compare with the student alone.

The three runs are ordinary ones of `samlet train`; stopped half way, the script goes on where it was. `--fresh`
starts over.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from samlet.artefacts import write_json
from samlet.config import RunConfig
from samlet.data.synthetic import write_dataset
from samlet.engine.evaluation import encode_image, evaluate_sam, headline
from samlet.errors import SamletError
from samlet.models import load_sam
from samlet.recipes.train import train
from samlet.schema import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ROOT = Path("runs/quickstart")
RUNS = {
    "teacher": ("quickstart_teacher.yaml", ()),
    "student alone": (
        "quickstart.yaml",
        (f"output_dir={ROOT / 'alone'}", "distillation.enable=false", "dataset.unlabelled=drop"),
    ),
    "student distilled": ("quickstart.yaml", ()),
}


def main() -> int:
    """Run all three, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    if parser.parse_args().fresh:
        shutil.rmtree(ROOT, ignore_errors=True)
    console, began = Console(), time.monotonic()
    scenes = ROOT / "scenes"
    if not (scenes / "val").exists():
        console.print("[bold]drawing[/] 120 scenes for training and 40 for validation")
        write_dataset(scenes, num_train=120, num_val=40, image_size=128, seed=0)
    rows: dict[str, Row] = {}
    for name, (file, overrides) in RUNS.items():
        console.rule(f"[bold]{name}")
        config = load_config(RunConfig, CONFIGS / file, overrides)
        code = train(config)
        if code:
            return code
        rows[name] = measure(config)
    show(rows, console)
    console.print(f"{time.monotonic() - began:.0f} s on {torch.get_num_threads()} threads")
    return 0


class Row(NamedTuple):
    """One line of the table."""

    point: float
    box: float
    parameters: float
    encoder_parameters: float
    milliseconds: float
    folder: str


def measure(config: RunConfig) -> Row:
    """Scores on all validation scenes, size and speed of a finished run."""
    sam = load_sam(config.output_dir)
    val_set = config.dataset.build_val(seed=config.seed)
    scores = headline(evaluate_sam(sam, val_set))
    image = val_set.item(0).image
    times = []
    with torch.inference_mode():
        for _ in range(9):
            start = time.perf_counter()
            encode_image(sam, image)
            times.append(time.perf_counter() - start)
    return Row(
        point=100 * scores["point_miou"],
        box=100 * scores["box_miou"],
        parameters=sum(parameter.numel() for parameter in sam.parameters()) / 1e6,
        encoder_parameters=sum(parameter.numel() for parameter in sam.image_encoder.parameters()) / 1e6,
        milliseconds=sorted(times)[len(times) // 2] * 1e3,
        folder=str(config.output_dir),
    )


def show(rows: dict[str, Row], console: Console) -> None:
    """The table, and where to look further."""
    table = Table(title="mIoU on 40 validation scenes (%)", title_justify="left")
    for heading in ("model", "centre point", "box", "parameters, M (encoder)", "ms per image"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in rows.items():
        size = f"{row.parameters:.1f} ({row.encoder_parameters:.2f})"
        table.add_row(name, f"{row.point:.1f}", f"{row.box:.1f}", size, f"{row.milliseconds:.1f}")
    console.print(table)
    for row in rows.values():
        console.print(f"{row.folder}/  overlays/  curves.png  student.safetensors  mobile_sam.pt", highlight=False)
    write_json(ROOT / "quickstart.json", {name: row._asdict() for name, row in rows.items()})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamletError as error:
        sys.exit(f"error: {error}")
