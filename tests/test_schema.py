"""A configuration's mistakes are all found, each in its place and in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from samlet.errors import ConfigError
from samlet.schema import ExistingPath, Loc, StrictModel, json_schema, load_config


class Term(StrictModel):
    enable: bool = False
    w_cos: float = 1.0


class Block(StrictModel):
    enable: bool = False
    lambda_coef: float = Field(1.0, ge=0)
    encoder_patch: Term = Term()


class Teacher(StrictModel):
    name: str
    weight: float | None = None
    checkpoint: ExistingPath | None = None


class Run(StrictModel):
    distillation: Block = Block()
    teachers: tuple[Teacher, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    learning_rate: float = 1e-4
    sizes: tuple[int, int] = (1, 2)
    out: str = "out"
    seed: str = "0"

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if self.distillation.enable and not self.teachers:
            yield ("teachers",), "distillation needs a teacher"


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def complaints(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, overrides)
    return str(caught.value).splitlines()


def test_five_mistakes_are_five_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "precision: bf61\n"
        "lambda_coef: 2.0\n"
        "distillation:\n"
        "  enable: true\n"
        "  encoder_patch: {enable: yes, w_coss: 1.0}\n"
        "teachers:\n"
        "  - {name: H, checkpoint: nowhere.pth}\n",
    )
    lines = complaints(path)
    assert lines == [
        f"{path}:1: precision: must be 'fp32' or 'bf16', got 'bf61' (did you mean 'bf16'?)",
        f"{path}:2: lambda_coef: unknown key (did you mean 'distillation.lambda_coef'?)",
        f"{path}:5: distillation.encoder_patch.enable: must be a valid boolean, got 'yes'",
        f"{path}:5: distillation.encoder_patch.w_coss: unknown key (did you mean 'w_cos'?)",
        f"{path}:7: teachers.0.checkpoint: no such file or folder: 'nowhere.pth', looked for from {Path.cwd()}",
    ]


def test_mistakes_come_in_the_order_of_the_lines_then_of_the_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "seed: 1\n"
        "teachers:\n"
        "  - {nam: H, weight: much}\n"
        "  - name: I\n"
        "    checkpoint: nowhere.pth\n"
        "learning_rate: fast\n"
        "distillation: {lambda_coef: -1, enable: 1}\n"
        "precision: bf61\n",
    )
    lines = complaints(path, "sizes=[1]", "out=1", "precision=int8")
    places = [line.split(": ")[0].removeprefix(f"{path}:") for line in lines]
    files = [int(place) for place in places if place.isdigit()]
    assert len(files) == 8
    assert files == sorted(files)
    assert [line.split(": ")[1] for line in lines if ":7: " in line] == [
        "distillation.lambda_coef",
        "distillation.enable",
    ]
    assert places[8:] == ["override 'sizes=[1]'", "override 'out=1'", "override 'precision=int8'"]


def test_a_cross_check_is_not_hidden_by_other_mistakes(tmp_path: Path) -> None:
    lines = complaints(write(tmp_path, "distillation: {enable: true}\nprecision: 3\n"))
    assert any("distillation needs a teacher" in line for line in lines)
    assert any("precision: must be" in line for line in lines)


class Limits(StrictModel):
    low: int = 1
    high: int = 2

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if self.low > self.high:
            yield ("low",), "is above high"


class Dataset(StrictModel):
    root: ExistingPath
    name: str
    kind: Literal["coco", "sa1b"] = "coco"
    share: float = 1.0

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if self.share > 1:
            yield ("share",), "is above 1"


class Whole(StrictModel):
    dataset: Dataset
    limits: Limits = Limits()
    resume: Literal["auto"] | ExistingPath = "auto"
    files: tuple[ExistingPath, ...] = ()
    sizes: tuple[int, int] = (1, 2)

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if len(set(self.files)) < len(self.files):
            yield ("files",), "names one twice"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "dataset: {root: gone, name: a, share: 3}\nlimits: {low: 3}\nfiles: [x, x]\n",
            [
                *["dataset.root: no such", "dataset.share: is above 1", "files.0: no such", "files.1: no such"],
                *["files: names one twice", "limits.low: is above high"],
            ],
        ),
        (
            "dataset: {root: 3, kind: cocoo, share: 3}\nlimits: {low: 3, hihg: 9}\n",
            [
                *["dataset.name: required, and missing", "dataset.kind: must be", "dataset.root: "],
                *["dataset.share: is above 1", "limits.hihg: unknown key", "limits.low: is above high"],
            ],
        ),
        ("limits: {low: 3}\n", ["dataset: required, and missing", "limits.low: is above high"]),
        (
            "dataset:\nlimits: {low: 3}\nsizes: [1]\n",
            ["dataset: is empty; remove the line, or fill it", "limits.low: is above high", "sizes.1: required"],
        ),
        (
            "dataset: {root: ., name: a}\nfiles: [3, gone, gone]\nlimits:\n",
            ["files.0: ", "files.1: no such", "files.2: no such", "limits: is empty"],
        ),
        (
            "dataset: {root: ., name: 3, share: 2}\nlimits: {low: x, high: 0}\n",
            ["dataset.name: ", "dataset.share: is above 1", "limits.low: must be"],
        ),
    ],
)
def test_cross_checks_are_made_beside_wrong_and_absent_required_fields(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, path)
    lines = sorted(line.split(": ", 1)[1] for line in str(caught.value).splitlines())
    assert len(lines) == len(said), lines
    assert all(line.startswith(start) for line, start in zip(lines, sorted(said), strict=True)), lines


def test_a_missing_key_names_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "teachers:\n  - name: A\n  - weight: 1\n")
    assert complaints(path) == [f"{path}:3: teachers.1.name: required, and missing"]


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    run = load_config(Run, write(tmp_path, "learning_rate: 1e-5\nsizes: [3, 4]\n"))
    assert run.learning_rate == 1e-5
    assert run.sizes == (3, 4)


def test_json_is_read_with_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"learning_rate": 1e-5, "precison": "fp32"}, indent=1), "run.json")
    assert complaints(path) == [f"{path}:3: precison: unknown key (did you mean 'precision'?)"]


FRAGMENT = """"distillation": {
  "enable": true,
  "encoder_patch": { "enable": true, "w_cos": 0.5 }
},
"teachers": [
  { "name": "A, with a comma", "weight": 0.7 },
  { "name": "B" }
]
"""


BEFORE = {
    "nothing": "",
    "an odd apostrophe in a comment": "# the user's own\n",
    "a bracket in a comment": "learning_rate: 1 # see [1, 2\n",
    "an apostrophe in a plain value": "out: runs/pete's\n",
    "commas in plain values": "out: runs/a,b, c\n",
    "commas and braces in quotes": "out: 'a},'\n",
    "flow values": "sizes: [3, 4]\nout: a\nprecision: bf16\n",
    "flow values over lines": "sizes: [\n  3,\n  4\n]\n",
    "a text of several lines": 'out: |\n  "x": {},\n  },\n',
    "windows": "# it's\r\nout: a,b\r\n",
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("template", ["%s%s", "%s%s\n# it's [the end\n", "%s\n%s\nprecision: bf16\n"])
def test_a_pasted_json_fragment_works_in_yaml(tmp_path: Path, template: str, before: str) -> None:
    alone = load_config(Run, write(tmp_path, BEFORE[before]))
    for fragment in (FRAGMENT, FRAGMENT.replace("},\n", "}, # it's, {\n"), f'"seed": "7",\n{FRAGMENT.rstrip()},\n'):
        if "bf16" in BEFORE[before] and "bf16" in template:
            continue
        run = load_config(Run, write(tmp_path, template % (BEFORE[before], fragment)))
        assert run.distillation.encoder_patch.w_cos == 0.5
        assert [teacher.name for teacher in run.teachers] == ["A, with a comma", "B"]
        assert (run.out, run.sizes, run.learning_rate) == (alone.out, alone.sizes, alone.learning_rate)


def test_a_pasted_json_fragment_works_in_json(tmp_path: Path) -> None:
    run = load_config(Run, write(tmp_path, f'{{"precision": "bf16", "out": "a}},b",\n{FRAGMENT}}}', "run.json"))
    assert run.distillation.encoder_patch.w_cos == 0.5
    assert (run.precision, run.out) == ("bf16", "a},b")


@pytest.mark.parametrize("text", ["sizes: [1, 2],, \n", "sizes: [1, 2], out: x\n", "sizes: [1, 2,\nout: 3,\n"])
def test_no_other_comma_is_passed_over(tmp_path: Path, text: str) -> None:
    assert "not YAML or JSON" in complaints(write(tmp_path, text))[0]


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "teachers: [{name: A}]\nlearning_rate: 1.0\n")
    run = load_config(Run, path, ["learning_rate=1e-3", "teachers.0.weight=2", "distillation.encoder_patch.w_cos=3"])
    assert (run.learning_rate, run.teachers[0].weight, run.distillation.encoder_patch.w_cos) == (1e-3, 2, 3)


def test_a_wrong_override_names_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "learning_rate: 1.0\n")
    assert complaints(path, "learning_rate=high") == [
        "override 'learning_rate=high': learning_rate: must be a valid number, got 'high'"
    ]
    assert "write it as key.path=value" in complaints(path, "learning_rate")[0]
    assert "has no 'weight'" in complaints(path, "learning_rate.weight=1")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1\nlearning_rate: 2\n", "duplicate key"),
        ("learning_rate: [1\n", "not YAML or JSON"),
        ("- 1\n", "is a mapping"),
        ("learning_rate: !!python/object/apply:os.system ['true']\n", "have no meaning here"),
        ("learning_rate: .nan\n", "finite number"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    line = complaints(path)[0]
    assert line.startswith(str(path))
    assert said in line


def test_an_alias_bomb_does_not_go_off(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "a configuration is never that large" in complaints(write(tmp_path, "\n".join(rows)))[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in complaints(tmp_path / "absent.yaml")[0]


def test_the_schema_carries_types_and_forbids_strangers() -> None:
    schema = json_schema(Run)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Block"]["properties"]["lambda_coef"]["minimum"] == 0


class Pace(StrictModel):
    low: float = 0.1
    high: float = 1.0
    warmup: int = 0
    steps: int = 10

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if self.low > self.high:
            yield ("low",), "is above high"
        rest = self.steps - self.warmup
        if self.high < 10:
            if rest < 0:
                yield ("warmup",), "is longer than the run"
            elif self.low < 0:
                yield ("low",), "is negative"
        yield from self._more()

    def _more(self) -> Iterable[tuple[Loc, str]]:
        if self.high == 7:
            yield ("high",), "is 7"
        if self.warmup == 7:
            yield ("warmup",), "is 7"


class Paced(StrictModel):
    pace: Pace = Pace()
    others: tuple[Pace, ...] = ()

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        if self.pace.high < 1 < self.pace.steps:
            yield ("others",), "are too slow"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{low: 3}", ["pace.low: is above high"]),
        ("{low: 3, high: tall}", ["pace.high"]),
        ("{low: -1, high: tall, warmup: 7}", ["pace.high", "pace.warmup: is 7"]),
        ("{low: 3, steps: few, warmup: 20}", ["pace.low: is above high", "pace.steps"]),
        ("{high: 0.5, warmup: 20}", ["others: are too slow", "pace.warmup: is longer than the run"]),
        ("{high: 0.5, steps: few}", ["pace.steps"]),
        ("{}\nothers: [{low: 3, high: tall}, {low: 3}]", ["others.0.high", "others.1.low: is above high"]),
    ],
)
def test_no_cross_check_speaks_of_a_value_that_only_stands_in(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, f"pace: {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Paced, path)
    lines = sorted(line.split(": ", 1)[1] for line in str(caught.value).splitlines())
    assert len(lines) == len(said), lines
    assert all(line.startswith(start) for line, start in zip(lines, sorted(said), strict=True)), lines
