"""Shipped configurations are valid, explained, and complete; the schema beside them is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from samlet.config import RunConfig, with_todays_keys
from samlet.errors import ConfigError
from samlet.schema import StrictModel, _all_paths, json_schema, load_config
from tests.tiny import tiny_config, write_scenes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


def test_there_are_configurations() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_each_shipped_configuration_is_valid_and_carries_the_schema(path: Path) -> None:
    load_config(RunConfig, path, check_files=False)
    assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json\n")


def test_the_schema_is_current() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == json_schema(RunConfig), "run `make schema`"


OPTIONAL = (
    "model.encoder.",
    "model.lora.",
    "teachers.",
    "schema_",
    "validation.retention.",
    "validation.everything.",
    "stages.",
)


def test_the_full_configuration_names_and_explains_every_key() -> None:
    text = (CONFIGS / "mobile_sam.yaml").read_text()
    written = paths_in(YAML(typ="safe").load(text))
    known = {path for path in _all_paths(RunConfig) if not path.startswith(OPTIONAL)}
    assert known <= written
    lines = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
    assert [line for line in lines if "#" not in line and not line.startswith(("teachers:", "  - {"))] == []


def test_its_values_are_the_defaults() -> None:
    full = load_config(RunConfig, CONFIGS / "mobile_sam.yaml", check_files=False).model_dump()
    plain = RunConfig.model_validate_json(json.dumps({"dataset": {"root": "datasets/my_images"}})).model_dump()
    differing = {key for key in plain if full[key] != plain[key]}
    assert differing == {"output_dir", "model", "distillation", "teachers"}
    assert {k for k in plain["distillation"] if full["distillation"][k] != plain["distillation"][k]} == {"enable"}


SNIPPET = """"distillation": {
  "enable": true,
  "encoder_patch": { "enable": true, "weight": 0.5 }
},
"teachers": [
  { "name": "A", "weight": 0.7, "checkpoint": "a.pth" },
  { "name": "B", "weight": 0.3, "checkpoint": "b.pt" }
],
"""


@pytest.mark.parametrize("where", ["above", "below", "in place"])
def test_json_pastes_over_its_blocks_of_distillation(tmp_path: Path, where: str) -> None:
    text = (CONFIGS / "mobile_sam.yaml").read_text()
    start, end = text.index("distillation:"), text.index("training:")
    rest = {"above": f"{SNIPPET}%s", "below": f"%s{SNIPPET}", "in place": f"{text[:start]}{SNIPPET}{text[end:]}"}
    path = tmp_path / "run.yaml"
    path.write_text(rest[where].replace("%s", text[:start] + text[end:]))
    pasted = load_config(RunConfig, path, check_files=False).model_dump()
    full = load_config(RunConfig, CONFIGS / "mobile_sam.yaml", check_files=False).model_dump()
    assert [teacher["name"] for teacher in pasted["teachers"]] == ["A", "B"]
    assert pasted["distillation"]["encoder_patch"]["weight"] == 0.5
    assert {key for key in full if full[key] != pasted[key]} == {"distillation", "teachers"}


def test_a_missing_file_in_a_required_field_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset: {root: gone, labelled_fraction: 0.5}\n"
        "training: {min_learning_rate: 1.0, unfreeze_epoch: 3, epoch: 4}\n"
        "prompts: {positive_points: [4, 2]}\n"
        "distillation: {enable: true}\n"
        "teachers: [{name: A, checkpoint: gone.pth}, {name: A, checkpoint: .}]\n"
        "logging:\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, path)
    assert sorted(line.split(": ")[1] for line in str(caught.value).splitlines()) == [
        "dataset.labelled_fraction",
        "dataset.root",
        "logging",
        "prompts.positive_points",
        "teachers.0.checkpoint",
        "teachers.1.name",
        "training.epoch",
        "training.min_learning_rate",
        "training.unfreeze_epoch",
    ]


def paths_in(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return set()
    inner = [paths_in(member, f"{prefix}{key}.") for key, member in value.items()]
    return {f"{prefix}{key}" for key in value}.union(*inner)


def descriptions(schema: dict[str, Any]) -> list[str]:
    blocks = [schema, *schema["$defs"].values()]
    return [
        name for block in blocks for name, field in block.get("properties", {}).items() if "description" not in field
    ]


def test_every_field_explains_itself() -> None:
    assert descriptions(json_schema(RunConfig)) == []


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"distillation": {"enable": True}}, "teachers: distillation.enable is true, but there is no teacher"),
        ({"dataset": {"unlabelled": "use"}}, "images without masks teach nothing without a teacher"),
        ({"training": {"unfreeze_epoch": 2}}, "training.freeze is empty"),
        ({"training": {"min_learning_rate": 1.0}}, "is above learning_rate"),
        (
            {"distillation": {"enable": True, "use_precomputed_features": True}, "teachers": [{"name": "A"}]},
            "is null; give the folder of the stores, which `samlet extract` writes and training reads",
        ),
        ({"teachers": [{"name": "A", "checkpoint": "."}] * 2}, "teachers.1.name: 'A' is taken"),
    ],
)
def test_cross_checks(tmp_path: Path, blocks: dict[str, Any], said: str) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=1, val=1)
    plain = tiny_config(scenes, tmp_path / "run").model_dump(mode="json", by_alias=True)
    for name, block in blocks.items():
        plain[name] = {**plain[name], **block} if isinstance(block, dict) else block
    path = tmp_path / "run.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, path)
    assert said in str(caught.value)


def test_frozen_blocks_cannot_be_changed() -> None:
    class Block(StrictModel):
        value: int = 1

    with pytest.raises(ValueError, match="frozen"):
        Block().value = 2  # type: ignore[misc]


def test_a_run_of_an_earlier_version_is_known_again(tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(json.dumps({"dataset": {"root": str(tmp_path)}}))
    plain = config.model_dump(mode="json", by_alias=True)
    former = json.loads(json.dumps(plain))
    del former["distillation"]["trust"], former["stages"]
    former["distillation"]["lambda_coef"] = 3.0
    completed = with_todays_keys(former)
    assert completed["distillation"]["trust"] == plain["distillation"]["trust"]
    assert completed["stages"] == []
    assert completed["distillation"]["lambda_coef"] == 3.0
    assert with_todays_keys({**former, "gone": 1})["gone"] == 1
