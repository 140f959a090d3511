"""Stages in a configuration: overlays that resolve to whole configurations, and mistakes with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samlet.config import RunConfig
from samlet.errors import ConfigError
from samlet.schema import load_config

BASE = """\
dataset: {root: data}
teachers: [{name: A, checkpoint: a.pth}, {name: B, weight: 3, checkpoint: b.pth}]
training: {max_steps: 7, learning_rate: 1.0e-3, freeze: [mask_decoder]}
augmentation: {enable: false}
distillation: {enable: true}
stages:
"""


def read(tmp_path: Path, *stages: str, base: str = BASE) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(base + "".join(f"  - {stage}\n" for stage in stages))
    return load_config(RunConfig, path, check_files=False)


def test_each_stage_is_the_base_with_its_own_changes_alone(tmp_path: Path) -> None:
    first, second, third = read(
        tmp_path,
        "{name: neck, training: {epochs: 2, freeze: []}, distillation: {dense_mask_logits: {enable: false}}}",
        "{name: masks, distillation: {prompt_embed: {weight: 2}, lambda_coef: 0.5}, loss: {focal: 5.0}}",
        "{name: rest, teacher_weights: {B: 1}, augmentation: {vertical_flip: 0.5}, prompts: {box_jitter: 0.3}}",
    ).resolved()
    base = read(tmp_path, base=BASE.replace("stages:\n", ""))
    terms = [[name for name, _ in stage.distillation.terms()] for stage in (base, first, second, third)]
    assert terms[1] == ["encoder_patch"]
    assert terms[2] == ["encoder_patch", "prompt_embed", "dense_mask_logits"]
    assert terms[3] == terms[0]
    assert (first.training.epochs, first.training.max_steps, first.training.freeze) == (2, None, ())
    assert (second.training, second.prompts, third.loss) == (base.training, base.prompts, base.loss)
    assert (second.loss.focal, second.loss.dice, second.distillation.lambda_coef) == (5.0, 1.0, 0.5)
    assert [teacher.weight for teacher in third.teachers] == [None, 1]
    assert third.augmentation.enable  # written down, so it takes part
    assert third.augmentation.vertical_flip == 0.5
    assert third.prompts.box_jitter == 0.3
    assert all(stage.dataset == base.dataset and stage.stages == () for stage in (first, second, third))


def test_without_stages_the_configuration_is_its_only_stage(tmp_path: Path) -> None:
    base = read(tmp_path, base=BASE.replace("stages:\n", ""))
    assert base.resolved() == (base,)


def test_a_switch_that_is_off_stays_off_where_the_stage_says_so(tmp_path: Path) -> None:
    stage = "{name: a, distillation: {prompt_embed: {enable: false, weight: 2}}}"
    assert "prompt_embed" not in dict(read(tmp_path, stage).resolved()[0].distillation.terms())


def test_what_is_written_to_disk_reads_back_as_the_same_stages(tmp_path: Path) -> None:
    config = read(
        tmp_path, "{name: a, training: {epochs: 2}, validation: {early_stopping_patience: null}}", "{name: b}"
    )
    plain = config.model_dump(mode="json", by_alias=True)
    assert plain["stages"] == [
        {"name": "a", "training": {"epochs": 2}, "validation": {"early_stopping_patience": None}},
        {"name": "b"},
    ]
    again = RunConfig.model_validate_json(json.dumps(plain))
    assert again.resolved() == config.resolved()


MISTAKES = [
    ("{name: a, training: {epoch: 2}}", r":7: stages\.0\.training\.epoch: unknown key \(did you mean 'epochs'\?\)"),
    ("{name: a, training: {batch_size: 2}}", r":7: stages\.0\.training\.batch_size: is one for the whole run"),
    ("{name: a, validation: {metric: box_miou}}", r":7: stages\.0\.validation\.metric: is one for the whole run"),
    ("{name: a, model: {kind: vit_b}}", r":7: stages\.0\.model: is one for the whole run"),
    ("{name: a, seed: 3}", r":7: stages\.0\.seed: is one for the whole run"),
    ("{name: a, teachers: []}", r":7: stages\.0\.teachers: is one for the whole run"),
    ("{name: a, distillation: {use_precomputed_features: true}}", r"use_precomputed_features: is one for the whole"),
    ("{name: a, training: {min_learning_rate: 1.0}}", r":7: stages\.0\.training\.min_learning_rate: is above learn"),
    ("{name: a, teacher_weights: {C: 1}}", r":7: stages\.0\.teacher_weights\.C: there is no such teacher; .* A, B"),
    (
        "{name: a, training: {freeze: [image_encoder, prompt_encoder, mask_decoder]}}",
        r"stages\.0\.training\.freeze: fr",
    ),
    ("{name: a b}", r":7: stages\.0\.name: "),
    ("{training: {epochs: 1}}", r":7: stages\.0\.name: required, and missing"),
    (
        "{name: a, distillation: {encoder_patch: {enable: false}, dense_mask_logits: {enable: false}}}",
        r":7: stages\.0\.distillation\.enable: is true, but every term is disabled",
    ),
    (
        "{name: a, distillation: {lambda_coef: 0.1, dynamic_lambda: {enable_plateau_scheduler: true, min: 0.2}}}",
        r":7: stages\.0\.distillation\.dynamic_lambda\.min: is above lambda_coef \(0\.1\)",
    ),
]


@pytest.mark.parametrize(("stage", "said"), MISTAKES)
def test_mistakes_are_named_with_their_line(tmp_path: Path, stage: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, stage, "{name: fine}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r":8: stages\.1\.name: 'a' is taken by another stage"):
        read(tmp_path, "{name: a}", "{name: a}")


def test_what_a_stage_needs_from_the_whole_run_is_said_there(tmp_path: Path) -> None:
    base = "dataset: {root: data}\nstages:\n"
    with pytest.raises(ConfigError, match=r"teachers: in stage 'a': distillation\.enable is true, but there is no"):
        read(tmp_path, "{name: a, distillation: {enable: true}}", base=base)


def test_a_mistake_of_the_base_is_told_once(tmp_path: Path) -> None:
    base = BASE.replace("learning_rate: 1.0e-3", "min_learning_rate: 1.0")
    with pytest.raises(ConfigError, match=r":3: training\.min_learning_rate") as caught:
        read(tmp_path, "{name: a}", "{name: b}", base=base)
    assert len(str(caught.value).splitlines()) == 1
