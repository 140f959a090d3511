"""No word in the source that runs what a file says (P11)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
DANGEROUS = {
    "weights_only=False": r"weights_only\s*=\s*False",
    "allow_pickle": r"allow_pickle\s*=\s*True",
    "yaml.load": r"\byaml\.load\(",
    "pickle": r"\bimport pickle\b|\bpickle\.(load|loads|Unpickler)\b",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
    "os.system": r"\bos\.system\(",
    "shell=True": r"shell\s*=\s*True",
    "broad except": r"except\s*(\(?[^:]*\b(Base)?Exception\b|:)",
    "register_forward_hook": r"register_forward_(pre_)?hook",
}


@pytest.mark.parametrize("name", DANGEROUS)
def test_the_source_does_without(name: str) -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{path.name}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(DANGEROUS[name], line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        *["except:", "except Exception:", "except Exception as error:", "except (OSError, BaseException):"],
        *["except* Exception as group:"],
    ],
)
def test_what_a_broad_except_looks_like(line: str) -> None:
    assert re.search(DANGEROUS["broad except"], line)
    assert not re.search(DANGEROUS["broad except"], "except (OSError, MyException) as error:")


def test_every_torch_load_is_weights_only() -> None:
    calls = [line for path in SOURCE.rglob("*.py") for line in path.read_text().splitlines() if "torch.load(" in line]
    assert calls
    assert all("weights_only=True" in line for line in calls)
