"""`samlet check-data`: what it says, what it draws, and its exit code; torch stays out of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from samlet.errors import DataError
from samlet.recipes.check_data import check_data
from tests.data.builders import picture, save, write_small


def _run(path: Path, **more: object) -> tuple[int, str, Path]:
    text, sheet = io.StringIO(), path.parent / "out" / "sheet.png"
    code = check_data(path, sheet=sheet, console=Console(file=text, width=120), **more)  # type: ignore[arg-type]
    return code, text.getvalue(), sheet


def test_a_sound_set_is_counted_and_drawn(tmp_path: Path) -> None:
    code, text, sheet = _run(write_small(tmp_path / "data", train=4))
    assert code == 0
    for word in (
        "mask_folders",
        "train",
        "val",
        "18",
        "64 / 64 / 64",
        "PNG RGB",
        "0/255 (L)",
        "can use all",
        str(sheet),
    ):
        assert word in text, word
    drawn = Image.open(sheet)
    assert drawn.format == "PNG"
    assert drawn.width > 1000
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 1000


def test_what_training_refuses_is_named_and_exits_2(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    (root / "train" / "images" / "im001.png").write_bytes(b"")
    save(picture(), root / "val" / "images" / "BARE.PNG")
    code, text, _ = _run(root, json=tmp_path / "report.json")
    assert code == 2
    for word in ("Training refuses", "im001.png", "0 bytes", "BARE.PNG", "upper-case", "has no masks", "2 file(s)"):
        assert word in text, word
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["refused"]
    assert {Path(problem["path"]).name for problem in report["problems"]} == {"im001.png", "BARE.PNG"}
    (root / "train" / "images" / "im001.png").unlink()
    for mask in (root / "train" / "masks" / "im001").iterdir():
        mask.unlink()
    assert _run(root)[0] == 2
    assert _run(root, unlabelled="use")[0] == 0


def test_one_split_and_one_file_can_be_checked(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    assert _run(root / "train")[0] == 0
    with pytest.raises(DataError, match="no such file or folder"):
        _run(root / "absent")


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    (root / "train" / "images" / "[red]x[-1].png").write_bytes(b"x")
    code, text, _ = _run(root)
    assert code == 2
    assert "[red]x[-1].png" in text


def test_a_real_set_is_sound(shared: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    code = check_data(
        shared / "data" / "potholes", sheet=tmp_path / "s.png", console=Console(file=text, width=120), image_size=256
    )
    assert code == 0
    assert "coco is there as well" in text.getvalue().replace("\n", " ")


def test_checking_data_imports_no_torch(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data", train=1, val=1)
    code = (
        "import sys; from pathlib import Path\n"
        "import samlet.data, samlet.data.configs, samlet.data.synthetic, samlet.data.prompts, samlet.data.transforms\n"
        "import samlet.data.splits, samlet.data.sampler\n"
        "from samlet.recipes.check_data import check_data\n"
        f"code = check_data(Path({str(root)!r}), sheet=Path({str(tmp_path / 'sheet.png')!r}))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
